"""What a cell's loss is worth in tokens and in time: how much of them MHA needs for it.

`python -m bench.studies.mga.equal_time steps FILE...` times a training step of each cell of a
study's file, in turns on a machine that does nothing else, and writes steps.json beside this one.
`python -m bench.studies.mga.equal_time table SMALL LAW` sets the losses of the folder SMALL
against the law that MHA follows there and over the other budgets of the folder LAW, as Markdown.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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


class Law(NamedTuple):
    """loss = floor + scale tokens^-power."""

    floor: float
    scale: float
    power: float

    @classmethod
    def through(cls, tokens: float, losses: Sequence[float]) -> "Law":
        """The one through three losses: at so many tokens, at twice and at four times as many.

        Raises:
            ValueError: they do not fall, or do so ever faster.
        """
        first, second, third = losses
        if not first - second > second - third > 0:
            raise ValueError(f"losses: expected them to fall ever slower, got {list(losses)}")
        power = math.log2((first - second) / (second - third))
        scale = (first - second) / (tokens**-power - (2 * tokens) ** -power)
        return cls(first - scale * tokens**-power, scale, power)

    def tokens(self, loss: float) -> float:
        """After how many it is reached, which may be never."""
        left = (loss - self.floor) / self.scale
        return left ** (-1 / self.power) if left > 0 else math.inf


def law_of(small: Cells, law: Path) -> Law:
    """What MHA follows, by the seeds that the folder of its other budgets has.

    Raises:
        ValueError: they are not half and twice the budget of the small study, of the same seeds.
    """
    found: dict[int, dict[int, float]] = {}
    for run in (*read_runs(law).values(), *small[BASELINE].runs):
        if run.status == "finished" and run.val_loss is not None and run.config is not None:
            found.setdefault(run.tokens, {})[run.config["seed"]] = run.val_loss
    budgets = sorted(found)
    seeds = set.intersection(*map(set, found.values()))
    if len(budgets) != 3 or not seeds or budgets != [budgets[0] << n for n in range(3)]:
        raise ValueError(f"{law}: expected three budgets, each twice the last, got {budgets}")
    losses = [statistics.mean(found[budget][seed] for seed in seeds) for budget in budgets]
    return Law.through(budgets[0], losses)


def table(cells: Cells, law: Law, milliseconds: dict[str, float]) -> list[str]:
    """A row for each cell, the most valuable first.

    Past twice the cells' own tokens, where no run was, the law's word is extrapolated, and says so.

    Raises:
        ValueError: no step of a cell was timed.
    """
    if missing := sorted(set(cells) - set(milliseconds)):
        raise ValueError(f"steps: expected a time of every cell, got none of {', '.join(missing)}")
    (budget,) = {run.tokens for each in cells.values() for run in each.runs}
    rows = []
    for name, each in cells.items():
        needed = law.tokens(each.mean("val_loss") or math.nan) / budget
        slower = milliseconds[name] / milliseconds[BASELINE]
        tokens = f"{needed:.2f}" + " (extrapolated)" * (needed > 2)
        row = f"| `{name}` | {milliseconds[name]:.0f} | {tokens} | {needed / slower:.2f} |"
        rows.append((-needed / slower, row))
    head = "| cell | ms a step | tokens that MHA needs, of the cell's | time, likewise |"
    return [head, "|:--|--:|--:|--:|", *(row for _, row in sorted(rows))]


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
    command.add_argument("law", type=Path, help="the folder of MHA's other budgets")
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
            print("\n".join(table(cells, law_of(cells, given.law), milliseconds)))
    except (OSError, ValueError) as error:
        print(f"equal_time: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
