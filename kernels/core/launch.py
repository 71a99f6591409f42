"""The one way in which kernels are launched."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

MOST_ROWS = 512  # of a tile, and more than any has


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Run so many programs of a kernel, on the device of its tensors, current or not.

    Of a tensor `x_ptr` [B, T, H, D] whose strides the kernel takes, as `x_strides`, they are filled
    in, that of rows as a constant; any other tensor is one that it takes to be contiguous. A tensor
    that it can not address as it is comes as a copy, which those that it writes, fresh ones, never
    need.
    """
    if programs == 0:
        return
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        strides = name.replace("_ptr", "_strides")
        if strides in kernel.arg_names:
            arguments[name] = x = x if _is_addressable(x) else x.contiguous()
            batch, row, head, _ = x.stride()
            arguments[strides] = batch, tl.constexpr(row), head
        else:
            arguments[name] = x.contiguous()
    device = torch.cuda.device_of(next(iter(tensors.values())))  # type: ignore[no-untyped-call]
    with device:
        kernel[(programs,)](**arguments)


def _is_addressable(x: Tensor) -> bool:
    """Whether rows are dense, and those of a tile lie within the reach of 32 bits."""
    width = x.shape[-1]
    far = (min(x.shape[1], MOST_ROWS) - 1) * x.stride(1) + width
    return far < 2**31 and (width == 1 or x.stride(-1) == 1)
