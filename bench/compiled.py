"""Launches compiled ahead of time for GPUs that need not be here, and what became of them."""

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.cycles import program_cycles, tile_cycles
from bench.ptx import contracted_sums, unfenced_products
from bench.sass import matrix_loops, parse
from kernels.core import tiles
from kernels.core.primitives import padded_width


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM: shared memory in bytes, of a block and in all, and threads."""

    block_shared: int
    shared: int
    threads: int


REGISTERS, RESERVED_SHARED, MAX_CTAS = 65_536, 1024, 32
MULTIPROCESSORS = {
    80: Multiprocessor(163 << 10, 164 << 10, 2048),
    90: Multiprocessor(227 << 10, 228 << 10, 2048),
    100: Multiprocessor(227 << 10, 228 << 10, 2048),
    120: Multiprocessor(99 << 10, 100 << 10, 1536),
}
INPUTS = ("g_ptr", "q_ptr", "do_ptr", "o_ptr")  # whose type is that of a kernel
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "UTMALDG")
MOST_SPILLED = 64  # bytes of a thread; so few cost less than fewer programs or a smaller tile
MOST_SPILLED_ONCE = 512  # none of them in a loop of products, so once for each program
# Kernels whose cycles are predicted, of a tile of scores or of a whole program.
TIMED, TIMED_WHOLE = ("forward", "dq", "dq_excess", "dkdv"), ("totals", "fitness", "share", "dg")
SERIALISED = "(C7510)", "(C7511)", "(C7512)", "(C7515)"  # ptxas on wgmma


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    arch: int
    kernel: str
    dtype: str
    width: str  # of keys, and of their rotary part
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    instructions: dict[str, int]
    warnings: tuple[str, ...]
    # predicted: of 64 x 64 scores, interior and masked, or of a program of fitness
    cycles: tuple[int, ...] | None = None
    unfenced: int = 0  # wgmma that read registers written behind their fence
    contracted: int = 0  # sums over lanes that are fused with products
    loop_spills: int | None = None  # instructions that spill in the loops of products, if known

    @property
    def faults(self) -> list[str]:
        """Why this tile must not stand in the table."""
        faults = []
        if self.spill_bytes > (MOST_SPILLED_ONCE if self.loop_spills == 0 else MOST_SPILLED):
            faults.append(f"spills {self.spill_bytes} bytes")
        if any(code in line for line in self.warnings for code in SERIALISED):
            faults.append("wgmma serialised")
        if self.unfenced:
            faults.append(f"{self.unfenced} wgmma unfenced")
        if self.contracted:
            faults.append(f"{self.contracted} sums fused with products")
        if self.shared_bytes > MULTIPROCESSORS[self.arch].block_shared:
            faults.append("too much shared memory")
        if self.arch == 90 and self._suits_wgmma and not self.instructions["HGMMA"]:
            faults.append("no wgmma")
        return faults

    @property
    def _suits_wgmma(self) -> bool:
        widths = [int(d) for d in self.width.split("+")]
        columns = sum(map(padded_width, widths))
        ragged = any(d < 32 or d % 16 for d in widths)
        if self.dtype == "float32" or ragged or tiles.is_narrow(widths[0], columns):
            return False  # the tile is a plain one
        if self.kernel not in ("forward", "dq", "dq_excess", "dkdv"):
            return False
        # 64 keys, the fewest of a wgmma, have two accumulators that at 256 leave no register over.
        return self.kernel in ("forward", "dq", "dq_excess") or (
            self.kernel == "dkdv" and columns <= 128
        )


class Target:
    """Stands in for the CUDA driver where there is no GPU."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def compiling(arch: int, only: str | None = None) -> Iterator[list[Row]]:
    """Launches inside compile for `arch`, of one kernel or all, run nothing and leave rows."""
    rows: list[Row] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if only and self.__name__ != f"{only}_kernel":
            return None
        self.device_caches.clear()  # a kernel met before must compile again, to be heard of again
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=True))
        rows.append(_row(arch, kernel, arguments, log.getvalue()))
        return kernel

    with (
        triton.knobs.compilation.scope(),
        triton.knobs.nvidia.scope(),
        mock.patch.object(driver, "_active", Target(arch)),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(tiles, "architecture", lambda device: arch),
    ):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield rows


def _row(arch: int, kernel: Any, arguments: dict[str, Any], log: str) -> Row:
    registers = re.search(r"Used (\d+) registers", log)
    assert registers, f"ptxas said nothing of {kernel.metadata.name}: {log}"
    sass = _disassemble(kernel.asm["cubin"])
    metadata, rope = kernel.metadata, arguments.get("D_ROPE", 0)
    width = arguments.get("D_QK") or arguments.get("D_V")
    if width is None:
        width = arguments["D_FIRST"] + arguments["D_SECOND"]
    excess = "_excess" if arguments.get("HAS_EXCESS") else ""
    row = Row(
        arch=arch,
        kernel=metadata.name.removesuffix("_kernel") + excess,
        dtype=str(arguments[next(name for name in INPUTS if name in arguments)].dtype)[6:],
        width=str(width) + (f"+{rope}" if rope else ""),
        block_m=arguments.get("BLOCK_M", arguments.get("BLOCK", 0)),
        block_n=arguments.get("BLOCK_N", 0),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=int(registers[1]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        shared_bytes=metadata.shared,
        ctas_per_sm=_ctas_per_sm(arch, int(registers[1]), metadata.num_warps, metadata.shared),
        instructions={name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS},
        warnings=tuple(line for line in log.splitlines() if "(C7" in line),
        unfenced=unfenced_products(kernel.asm["ptx"]),
        contracted=contracted_sums(kernel.asm["ptx"]),
    )
    if arch != 90 or row.dtype == "float32" or arguments.get("IS_VARLEN"):
        return row
    if row.kernel in TIMED_WHOLE:
        return replace(row, cycles=program_cycles(sass, row.num_warps, row.ctas_per_sm))
    if row.kernel not in TIMED:
        return row
    shape = row.block_m, row.block_n, row.num_warps, row.ctas_per_sm
    loops = matrix_loops(parse(sass))
    spills = sum(x.name in ("LDL", "STL") for body in loops for x in body)
    loop_spills = spills if loops else None
    return replace(row, cycles=tile_cycles(sass, *shape), loop_spills=loop_spills)


def _ctas_per_sm(arch: int, registers: int, warps: int, shared: int) -> int:
    limits = MULTIPROCESSORS[arch]
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = limits.shared // (shared + RESERVED_SHARED)
    return min(by_registers, by_shared, limits.threads // (32 * warps), MAX_CTAS)


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
