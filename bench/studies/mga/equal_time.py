"""What a cell's loss is worth in tokens and in time: how much of them MHA needs for it.

`python -m bench.studies.mga.equal_time steps FILE...` times a training step of each cell of a
study's file, in turns on a machine that does nothing else, and writes steps.json beside this one.
`python -m bench.studies.mga.equal_time table SMALL OTHER` sets the losses of the folder SMALL
against those of MHA there and at the budgets of the folder OTHER, as Markdown.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.bench_cpu import training_step, turns
from bench.results import machine
from bench.studies.mga.verdicts import BASELINE, Cells, cells_of
from smollm.files import write_json
from smollm.model.build import build_model
from smollm.studies import plan
from smollm.studies.folder import read_runs
from smollm.training.config import Config
from smollm.training.metrics import cpu_name

STEPS = Path(__file__).with_name("steps.json")
VOCABULARY = 4096


class Curve(NamedTuple):
    """The losses of a model by its budget of tokens, both in the order of budgets."""

    tokens: list[int]
    losses: list[float]

    def reaches(self, loss: float) -> float:
        """After how many tokens a loss is reached, between budgets linear in their logarithm.

        Beyond the last budget it is infinite, before the first one nan.
        """
        if loss < self.losses[-1]:
            return math.inf
        logs = np.log(self.tokens)
        found = np.interp(-loss, -np.array(self.losses), logs, left=math.nan)
        return math.exp(found)


def curve_of(small: Cells, other: Path) -> Curve:
    """MHA's, by the seeds that the folder of its other budgets has.

    Raises:
        ValueError: the folder has none of it, or losses do not fall with tokens.
    """
    found: dict[int, dict[int, float]] = {}
    for run in (*read_runs(other).values(), *small[BASELINE].runs):
        if run.status == "finished" and run.val_loss is not None and run.config is not None:
            found.setdefault(run.tokens, {})[run.config["seed"]] = run.val_loss
    seeds = set.intersection(*map(set, found.values()))
    if len(found) < 2 or not seeds:
        raise ValueError(f"{other}: expected other budgets of the same seeds, got {sorted(found)}")
    budgets = sorted(found)
    losses = [statistics.mean(found[budget][seed] for seed in seeds) for budget in budgets]
    if any(after >= before for before, after in pairwise(losses)):
        raise ValueError(f"{other}: expected losses that fall with tokens, got {losses}")
    return Curve(budgets, losses)


def table(cells: Cells, curve: Curve, milliseconds: dict[str, float]) -> list[str]:
    """A row for each cell, the most valuable first; those below MHA's first budget have no figure.

    Raises:
        ValueError: no step of a cell was timed.
    """
    if missing := sorted(set(cells) - set(milliseconds)):
        raise ValueError(f"steps: expected a time of every cell, got none of {', '.join(missing)}")
    (budget,) = {run.tokens for each in cells.values() for run in each.runs}
    # MHA needs its own tokens for its own loss, though the curve is of fewer seeds.
    shift = curve.losses[curve.tokens.index(budget)] - _mean(cells, BASELINE)
    rows = []
    for name in cells:
        needed = curve.reaches(_mean(cells, name) + shift) / budget
        worth = needed * milliseconds[BASELINE] / milliseconds[name]
        rows.append(
            (-worth, f"| `{name}` | {milliseconds[name]:.0f} | {needed:.2f} | {worth:.2f} |")
        )
    head = "| cell | ms a step | tokens that MHA needs, of the cell's | time, likewise |"
    return [head, "|:--|--:|--:|--:|", *(row for _, row in sorted(rows))]


def _mean(cells: Cells, name: str) -> float:
    return cells[name].mean("val_loss") or math.nan


def step_milliseconds(config: Config, rounds: int) -> dict[str, float]:
    """The median of each cell's steps, which take turns."""
    train, calls = config.train, {}
    ids = torch.randint(VOCABULARY, (train.batch_size, train.seq_len))
    for cell in plan.cells(replace(config, seeds=())):
        calls[cell.variant] = training_step(
            build_model(cell.variant, cell.config.model, VOCABULARY), ids
        )
    seconds = turns(calls, rounds, most_seconds=math.inf)
    return {name: 1e3 * statistics.median(each) for name, each in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.mga.equal_time")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("steps")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="of a study")
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--output", type=Path, default=STEPS)
    command = commands.add_parser("table")
    command.add_argument("small", type=Path, help="the study's folder")
    command.add_argument("other", type=Path, help="the folder of MHA's other budgets")
    command.add_argument("--steps", type=Path, default=STEPS)
    given = parser.parse_args(argv)
    try:
        if given.command == "steps":
            configs = [plan.parse(["study", str(path)]) for path in given.files]
            milliseconds: dict[str, float] = {}
            for config in configs:
                milliseconds |= step_milliseconds(config, given.rounds)
            about = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **machine()}
            write_json(given.output, {**about, "milliseconds": milliseconds})
        else:
            cells = cells_of(given.small)
            milliseconds = json.loads(given.steps.read_text(encoding="utf-8"))["milliseconds"]
            print("\n".join(table(cells, curve_of(cells, given.other), milliseconds)))
    except (OSError, ValueError) as error:
        print(f"equal_time: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
