"""The verdicts of plan.md, read off the runs.

`python -m bench.studies.mga.verdicts SMALL LARGE RECALL [--figure cells.png]` prints them and their
tables as Markdown from the folders of the three studies, or from what there is of them yet, and
draws what all three have.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from bench.studies.mga.recall import RESULTS, Bounds
from smollm.studies.compare import Group, differences, group
from smollm.studies.folder import read_runs

MATTERS = 0.01  # nats per token
ENOUGH = 0.9  # of what can be recalled
BASELINE, SUBJECT = "mha", "mga"
NEAR = ("mha-decay", "mha-forget", "mha-window")  # that are biased towards near tokens
ENVIRONMENTS = ("mga", "mga-kin", "mga-none")
PARTS = {  # what is left out, by the control, and beside which cell
    "fitness": ("mga-unfit", "mga"),
    "fitness, without an environment": ("mga-uniform", "mga-none"),
    "the environment": ("mga-none", "mga"),
    "a pressure that learns": ("mga-pressure", "mga"),
    "rotation": ("mga-still", "mga"),
}

Cells = dict[str, Group]


class Gap(NamedTuple):
    """How far the loss of one cell lies above another's, with the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        """Whether the first is clearly worse."""
        return self.low > 0 and self.mean >= MATTERS

    @property
    def below(self) -> bool:
        """Whether the first is clearly better."""
        return self.high < 0 and self.mean <= -MATTERS

    @property
    def equal(self) -> bool:
        """Whether it is too small to matter, as far as can be told."""
        return self.low >= -MATTERS and self.high <= MATTERS

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def gap(cells: Cells, first: str, second: str) -> Gap:
    """The first cell's loss less the second's, seed by seed; of one seed nothing is known of it."""
    (found,) = differences([cells[first], cells[second]])
    low = -math.inf if found.low is None else found.low
    high = math.inf if found.high is None else found.high
    if found.ours is cells[first]:
        return Gap(-found.mean, -high, -low)
    return Gap(found.mean, low, high)


def against_locality(sizes: Sequence[Cells]) -> str:
    """Whether MGA is better than the MHAs that are biased towards near tokens."""
    ours = (SUBJECT, "mga-kin")
    if any(all(gap(c, each, near).below for c in sizes for near in NEAR) for each in ours):
        return "better"
    for near in NEAR:
        if all(gap(c, near, each).below for c in sizes for each in ours):
            return f"not better: {near} is clearly below both"
        if all(gap(c, near, min(ours, key=lambda each: _mean(c, each))).equal for c in sizes):
            return f"not better: {near} is equal to the better one"
    return "undecided"


def kept(environment: str, sizes: Sequence[Cells], recalled: dict[str, float]) -> bool:
    """Whether an environment earns its place."""
    others = [each for each in ENVIRONMENTS if each != environment]
    lower = [o for o in others if all(gap(c, o, environment).below for c in sizes)]
    alone = recalled.get(environment, 0.0) >= ENOUGH
    return not lower or (alone and all(recalled.get(o, 1.0) < 0.5 for o in lower))


def worth(control: str, whole: str, sizes: Sequence[Cells], recalled: dict[str, float]) -> str:
    """Whether what a control lacks works."""
    gaps = [gap(cells, control, whole) for cells in sizes]
    lost = recalled.get(whole, math.nan) - recalled.get(control, math.nan)
    if all(g.above for g in gaps) or lost > 0.1:
        return "works"
    if all(g.equal or g.below for g in gaps) and lost <= 0.05:
        return "idle"
    return "unknown"


def cells_of(folder: Path) -> Cells:
    """The groups of a study's finished runs, by variant.

    Raises:
        ValueError: there are none, or those of a variant differ in more than their seeds.
    """
    runs = [run for run in read_runs(folder).values() if run.status == "finished"]
    if not runs:
        raise ValueError(f"{folder}: expected finished runs, got none")
    found: Cells = {}
    for each in group(runs):
        if each.mechanism in found:
            raise ValueError(f"{folder}: expected {each.mechanism} at one point, got {each.title}")
        found[each.mechanism] = each
    return found


def recalled_of(cells: Cells, bounds: Bounds) -> dict[str, list[float]]:
    """The share of what can be recalled that each run of a cell recalls at its end, by cell."""
    return {
        name: [bounds.recalled(loss) for loss in each.by_seed("val_loss").values()]
        for name, each in cells.items()
    }


