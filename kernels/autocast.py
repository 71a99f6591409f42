"""Ops compute in the types of their tensors, whether autocast is on or not."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kernels.derivatives import is_transformed

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def no_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which nothing on this type of device is cast."""
    return torch.autocast(device, enabled=False) if _is_on(device) else nullcontext()


def _is_on(device: str) -> bool:
    """Whether autocast is on for this type of device; PyTorch refuses to say so of meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The op as it is outside autocast."""

    @functools.wraps(op)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                device = x.device.type
                if not _is_on(device):
                    break
                with torch.autocast(device, enabled=False):
                    return op(*args, **kwargs)
        return op(*args, **kwargs)

    return run


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of equal batches, in their own type whatever autocast says, in the backward too."""
    if is_transformed():  # which takes the backward of PyTorch's own
        return a @ b
    result: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with no_autocast(a.device.type):
            return a @ b

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        da = product(d, b.mT) if ctx.needs_input_grad[0] else None
        return da, product(a.mT, d) if ctx.needs_input_grad[1] else None
