"""A study's table, plots and report."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from rich.table import Table

from smollm.attention import MECHANISMS
from smollm.files import write_atomically
from smollm.training.run import Run

Format = Callable[[Any], str]


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


COLUMNS: list[tuple[str, str, Format]] = [
    ("Model", "title", str),
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
]
NOTE = "Loss is validation's, in nats per token; a cache row lasts for a window where there is one."


def rows(runs: list[Run]) -> list[list[str]]:
    """The table's cells; a dash where a run measured nothing."""

    def cell(run: Run, name: str, form: Format) -> str:
        value = getattr(run, name)
        text = "-" if value is None else form(value)
        return f"{text} ({run.status})" if name == "title" and run.status != "finished" else text

    return [[cell(run, name, form) for _, name, form in COLUMNS] for run in runs]


def table(runs: list[Run]) -> Table:
    """The comparison for a terminal, a column per model so that it fits 80 characters."""
    view = Table(title="Comparison", caption=NOTE)
    cells = rows(runs)
    view.add_column(COLUMNS[0][0])
    for row in cells:
        view.add_column(row[0], justify="right")
    for index, (title, _, _) in enumerate(COLUMNS[1:], start=1):
        view.add_row(title, *(row[index] for row in cells))
    return view


def best(runs: list[Run]) -> dict[str, str]:
    """The winner by loss, throughput and memory, among runs that finished."""
    fields = {
        "loss": ("val_loss", min),
        "throughput": ("tokens_per_second", max),
        "memory": ("peak_memory_bytes", min),
    }
    winners: dict[str, str] = {}
    for aspect, (name, choose) in fields.items():
        measured = {
            run.mechanism: float(getattr(run, name))
            for run in runs
            if run.status == "finished" and getattr(run, name) is not None
        }
        finite = {k: v for k, v in measured.items() if math.isfinite(v)}
        if finite:
            winners[aspect] = choose(finite, key=lambda k: finite[k])
    return winners


def best_lines(runs: list[Run]) -> list[str]:
    """One sentence per winner."""
    return [
        f"Best model by {aspect}: {MECHANISMS[name].title}" for aspect, name in best(runs).items()
    ]


def write_report(folder: Path, runs: list[Run], about: dict[str, str]) -> None:
    """Write report.md, loss.png and speed_and_memory.png into folder.

    Args:
        folder: an existing folder.
        runs: the runs in table order.
        about: facts for the head of the report, by name.
    """
    _plot_loss(folder / "loss.png", runs)
    _plot_bars(folder / "speed_and_memory.png", runs)
    titles = [title for title, _, _ in COLUMNS]
    lines = ["# Attention ablation", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| " + " | ".join(titles) + " |"]
    lines += ["|:--" + "|--:" * (len(titles) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(runs)]
    lines += ["", NOTE, "", *(f"- {line}" for line in best_lines(runs))]
    lines += ["", "![Loss against tokens](loss.png)"]
    lines += ["", "![Throughput and memory](speed_and_memory.png)"]
    samples = [run for run in runs if run.sample]
    if samples:
        lines += ["", "## Samples", "", "Greedy continuations of one held-out prompt."]
    for run in samples:
        quoted = (run.sample or "").replace("```", "` ` `")
        lines += ["", f"{run.title}:", "", "```text", quoted, "```"]
    text = "\n".join(lines) + "\n"
    write_atomically(folder / "report.md", lambda file: file.write(text.encode()))


def _plot_loss(path: Path, runs: list[Run]) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        color = MECHANISMS[run.mechanism].color
        tokens = [record["tokens"] for record in run.history]
        axes.plot(tokens, [record["loss"] for record in run.history], color=color, alpha=0.35)
        checked = [record for record in run.history if "val_loss" in record]
        axes.plot(
            [record["tokens"] for record in checked],
            [record["val_loss"] for record in checked],
            color=color,
            marker="o",
            label=run.title,
        )
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss: training (faint), validation (marked)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _plot_bars(path: Path, runs: list[Run]) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bars = [
        ("tokens_per_second", 1.0, "training throughput", "tokens per second"),
        ("peak_memory_bytes", 2**20, "peak memory", "MiB"),
    ]
    for axes, (name, unit, title, label) in zip(panels, bars, strict=True):
        measured = [run for run in runs if getattr(run, name) is not None]
        drawn = axes.bar(
            [run.title for run in measured],
            [getattr(run, name) / unit for run in measured],
            color=[MECHANISMS[run.mechanism].color for run in measured],
        )
        axes.bar_label(drawn, fmt="{:,.0f}")
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)
