"""The one way in which kernels are launched."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver

MOST_ROWS = 512  # of a tile, and more than any has
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a launch, beside the kernel's arguments
MOST_COMPILED = 256  # launches of a kernel that are remembered


class _Compiled(NamedTuple):
    """What launches a kernel that a driver has compiled, and the strides to give it."""

    driver: Any
    run: Callable[..., None]
    strides: dict[str, Any]


class _Kernel(NamedTuple):
    """Names of a kernel's tensors, of the strides that it takes and of the rest; its launches."""

    pointers: list[str]
    strides: dict[str, str]
    rest: list[str]
    in_order: Callable[[Any], Any]
    compiled: dict[tuple[Any, ...], _Compiled]


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Run so many programs of a kernel, on the device of its first tensor, current or not.

    Of a tensor `x_ptr` [B, T, H, D], or [B, T, D] of one head, whose strides the kernel takes, as
    `x_strides`, they are filled in, that of rows as a constant; any other tensor is one that it
    takes to be contiguous. A tensor that it can not address as it is comes as a copy, which those
    that it writes, fresh ones, never need. Arguments that the kernel does not take are left out.
    A launch like one before, of tensors at other addresses, goes to what was compiled for that one,
    which spares the host most of its work, and Triton another look at its knobs.
    """
    if programs == 0:
        return
    known = _known(kernel)
    x = arguments[known.pointers[0]]
    key = x.get_device(), programs, *_describe(known, arguments)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        compiled = known.compiled.get(key)
        if compiled is not None and compiled.driver is driver.active:
            compiled.run(*known.in_order(arguments | compiled.strides))
            return
        if x.is_cuda:
            _warn_of_compiler(x.device)
        fitted = _fit(known, arguments)
        options = {name: arguments[name] for name in OPTIONS if name in arguments}
        values = known.in_order(arguments | fitted)
        result = kernel[(programs,)](*values, **options, enable_fp_fusion=True)
        copied = not fitted.keys().isdisjoint(known.pointers)
        # A copy holds what one call was given, and of meta tensors nothing has been launched.
        if isinstance(result, CompiledKernel) and not (copied or x.is_meta):
            if len(known.compiled) >= MOST_COMPILED:
                known.compiled.clear()
            run = result[(programs, 1, 1)]
            known.compiled[key] = _Compiled(driver.active, run, fitted)


@cache
def _known(kernel: Any) -> _Kernel:
    names = kernel.arg_names
    pointers = [name for name in names if name.endswith("_ptr")]
    strides = {name: name.replace("_ptr", "_strides") for name in pointers}
    strides = {name: other for name, other in strides.items() if other in names}
    rest = [name for name in names if name not in {*pointers, *strides.values()}]
    return _Kernel(pointers, strides, [*rest, *OPTIONS], itemgetter(*names), {})


def _describe(known: _Kernel, arguments: dict[str, Any]) -> list[Any]:
    """All that Triton compiles for, and more; tensors without strides become contiguous."""
    description = [*map(arguments.get, known.rest)]
    for name in known.pointers:
        x = arguments[name]
        if x is None:
            description.append(None)
            continue
        if name in known.strides:
            description += x.shape, x.stride()
        else:
            arguments[name] = x = x.contiguous()
        description += x.dtype, x.data_ptr() % 16  # Triton asks whether 16 divides addresses
    return description


def _fit(known: _Kernel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The strides that a kernel takes, and copies of tensors whose own it can not take."""
    fitted: dict[str, Any] = {}
    for name, strides in known.strides.items():
        x = arguments[name]
        fitted[strides] = None if x is None else _kernel_strides(x.shape, x.stride())
        if x is not None and fitted[strides] is None:
            fitted[name] = x = x.contiguous()
            fitted[strides] = _kernel_strides(x.shape, x.stride())
    return fitted


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
