"""Which tiles are the fastest on this GPU, of those in `bench.candidates`.

`python -m bench.tune [--output FOLDER] [--budget-s 200]` takes the widths of models one by one, 64
first. Every candidate must first agree with the reference, o and all gradients, or it is out; then
those of a direction and width are timed in turns, as `bench.bench_attention` does. One whose op, of
dq and dkdv the whole backward, is more than 2 % faster than with the table's tile wins.

FOLDER gets `tiles.json`, every measurement, and `tiles.py`, the table with its winners, to take
the place of that in `kernels/core/tiles.py`. Both are written after each width, so that what is
done when the budget or the patience ends is there. Parity here is of few shapes: run the tests of
the new table before it stays.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.nvidia.compiler import get_ptxas

import kernels
from bench.candidates import ALTERNATIVES, table, tiles_to_try, using
from bench.results import machine
from bench.timing import median_seconds, training_call
from kernels.core import tiles
from kernels.core.tiles import Direction, Table, Tile
from tests.cases import AttentionCase, LatentCase
from tests.numerics import assert_parity

THRESHOLD = 1.02
TURNS, ROUNDS = 3, 10
NOT_MEASURED = "not measured: no time left"
Case = AttentionCase | LatentCase


@dataclass
class Measurement:
    """A tile for rows of up to so many columns in one direction."""

    direction: Direction
    widest: int
    tile: Tile
    milliseconds: dict[str, list[float]] = field(default_factory=dict)  # of each turn, by case
    refused: str = ""  # why it has none

    def speedup(self, today: "Measurement") -> float:
        """Geometric mean over the cases of how many times as fast as today's tile it is."""
        return statistics.geometric_mean(
            statistics.median(today.milliseconds[case]) / statistics.median(turns)
            for case, turns in self.milliseconds.items()
        )


Check = Callable[[Direction, int, Tile], str]  # what is wrong with a tile, or nothing
Time = Callable[[Direction, int, Tile], dict[str, float]]  # milliseconds by case


def measure(
    arch: int, check: Check, timed: Time, budget_s: float, now: Callable[[], float] = time.monotonic
) -> Iterator[list[Measurement]]:
    """The tiles of each width and direction, the table's first, while the budget lasts."""
    end = now() + budget_s
    alternatives = ALTERNATIVES.get(arch, {})
    for widest in sorted({w for widths in alternatives.values() for w in widths}):
        for direction in (d for d, widths in alternatives.items() if widest in widths):
            found = [
                Measurement(direction, widest, t) for t in tiles_to_try(arch, direction, widest)
            ]
            for m in found:
                late = now() >= end
                m.refused = NOT_MEASURED if late else check(direction, widest, m.tile)
            for _ in range(TURNS):
                for m in found:
                    if not m.refused:
                        for case, milliseconds in timed(direction, widest, m.tile).items():
                            m.milliseconds.setdefault(case, []).append(milliseconds)
            yield found


def winner(found: Sequence[Measurement]) -> Measurement | None:
    """The fastest of a width and direction, if it beats the table's tile, the first, by enough."""
    today, *others = found
    if today.refused:
        return None
    faster = [m for m in others if not m.refused and m.speedup(today) > THRESHOLD]
    return max(faster, key=lambda m: m.speedup(today), default=None)


def with_winners(arch: int, measured: Iterable[Sequence[Measurement]]) -> Table:
    """The table of attention's directions with what won."""
    merged = {d: widths for d, widths in table(arch).items() if d in ALTERNATIVES[arch]}
    for found in measured:
        if best := winner(found):
            merged[best.direction] = merged[best.direction] | {best.widest: best.tile}
    return {d: dict(sorted(widths.items())) for d, widths in merged.items()}


def source(arch: int, tuned: Table, about: str) -> str:
    """A module in the form of `kernels/core/tiles.py`, of one architecture's attention."""
    lines = [f'"""Tiles of {about}."""', "", "from kernels.core.tiles import Table, Tile", ""]
    lines += ["HALF_PRECISION: dict[int, Table] = {", f"    {arch}: {{"]
    for direction, widths in tuned.items():
        lines.append(f'        "{direction}": {{')
        lines += [f"            {widest}: {_spelled(tile)}," for widest, tile in widths.items()]
        lines.append("        },")
    return "\n".join([*lines, "    },", "}", ""])


def _spelled(tile: Tile) -> str:
    numbers = [n for n in dataclasses.astuple(tile) if n is not None]
    return f"Tile({', '.join(map(str, numbers))})"


def report(measured: Iterable[Sequence[Measurement]]) -> str:
    """A line per tile: its times, how it compares with the table's, whether it wins."""
    lines = []
    for found in measured:
        best = winner(found)
        for m in found:
            line = f"{m.direction:14}{m.widest:4}  {_spelled(m.tile):26}"
            if m.refused:
                lines.append(line + m.refused)
                continue
            times = (f"{case} {statistics.median(t):.3f}" for case, t in m.milliseconds.items())
            compared = "" if found[0].refused else f"{m.speedup(found[0]):.3f}x"
            lines.append(f"{line}{compared} {', '.join(times)} ms{' wins' * (m is best)}")
    return "\n".join(lines)