def tables(sizes: dict[str, Cells], recall: Cells, bounds: Bounds) -> Iterator[str]:
    """The lines of all tables, and the verdicts where both sizes are done."""
    for size, cells in sizes.items():
        yield from ("", f"**{size}**: validation loss at the end, nats per token", "")
        yield "| cell | parameters | rate | loss | seeds | above `mha` | above `mga` |"
        yield "|:--|--:|--:|--:|--:|--:|--:|"
        for name in sorted(cells, key=lambda name: _mean(cells, name)):
            yield _row(cells, name)
    shares = recalled_of(recall, bounds)
    if shares:
        yield from ("", "**recall**: share of what can be recalled", "")
        yield f"| cell | rate | mean | least | most | of seeds past {ENOUGH} | by step (median) |"
        yield "|:--|--:|--:|--:|--:|--:|--:|"
    for name, values in sorted(shares.items(), key=lambda item: -sum(item[1])):
        steps = _steps_to(recall[name], bounds)
        when = f"{statistics.median(steps):.0f}" if steps else "-"
        yield (
            f"| `{name}` | {_rate(recall[name])} | {statistics.mean(values):.3f} | "
            f"{min(values):.3f} | {max(values):.3f} | {len(steps)} of {len(values)} | {when} |"
        )
    if len(sizes) > 1:
        mean = {name: statistics.mean(values) for name, values in shares.items()}
        both = list(sizes.values())
        yield from ("", f"- MGA against MHA with locality: {against_locality(both)}")
        for each in ENVIRONMENTS:
            yield f"- environment of `{each}`: {'kept' if kept(each, both, mean) else 'dropped'}"
        for part, (control, whole) in PARTS.items():
            found = worth(control, whole, both, mean)
            yield f"- {part} (`{whole}` less it is `{control}`): {found}"


def _row(cells: Cells, name: str) -> str:
    each = cells[name]
    beside = [
        "" if other == name or other not in cells else str(gap(cells, name, other))
        for other in (BASELINE, SUBJECT)
    ]
    loss = f"{_mean(cells, name):.4f} ± {each.spread('val_loss') or math.nan:.4f}"
    count = f"{each.runs[0].parameters or 0:,}"
    return (
        f"| `{name}` | {count} | {_rate(each)} | {loss} | {len(each.runs)} | {' | '.join(beside)} |"
    )


def _steps_to(each: Group, bounds: Bounds) -> list[int]:
    """The first validation at which a run recalls enough, of those that do."""
    passed = (
        [r.step for r in run.history if r.val_loss and bounds.recalled(r.val_loss) >= ENOUGH]
        for run in each.runs
    )
    return [min(steps) for steps in passed if steps]


def _mean(cells: Cells, name: str) -> float:
    return cells[name].mean("val_loss") or math.nan


def _rate(each: Group) -> str:
    return f"{(each.runs[0].config or {}).get('lr', math.nan):g}"


def draw(sizes: dict[str, Cells], recalled: dict[str, list[float]], path: Path) -> None:
    """A row for each cell, the best of the last size on top, a panel for each size and recall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    last = list(sizes.values())[-1]
    names = sorted(last, key=lambda name: -_mean(last, name))
    figure, panels = plt.subplots(
        1, len(sizes) + 1, figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    for panel, (size, cells) in zip(panels, sizes.items(), strict=False):
        base = cells[SUBJECT].by_seed("val_loss")
        for row, name in enumerate(names):
            if name in cells:
                losses = cells[name].by_seed("val_loss")
                _dots(panel, row, [loss - base[seed] for seed, loss in losses.items()])
                if name != SUBJECT:
                    mean, low, high = gap(cells, name, SUBJECT)
                    panel.errorbar(mean, row, xerr=[[mean - low], [high - mean]], color="C0",
                                   capsize=3, fmt="|")  # fmt: skip
        panel.axvline(0, color="0.6", linewidth=1)
        panel.set(title=size, xlabel=f"nats above {SUBJECT}")
    for row, name in enumerate(names):
        _dots(panels[-1], row, recalled.get(name, []))
    panels[-1].set(title="recall", xlabel="share recalled", xlim=(-0.03, 1.03))
    panels[0].set_yticks(range(len(names)), names)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _dots(panel: Any, row: int, values: Sequence[float]) -> None:
    panel.plot(values, [row] * len(values), "o", color="C1", markersize=4, alpha=0.6)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.mga.verdicts")
    for name in ("small", "large", "recall"):
        parser.add_argument(name, type=Path, nargs="?", metavar=name.upper(), help="its folder")
    parser.add_argument("--figure", type=Path, help="also draw all cells here, of all three")
    given = parser.parse_args(argv)
    if given.figure and not given.recall:
        parser.error("--figure: expected all three folders")
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    bounds = Bounds(**{field.name: known[field.name] for field in fields(Bounds)})
    try:
        folders = {name: path for name in ("small", "large") if (path := getattr(given, name))}
        sizes = {name: cells_of(path) for name, path in folders.items()}
        recall = cells_of(given.recall) if given.recall else {}
    except (ValueError, OSError) as error:
        print(f"verdicts: {error}", file=sys.stderr)
        return 2
    print("\n".join(tables(sizes, recall, bounds)))
    if given.figure:
        draw(sizes, recalled_of(recall, bounds), given.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
