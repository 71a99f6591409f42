"""Operators as PyTorch knows them, so that its compiler keeps each as one node of a graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

_NAMESPACE = "smollm_attention"
_LIBRARY = Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
Function = Callable[..., Any]


def operator(schema: str, fake: Function, *, folds: bool = False) -> Callable[[Function], Function]:
    """Turn a function into the operator of a schema; fake makes its results, but not their values.

    It has no gradients of its own, and unlike `torch.library.custom_op`, which looks into every
    call, costs little more than the function. Under `torch.func.vmap` it runs once per example, or
    if it folds once for all: no batch of it meets another, and its tensors of three or more axes
    and its results begin with the axis of the batches.
    """

    def register(function: Function) -> Function:
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
        name = schema.partition("(")[0]
        qualified = f"{_NAMESPACE}::{name}"
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        overload: Function = getattr(getattr(torch.ops, _NAMESPACE), name).default
        torch.library.register_vmap(qualified, _vmap_rule(overload, folds), lib=_LIBRARY)
        return overload

    return register


def _vmap_rule(overload: Any, folds: bool) -> Function:
    """How `vmap` runs an operator; the new axis comes first in every result."""
    names = [argument.name for argument in overload._schema.arguments]

    def rule(info: Any, axes: tuple[int | None, ...], *arguments: Any) -> tuple[Any, int]:
        n, given = info.batch_size, list(arguments)
        mapped = [i for i, axis in enumerate(axes) if axis is not None]
        for i in mapped:
            given[i] = given[i].movedim(axes[i], 0)
        packed = folds and given[names.index("cu_seqlens")] is not None
        results: list[Tensor]
        if folds and not packed and all(given[i].dim() > 3 for i in mapped):
            folded = overload(*(_folded(x, i in mapped, n) for i, x in enumerate(given)))
            results = [x.view(n, x.shape[0] // n, *x.shape[1:]) for x in _all(folded)]
        else:
            examples = ([x[e] if i in mapped else x for i, x in enumerate(given)] for e in range(n))
            each = [_all(overload(*example)) for example in examples]
            results = [torch.stack(x) for x in zip(*each, strict=True)]
        return tuple(results) if len(overload._schema.returns) > 1 else results[0], 0

    return rule


def _all(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _folded(x: Any, is_mapped: bool, n: int) -> Any:
    """[n, B, ...], or [B, ...] of all n examples, as [n * B, ...]; anything else as it is."""
    if not is_mapped and isinstance(x, Tensor) and x.dim() > 2:
        x, is_mapped = x.expand(n, *x.shape), True
    return x.flatten(0, 1) if is_mapped else x