def write(folder: Path, arch: int, measured: Sequence[Sequence[Measurement]]) -> None:
    """Leave tiles.json and tiles.py in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "ptxas": get_ptxas(arch).version}
    rows = [
        dataclasses.asdict(m) | {"wins": m is winner(found)} for found in measured for m in found
    ]
    title = ", ".join(f"{name} {value}" for name, value in about.items())
    for name, text in {
        "tiles.json": json.dumps({**about, "arch": arch, "rows": rows}, indent=1) + "\n",
        "tiles.py": source(arch, with_winners(arch, measured), title),
    }.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)


def checked_cases(direction: Direction, widest: int) -> list[Case]:
    """Small problems that reach a tile: short windows and biases have one of their own."""
    windows = (90, 300) if direction == "short_forward" else (None, 700)
    return [
        dataclasses.replace(case, window_size=window, **_length(case, 2, 900))
        for case in _cases(direction, widest)
        for window in windows
    ]


def timed_cases(direction: Direction, widest: int) -> list[Case]:
    """Problems that fill the GPU."""
    windows = (128, 256) if direction == "short_forward" else (None, 1024)
    return [
        dataclasses.replace(
            case, name=f"{case.name}-{window or 'causal'}", window_size=window,
            **_length(case, 4, 8192 if widest == 64 else 4096),
        )
        for case in _cases(direction, widest)
        for window in windows
    ]  # fmt: skip


def _cases(direction: Direction, widest: int) -> list[Case]:
    """What models have in these columns: the rotary part of MLA counts, biases are a decay's."""
    plain = AttentionCase(f"{widest}", q_heads=9, k_heads=3, width=widest)
    if direction in tiles.BIASED.values():
        return [dataclasses.replace(plain, bias=1.0)]
    mla = {
        96: LatentCase("64+32", heads=9),
        192: LatentCase("128+64", heads=16, nope=128, rope=64, v_width=128),
    }
    return [plain, mla[widest]] if widest in mla else [plain]


def _length(case: Case, batch: int, tokens: int) -> dict[str, Any]:
    return {"batch": batch, "q_tokens" if isinstance(case, AttentionCase) else "tokens": tokens}


def attend(case: Case, impl: Any, **inputs: Any) -> Tensor:
    """The op of a case."""
    op: Any = kernels.attention if isinstance(case, AttentionCase) else kernels.latent_attention
    o: Tensor = op(**inputs, **case.arguments, impl=impl)
    return o


class Tuner:
    """Checks and times tiles on a device."""

    def __init__(self, arch: int, device: str = "cuda") -> None:
        self.arch, self.device = arch, device
        self._setting = cache(self._new_setting)

    def check(self, direction: Direction, widest: int, tile: Tile) -> str:
        """What is wrong with the results of a tile, or nothing."""
        try:
            with using(self.arch, direction, widest, tile):
                for case in checked_cases(direction, widest):
                    torch.manual_seed(0)
                    assert_parity(
                        lambda case=case, **inputs: {"o": attend(case, "triton", **inputs)},
                        lambda case=case, **inputs: {"o": attend(case, "eager", **inputs)},
                        case.inputs(torch.bfloat16, self.device),
                    )
        except Exception as failure:  # of the compiler, of the launch, or wrong
            return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        return ""

    def time(self, direction: Direction, widest: int, tile: Tile) -> dict[str, float]:
        """Milliseconds of the op whose kernel takes a tile, by case."""
        op = "forward" if direction.endswith("forward") else "backward"
        found = {}
        with using(self.arch, direction, widest, tile):
            for case in timed_cases(direction, widest):
                run, leaves, do = self._setting(case)
                found[case.name] = 1e3 * median_seconds(training_call(run, leaves, do, op), ROUNDS)
        return found

    def _new_setting(self, case: Case) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
        torch.manual_seed(0)
        inputs = case.inputs(torch.bfloat16, self.device)
        leaves = [x.requires_grad_() for x in inputs.values() if x is not None]

        def run() -> Tensor:
            return attend(case, "triton", **inputs)

        return run, leaves, torch.randn_like(run().detach())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu_results"))
    parser.add_argument("--budget-s", type=float, default=200.0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: needs a CUDA GPU")
        return 1
    arch = tiles.architecture(torch.device("cuda"))
    if arch not in ALTERNATIVES:
        print(f"tune: no candidates for sm_{arch}")
        return 1
    tuner, measured = Tuner(arch), []
    for found in measure(arch, tuner.check, tuner.time, arguments.budget_s):
        measured.append(found)
        print(report([found]), flush=True)
        write(arguments.output, arch, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
