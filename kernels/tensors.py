"""Checks of what the tensors of one call must have in common: sizes, types and devices.

Shapes are written as space-separated symbols, `"B T HK D_QK"`. A symbol takes its size from the
first tensor that carries it, and every later tensor must agree.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.derivatives import is_traced

Check = TypeVar("Check", bound=Callable[..., None])
Sizes = dict[str, int]
KERNEL_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS = (*KERNEL_FLOATS, torch.float64)
_MOST_SIGNATURES = 4096


def once_per_signature(check: Check) -> Check:
    """The check, left out where it has passed for arguments that it cannot tell from these."""
    passed: set[Any] = set()

    @functools.wraps(check)
    def run(*arguments: Any, **named: Any) -> None:
        if is_traced():
            return check(*arguments, **named)
        try:
            signature = (*named, *map(_signature, (*arguments, *named.values())))
            if signature in passed:
                return None
        except TypeError:  # what has no hash is refused, or a size that is only traced
            return check(*arguments, **named)
        check(*arguments, **named)
        if len(passed) == _MOST_SIGNATURES:
            passed.clear()
        passed.add(signature)
        return None

    return run  # type: ignore[return-value]


def _signature(x: Any) -> Any:
    """All that a check looks at: of floating tensors no values, of offsets on a CPU these too."""
    if not isinstance(x, Tensor):
        return tuple(map(_signature, x)) if isinstance(x, tuple) else (type(x), x)
    if x.dtype == torch.int32 and x.dim() == 1 and x.device.type == "cpu":
        return x.device, *x.tolist()
    return x.shape, x.dtype, x.device


def readable(x: Tensor) -> bool:
    """Whether Python may look at values: without a stall, in no graph and no `torch.func`."""
    return x.device.type == "cpu" and not is_traced()


def shape(name: str, x: Tensor, symbols: str, sizes: Sizes) -> None:
    """Match x against its symbols, learning the sizes of those not seen before.

    Raises:
        ValueError, TypeError: other sizes, or no tensor.
    """
    tensor(name, x)
    names, actual = symbols.split(), x.shape
    if tuple(map(sizes.get, names, actual)) != actual or len(names) != len(actual):
        known = (f"{symbol}={sizes[symbol]}" if symbol in sizes else symbol for symbol in names)
        raise ValueError(f"{name}: expected [{', '.join(known)}], got {list(actual)}")
    sizes.update(zip(names, actual, strict=True))


def tensor(name: str, x: Any) -> None:
    """Refuse what is no tensor, with a TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def multiple(many: str, few: str, sizes: Sizes) -> None:
    """Refuse with a ValueError a number of heads that another one does not divide."""
    if sizes[few] == 0 or sizes[many] % sizes[few]:
        raise ValueError(
            f"heads: expected {many} a multiple of {few}, got {many}={sizes[many]}, "
            f"{few}={sizes[few]}"
        )


def head_groups(sizes: Sizes) -> None:
    """Heads of queries share those of keys in equal groups, and those of keys those of values."""
    multiple("HQ", "HK", sizes)
    multiple("HK", "HV", sizes)


def alike(**tensors: Tensor | None) -> None:
    """All floating, of one type, on one device; the first tensor sets both.

    Raises:
        ValueError, TypeError: another device; another type.
    """
    same_device(**tensors)
    first, dtype = next((name, x.dtype) for name, x in tensors.items() if x is not None)
    for name, x in tensors.items():
        if x is not None:
            floating(name, x)
            if x.dtype != dtype:
                raise TypeError(f"{name}: expected {first}'s type {dtype}, got {x.dtype}")


def floating(name: str, x: Tensor | None) -> None:
    """Refuse a tensor of integers with a TypeError."""
    if x is not None and x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating type {_FLOATS}, got {x.dtype}")


def bias(name: str, x: Tensor | None, symbols: str, q: Tensor, sizes: Sizes) -> None:
    """A term of q's scores, of each batch or one for all, in fp32 or fp64, if there is one.

    Raises:
        ValueError, TypeError: another shape, type or device.
    """
    if x is None:
        return
    tensor(name, x)
    shape(name, x, f"{1 if x.shape[:1] == (1,) else 'B'} {symbols}", sizes)
    same_device(q=q, **{name: x})
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected torch.float32 or torch.float64, got {x.dtype}")


def same_device(**tensors: Tensor | None) -> None:
    """Refuse a tensor on another device than the first one's with a ValueError."""
    first, device = next((name, x.device) for name, x in tensors.items() if x is not None)
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(f"{name}: expected {first}'s device {device}, got {x.device}")
