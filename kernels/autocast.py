"""Ops compute in the types of their tensors, whether autocast is on or not."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

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
