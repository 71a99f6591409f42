"""The one way in which kernels are launched."""

import warnings
from functools import cache
from typing import Any

import torch
import triton
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
    x = next(iter(tensors.values()))
    if x.is_cuda:
        _warn_of_compiler(x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(programs,)](**arguments, enable_fp_fusion=True)


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


def _is_addressable(x: Tensor) -> bool:
    """Whether rows are dense, and those of a tile lie within the reach of 32 bits."""
    width = x.shape[-1]
    far = (min(x.shape[1], MOST_ROWS) - 1) * x.stride(1) + width
    return far < 2**31 and (width == 1 or x.stride(-1) == 1)
