"""A study's table, winners and report."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from smollm.attention import MECHANISMS
from smollm.files import write_atomically
from smollm.studies import folder as places
from smollm.studies.plots import plot_bars, plot_loss
from smollm.training.record import Run

Format = Callable[[Any], str]
Noise = dict[str, tuple[float, int]]  # by device


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


COLUMNS: list[tuple[str, str, Format]] = [
    ("Model", "label", str),
    ("Loss", "val_loss", "{:.4f}".format),
    ("Perplexity", "perplexity", "{:,.2f}".format),
    ("Bits/byte", "bits_per_byte", "{:.4f}".format),
    ("Tok/s", "tokens_per_second", "{:,.0f}".format),
    ("Params", "parameters", "{:,}".format),
    ("Peak memory", "peak_memory_bytes", _mib),
    ("Gen tok/s", "generation_tokens_per_second", "{:,.0f}".format),
    ("Cache B/tok", "cache_bytes_per_token", "{:,}".format),
    ("Grad mean", "gradient_norm_mean", "{:.3f}".format),
    ("Grad max", "gradient_norm_max", "{:.3f}".format),
    ("Clipped", "clipped_steps", "{:,}".format),
]
NOTE = (
    "Loss is validation's, in nats per token. Peak memory is what the run adds. Gradient norms, "
    "before clipping, and clipped steps are those after the warm-up. A cache row lasts for a "
    "window where there is one."
)

# No winner is named by less than a part of the runner-up's figure or an amount, whichever is more.
# A GPU's allocations repeat exactly, while on a CPU later runs use again what the heap kept of the
# first one's, some 100 MiB. Throughput varies inside a run too; see `_apart`.
NOISE: dict[str, Noise] = {
    "tokens_per_second": {"cuda": (0.03, 0), "cpu": (0.25, 0)},
    "peak_memory_bytes": {"cuda": (0.01, 0), "cpu": (0.25, 128 * 2**20)},
}
ASPECTS = {
    "loss": ("val_loss", False),  # (field, whether more is better)
    "throughput": ("tokens_per_second", True),
    "memory": ("peak_memory_bytes", False),
}


def titles(runs: list[Run]) -> list[str]:
    """The names of the table's figures."""
    kinds = {run.cache_dtype for run in runs if run.cache_dtype is not None}
    kind = f" ({kinds.pop()})" if len(kinds) == 1 else ""
    return [title + (kind if title == "Cache B/tok" else "") for title, _, _ in COLUMNS]


def rows(runs: list[Run]) -> list[list[str]]:
    """The table's cells; a dash where a run measured nothing."""

    def cell(run: Run, name: str, form: Format) -> str:
        value = getattr(run, name)
        return "-" if value is None else form(value)

    return [[cell(run, name, form) for _, name, form in COLUMNS] for run in runs]


def table(runs: list[Run]) -> Table:
    """The comparison for a terminal, a column per model so that it fits 80 characters."""
    view = Table(title="Comparison", caption=NOTE)
    names, cells = titles(runs), rows(runs)
    view.add_column(names[0])
    for row in cells:
        view.add_column(row[0], justify="right")
    for index, title in enumerate(names[1:], start=1):
        view.add_row(title, *(row[index] for row in cells))
    return view


def best(runs: list[Run]) -> dict[str, str | None]:
    """The winner of each aspect that a finished run measured, None where noise decides it."""
    winners: dict[str, str | None] = {}
    for aspect, (name, more) in ASPECTS.items():
        measured = [
            (float(getattr(run, name)), run)
            for run in runs
            if run.status == "finished" and getattr(run, name) is not None
        ]
        ranked = sorted(
            (pair for pair in measured if math.isfinite(pair[0])),
            key=lambda pair: pair[0],
            reverse=more,
        )
        if ranked:
            clear = len(ranked) == 1 or _clear(name, *ranked[0], *ranked[1])
            winners[aspect] = ranked[0][1].mechanism if clear else None
    return winners


def _clear(name: str, first: float, winner: Run, second: float, runner_up: Run) -> bool:
    part, amount = NOISE.get(name, {}).get(winner.device, (0.0, 0))
    if name in NOISE and abs(first - second) <= max(part * second, amount):
        return False
    return name != "tokens_per_second" or _apart(winner, runner_up)


def _apart(winner: Run, runner_up: Run) -> bool:
    """Whether 3 in 4 stretches between two records are faster than 3 in 4 of the runner-up's."""
    slow, fast = (
        sorted(r.tokens_per_second for r in run.history if r.tokens_per_second is not None)
        for run in (winner, runner_up)
    )
    if min(len(slow), len(fast)) < 4:
        return False
    return slow[len(slow) // 4] > fast[-1 - len(fast) // 4]


def best_lines(runs: list[Run]) -> list[str]:
    """One sentence per aspect."""
    return [
        f"Best model by {aspect}: "
        + (MECHANISMS[name].title if name else "no clear winner, the gap is within noise")
        for aspect, name in best(runs).items()
    ]


def unfinished_lines(runs: list[Run]) -> list[str]:
    """One sentence per run that did not finish: how it ended, and why."""
    return [
        f"{run.title} {run.status} after {run.steps:,} steps" + (f": {run.error}" * bool(run.error))
        for run in runs
        if run.status != "finished"
    ]


def write_report(folder: Path, runs: list[Run], about: dict[str, str]) -> None:
    """Write report.md, loss.png and speed_and_memory.png into folder.

    Args:
        folder: an existing folder.
        runs: the runs in table order.
        about: facts for the head of the report, by name.
    """
    plot_loss(folder / places.LOSS_PLOT, runs)
    plot_bars(folder / places.BARS_PLOT, runs)
    names = titles(runs)
    lines = ["# Attention ablation", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| " + " | ".join(names) + " |"]
    lines += ["|:--" + "|--:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(runs)]
    lines += ["", NOTE, ""]
    lines += [f"- {line}" for line in (*unfinished_lines(runs), *best_lines(runs))]
    lines += ["", f"![Loss against tokens]({places.LOSS_PLOT})"]
    lines += ["", f"![Throughput and memory]({places.BARS_PLOT})"]
    sampled = [run for run in runs if run.sample is not None]
    if sampled:
        lines += ["", "## Samples", "", SAMPLES]
    for run in sampled:
        lines += ["", f"{run.title}:", "", "```text", sample_text(run), "```"]
    text = "\n".join(lines) + "\n"
    write_atomically(folder / places.REPORT, lambda file: file.write(text.encode()))


SAMPLES = (
    "Greedy continuations of one held-out prompt, which ends at `⟫`; `⏎` stands for a blank line."
)


def sample_text(run: Run) -> str:
    """A run's prompt and continuation, with marks where the prompt ends and for blank lines."""
    text = f"{run.prompt}⟫{run.sample}".replace("```", "` ` `")
    return "\n".join(line if line.strip() else "⏎" for line in text.split("\n"))
