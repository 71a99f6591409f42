"""Predicted cycles of a tile: a model of one SM of sm_90 that steps through machine code.

PREDICTED and uncalibrated: no figure of the model is fitted to a measurement, and a measurement
overrules it. It is there to rank tiles of one kernel, which it does to about 8 %; its cycles
themselves are some 15 % too few, and for sm_90 alone.

The model is one sub-partition of an SM, with one warp of each resident warpgroup; the other three
do the same. It issues in order, the warp that has waited longest first, as stall counts and
scoreboards allow. Each pipe takes an instruction once an interval; tensor core, shared memory and
L2 have their rates. Everything hits L2; bank conflicts, instruction fetch and power are left out.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.sass import Instruction, matrix_loops, one_pass, parse, unmasked

# Cycles for which an instruction of a warp takes its pipe.
INTERVAL = {"fma": 1, "alu": 2, "imad": 2, "xu": 8, "uniform": 2, "memory": 4, "control": 1}
FIXED = 4  # from issue to the result of an instruction that none of the following names
LATENCY = {
    "LDC": 30, "S2R": 20, "S2UR": 20, "R2UR": 20, "CS2R": 20, "MEMBAR": 15, "FENCE": 15, "SHFL": 23,
}  # fmt: skip
XU_LATENCY, SHARED_LATENCY, GLOBAL_LATENCY, L2_LATENCY = 22, 29, 500, 280
WGMMA_LATENCY = 40  # from its last operand to a result that can be read
BARRIER, BARRIER_JITTER = 20, 24
READ = 20  # from issue until the operands of an access to memory are read
L2_JITTER = 80  # as the barrier's, uniform: it keeps the CTAs of an SM out of step
SHARED_BYTES, L2_BYTES = 128, 28.0  # a cycle and SM; of L2, while all SMs read
ALIKE = 4  # sub-partitions, each with a warp that reads as much
# How far apart CTAs start; the mean over several is that of CTAs that drift.
APART = 37, 210, 390, 610, 870, 1130
PASSES, PROGRAMS = 24, 6  # in a row: of a loop, and the programs of a whole kernel


@dataclass
class Warp:
    """One warp of a CTA, and when what it has issued is done."""

    cta: int
    code: Sequence[Instruction]
    ready: float  # when its next instruction may issue, the pipe aside
    at: int = 0
    issued: float = -1.0
    at_barrier: bool = False
    boards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    groups: list[float] = field(default_factory=list)  # ends of wgmma that were committed
    copied: float = 0.0  # end of the last asynchronous copy

    def wait(self, earliest: float) -> None:
        """Set when the next instruction may issue."""
        i, t = self.code[self.at], earliest
        for k in i.waits:
            t = max(t, _when_at_most(0, self.boards[k]))
        if i.allowed:
            board, allowed = i.allowed
            t = max(t, _when_at_most(allowed, self.boards[board]))
        if i.allowed_groups is not None:
            t = max(t, _when_at_most(i.allowed_groups, self.groups))
        self.ready = t


def _when_at_most(allowed: int, ends: list[float]) -> float:
    """When no more than so many of the ends are still to come, and forget those before."""
    ends.sort()
    count = len(ends) - allowed
    if count <= 0:
        return 0.0
    last = ends[count - 1]
    del ends[:count]
    return last


class Partition:
    """A sub-partition; bytes of shared memory and L2 count for all four."""

    def __init__(self, seed: int = 0) -> None:
        self.free: dict[str, float] = defaultdict(float)  # when what an instruction needs is
        self.shared = self.l2 = 0.0
        self.random = random.Random(seed)

    def run(self, code: Sequence[Instruction], warps: int, ctas: int, apart: float = 37.0) -> float:
        """Cycles until resident CTAs of so many warps, started some time apart, are done."""
        each = max(1, warps // ALIKE)
        active = [Warp(n, code, apart * n) for n in range(ctas) for _ in range(each)]
        now = 0.0
        while active:
            now, w = self._next(active, now)
            i = w.code[w.at]
            self._issue(w, i, now)
            w.issued, w.at = now, w.at + 1
            now += 1
            if i.name == "BAR" and i.opcode.startswith("BAR.SYNC"):
                w.at_barrier = True
                here = [other for other in active if other.cta == w.cta and other.at_barrier]
                if len(here) == each:
                    opens = now + BARRIER + self.random.uniform(0, BARRIER_JITTER)
                    for other in here:  # of which the last to come goes on at once
                        other.at_barrier, other.ready = False, max(other.ready, opens)
            if w.at == len(w.code):
                active.remove(w)
            else:
                w.wait(now - 1 + max(1, i.stall))
        return now

    def _next(self, warps: Sequence[Warp], now: float) -> tuple[float, Warp]:
        """The warp that issues next, and when."""
        begin, issued, best = math.inf, 0.0, warps[0]
        for w in warps:
            if not w.at_barrier:
                free = self.free[w.code[w.at].needs]
                t = w.ready if w.ready > free else free  # faster than max, and met most often
                t = t if t > now else now
                if t < begin or (t == begin and w.issued < issued):
                    begin, issued, best = t, w.issued, w
        return begin, best

    def _issue(self, w: Warp, i: Instruction, now: float) -> None:
        done = now + FIXED
        if i.pipe == "tensor":
            done = self._multiply(i, now)
            if "gsb0" in i.text:
                w.groups.append(done)
        elif i.is_live:
            self.free[i.needs] = now + INTERVAL[i.pipe]
            if i.pipe == "xu":
                done = now + XU_LATENCY
            elif i.name == "LDGDEPBAR":
                done = max(w.copied, now)
            elif i.global_bytes or i.shared_bytes:
                done = self._access(w, i, now)
            else:
                done = now + LATENCY.get(i.name, FIXED)
        if i.writes < len(w.boards):
            w.boards[i.writes].append(done)
        if i.reads < len(w.boards):
            w.boards[i.reads].append(min(done, now + READ) if i.pipe == "memory" else done)

    def _multiply(self, i: Instruction, now: float) -> float:
        begin = max(now + 2, self.free["tensor"])
        end = begin + i.tensor_cycles
        if i.name == "HGMMA":
            self.shared = max(self.shared, begin) + i.shared_bytes / SHARED_BYTES
            end = max(end, self.shared)
        self.free["queue"], self.free["tensor"] = begin, end
        return end + WGMMA_LATENCY

    def _access(self, w: Warp, i: Instruction, now: float) -> float:
        if i.global_bytes:
            self.l2 = max(self.l2, now) + ALIKE * i.global_bytes / L2_BYTES
        if i.shared_bytes:
            self.shared = max(self.shared, now) + ALIKE * i.shared_bytes / SHARED_BYTES
        if i.name == "LDGSTS":
            w.copied = self.l2 + L2_LATENCY + self.random.uniform(0, L2_JITTER)
            return now + READ
        return (
            self.l2 + GLOBAL_LATENCY if i.global_bytes else max(self.shared, now) + SHARED_LATENCY
        )


def steady_cycles(
    body: Sequence[Instruction], warps: int, ctas: int, passes: int = PASSES
) -> float:
    """Cycles of an SM per pass of a loop of one CTA, while so many CTAs are resident."""
    few, total = passes // 3, 0.0
    starts = APART if ctas > 1 else (0,)
    for apart in starts:
        short, long = (
            Partition(apart).run(list(body) * count, warps, ctas, apart) for count in (few, passes)
        )
        total += (long - short) / ((passes - few) * ctas)
    return total / len(starts)


def tile_cycles(
    listing: str, block_m: int, block_n: int, warps: int, ctas: int
) -> tuple[int, int] | None:
    """Cycles of 64 x 64 scores in an interior tile and in a masked one; None without a loop."""
    loops = matrix_loops(parse(listing))
    if not loops or not ctas:
        return None
    body = max(loops, key=len)
    size = block_m * block_n / 64**2
    interior, masked = (steady_cycles(b, warps, ctas) / size for b in (unmasked(body), body))
    return round(interior), round(masked)


def program_cycles(listing: str, warps: int, ctas: int) -> tuple[int] | None:
    """Cycles of an SM per program of a kernel, of many in a row, that pass each loop once."""
    path = one_pass(parse(listing))
    return (round(steady_cycles(path, warps, ctas, PROGRAMS)),) if path and ctas else None
