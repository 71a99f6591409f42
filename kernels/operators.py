"""Operators as PyTorch knows them, so that its compiler keeps each as one node of a graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

_NAMESPACE = "smollm_attention"
_LIBRARY = Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
Function = Callable[..., Any]


def ask_for_gradients(*tensors: Any) -> bool:
    """Whether a backward may follow, which an operator needs an `autograd.Function` for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def operator(schema: str, fake: Function) -> Callable[[Function], Function]:
    """Turn a function into the operator of a schema; fake makes its results, but not their values.

    It has no gradients of its own, and unlike `torch.library.custom_op`, which looks into every
    call, costs little more than the function.
    """

    def register(function: Function) -> Function:
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
        name = schema.partition("(")[0]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
        overload: Function = getattr(getattr(torch.ops, _NAMESPACE), name).default
        return overload

    return register
