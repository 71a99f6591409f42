"""The one way in which kernels are launched."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any

import torch
import triton
import triton.language as tl

MOST_ROWS = 512  # of a tile, and more than any has
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a launch, beside the kernel's arguments


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Run so many programs of a kernel, on the device of its first tensor, current or not.

    Of a tensor `x_ptr` [B, T, H, D], or [B, T, D] of one head, whose strides the kernel takes, as
    `x_strides`, they are filled in, that of rows as a constant; any other tensor is one that it
    takes to be contiguous. A tensor that it can not address as it is comes as a copy, which those
    that it writes, fresh ones, never need. Arguments that the kernel does not take are left out.
    """
    if programs == 0:
        return
    pointers, in_order = _signature(kernel)
    for name, strides in pointers:
        x = arguments[name]
        if strides is None:
            arguments[name] = x if x is None else x.contiguous()
        elif x is None:
            arguments[strides] = None
        else:
            arguments[strides] = _kernel_strides(x.shape, x.stride())
            if arguments[strides] is None:
                arguments[name] = x = x.contiguous()
                arguments[strides] = _kernel_strides(x.shape, x.stride())
    values = in_order(arguments)
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    x = values[0]
    if x.is_cuda:
        _warn_of_compiler(x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*values, **options, enable_fp_fusion=True)


@cache
def _signature(kernel: Any) -> tuple[list[tuple[str, str | None]], Callable[[Any], Any]]:
    """Names of its tensors, each with that of strides that it takes; what puts all in order."""
    names = kernel.arg_names
    strides = {name: name.replace("_ptr", "_strides") for name in names if name.endswith("_ptr")}
    pointers = [(name, other if other in names else None) for name, other in strides.items()]
    return pointers, itemgetter(*names)


@lru_cache(maxsize=4096)
def _kernel_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[Any, ...] | None:
    """Strides as kernels take them, or None where they can not.

    Rows have to be dense, and those of a tile to lie within the reach of 32 bits.
    """
    (_, rows, *_, width), (batch, row, *heads, column) = shape, strides
    far = (min(rows, MOST_ROWS) - 1) * row + width
    if far >= 2**31 or (width > 1 and column != 1):
        return None
    return batch, tl.constexpr(row), heads[0] if heads else 0


@cache
def _warn_of_compiler(device: torch.device) -> None:
    """Warn once of what is wrong with the code for a GPU."""
    if torch.cuda.get_device_capability(device)[0] == 9:
        for fault in hopper_faults(triton.__version__, triton.knobs.nvidia.ptxas.version):
            warnings.warn(fault, RuntimeWarning, stacklevel=2)


def hopper_faults(triton_version: str, ptxas_version: str) -> list[str]:
    """What is known to be wrong with the code that they make for sm_90, and the remedy."""
    faults = []
    if _numbers(triton_version) < (3, 7):
        faults.append(
            f"triton {triton_version} leaves out a fence between copies and the matrix products "
            "that read them, so results on this GPU may be wrong: install triton 3.7 or later"
        )
    if _numbers(ptxas_version) < (13, 3):
        faults.append(
            f"ptxas {ptxas_version} may corrupt matrix products with an operand in registers on "
            "this GPU: let TRITON_PTXAS_PATH name one of 13.3 or later, such as that of "
            "nvidia-cuda-nvcc or triton/backends/nvidia/bin/ptxas-blackwell of triton 3.8"
        )
    return faults


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
