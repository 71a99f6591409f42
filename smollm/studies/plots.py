"""A study's plots."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from smollm.attention import MECHANISMS
from smollm.files import write_atomically
from smollm.training.record import Run

Points = list[tuple[int, float]]  # (tokens, loss)


def plot_loss(path: Path, runs: list[Run]) -> None:
    """Loss against tokens: a line a run, or a mechanism's mean and range over several runs.

    The loss axis spans the second half of training, where the differences are; a cross marks
    where a run ended that did not finish.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lines = [line for run in runs for line in (_smoothed(run), _validated(run))]
    low, high = _limits([point for line in lines for point in line])
    axes.set_ylim(low, high)
    for mechanism in dict.fromkeys(run.mechanism for run in runs):
        same = [run for run in runs if run.mechanism == mechanism]
        _plot_mechanism(axes, same, MECHANISMS[mechanism].color, high)
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss: training, smoothed (faint), and validation (marked)")
    axes.grid(alpha=0.3)
    if runs:
        axes.legend()
    _save(figure, path)


def plot_bars(path: Path, runs: list[Run]) -> None:
    """Throughput and memory of each run that measured them."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bars = [
        ("tokens_per_second", 1.0, "training throughput", "tokens per second"),
        ("peak_memory_bytes", 2**20, "peak memory that a run adds", "MiB"),
    ]
    for axes, (name, unit, title, label) in zip(panels, bars, strict=True):
        measured = [run for run in runs if getattr(run, name) is not None]
        drawn = axes.bar(
            [run.label for run in measured],
            [getattr(run, name) / unit for run in measured],
            color=[MECHANISMS[run.mechanism].color for run in measured],
        )
        axes.bar_label(drawn, fmt="{:,.0f}")
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    _save(figure, path)


def _plot_mechanism(axes: Axes, runs: list[Run], color: str, top: float) -> None:
    """Validation as one line, a lone run's training as a faint one, a cross where a run ended."""
    for run in runs:
        line = _smoothed(run)
        if len(runs) == 1:
            axes.plot(*_columns(line), color=color, alpha=0.35, linewidth=1)
        if run.status != "finished" and line:
            tokens, loss = line[-1]
            axes.plot(
                tokens, min(loss, top), "X", color=color, markersize=11, clip_on=False, zorder=5
            )
    validated = [dict(_validated(run)) for run in runs]
    shared = sorted(set.intersection(*(set(points) for points in validated)))
    values = [[points[tokens] for points in validated] for tokens in shared]
    label = ", ".join(dict.fromkeys(run.label for run in runs))
    means = [sum(v) / len(v) for v in values]
    axes.plot(shared, means, color=color, marker="o", markersize=4, label=label)
    if len(runs) > 1:
        axes.fill_between(shared, [*map(min, values)], [*map(max, values)], color=color, alpha=0.2)


def _smoothed(run: Run) -> Points:
    """Training loss, each point the mean of the latest tenth of the records before it."""
    records = [record for record in run.history if math.isfinite(record.loss)]
    width = max(1, len(records) // 10)
    points = []
    for end in range(1, len(records) + 1):
        latest = records[max(0, end - width) : end]
        points.append((latest[-1].tokens, sum(r.loss for r in latest) / len(latest)))
    return points


def _validated(run: Run) -> Points:
    return [
        (record.tokens, record.val_loss)
        for record in run.history
        if record.val_loss is not None and math.isfinite(record.val_loss)
    ]


def _limits(points: Points) -> tuple[float, float]:
    """The range of losses in the second half of the tokens, with a margin."""
    if not points:
        return 0.0, 1.0
    half = max(tokens for tokens, _ in points) / 2
    late = [loss for tokens, loss in points if tokens >= half]
    margin = 0.08 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [tokens for tokens, _ in points], [loss for _, loss in points]


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)
