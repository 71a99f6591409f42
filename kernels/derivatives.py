"""How ops are differentiated: by autograd, and under the transforms of `torch.func`."""

from functools import cache
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether `torch.func` or forward mode may follow tensors that do not say so themselves."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether a compiler or a transform sees operators instead of values."""
    return torch.compiler.is_compiling() or is_transformed()


def ask_for_gradients(*tensors: Any) -> bool:
    """Whether a derivative may follow, which an operator needs a `Function` for."""
    return is_transformed() or (
        torch.is_grad_enabled()
        and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)
    )


class Function(torch.autograd.Function):
    """One for `run`: what `vmap` makes of it follows from the operators that it calls."""

    generate_vmap_rule = True


def run(function: type[Function], *arguments: Any) -> Any:
    """The function's results; forward mode, which none of them has, is refused."""
    if torch.compiler.is_compiling():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    if is_transformed():
        return _without_forward_mode(function).apply(*arguments)
    # Past what binds default arguments, of which there are none, at thrice the cost of the rest.
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


@cache
def _without_forward_mode(function: type[Function]) -> Any:
    """The same beside a jvp, with which it could not be compiled."""
    return type(function.__name__, (function,), {"jvp": staticmethod(_refuse_forward_mode)})


def _refuse_forward_mode(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "impl: expected 'eager' in forward mode (jvp, jacfwd, hessian), got 'sdpa' or 'triton'"
    )


class _WithoutBackward(Function):
    """What an operator makes of inputs of which some ask for a gradient that it has not got."""

    @staticmethod
    def forward(refusal: str, operator: Any, *inputs: Any) -> Any:
        return operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.refusal = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(ctx.refusal)


def without_backward(refusal: str, operator: Any, *inputs: Any) -> Any:
    """operator(*inputs), whose backward is refused where an input asks for its gradient."""
    if ask_for_gradients(*inputs):
        return run(_WithoutBackward, refusal, operator, *inputs)
    return operator(*inputs)


def gradients(operator: Any, *inputs: Any) -> Any:
    """operator(*inputs), whose results are gradients, without any of their own."""
    refusal = "impl: expected 'eager' for the gradient of a gradient, got 'sdpa' or 'triton'"
    return without_backward(refusal, operator, *inputs)
