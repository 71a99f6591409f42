"""A study's plots."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from smollm.attention import MECHANISMS
from smollm.files import write_atomically
from smollm.studies.compare import Group
from smollm.training.record import Record, Run

Points = list[tuple[float, float]]
LINES = ("-", "--", ":", "-.")  # of a variant's groups
MARKERS = "os^Dvp<h>*P"
PALETTE = (  # of variants that no mechanism is named as, whose colors are others
    "#a463f2", "#17b8c4", "#9c6b4e", "#ff8ab7", "#7a8b1f", "#1f2a6b", "#97bbf5", "#b0125b",
    "#0f5c4d", "#9498a0",
)  # fmt: skip


class Look(NamedTuple):
    """How a group is drawn."""

    color: str
    line: str
    marker: str


def plot_loss(path: Path, groups: Sequence[Group]) -> None:
    """Loss against tokens and against seconds of training: a line a group, with its range.

    The loss axis spans the second half of training, where the differences are; a cross marks
    where a run ended that did not finish.
    """
    figure, panels = plt.subplots(
        1, 2, figsize=(12, 5), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    by_tokens, by_seconds = panels
    alone = [each.runs[0] for each in groups if len(each.runs) == 1]
    lines = [_validated(run) for each in groups for run in each.runs]
    lines += [_smoothed(run) for run in alone]
    low, high = _limits([point for line in lines for point in line])
    by_tokens.set_ylim(low, high)
    for each, look in _looks(groups):
        _plot_group(by_tokens, each, look, high)
        _plot_validation(by_seconds, each, look, lambda record: record.seconds)
    by_tokens.set_xlabel("training tokens")
    by_tokens.xaxis.set_major_formatter(EngFormatter())
    by_tokens.set_ylabel("loss (nats per token)")
    seeds = len(alone) < len(groups)
    by_tokens.set_title(
        "validation (marked)"
        + ", mean and range over seeds" * seeds
        + ", and training, smoothed (faint)" * bool(alone)
    )
    by_seconds.set_xlabel("seconds of training")
    by_seconds.set_title("validation")
    for axes in panels:
        axes.grid(alpha=0.3)
    _add_legend(figure, by_tokens)
    _save(figure, path)


def plot_bars(path: Path, groups: Sequence[Group]) -> None:
    """Throughput and memory, a row for each group; none where nothing was measured."""
    height = 1.4 + 0.4 * len(groups)
    figure, panels = plt.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")
    bars = [
        ("tokens_per_second", 1.0, "training throughput", "tokens per second"),
        ("peak_memory_bytes", 2**20, "peak memory that a run adds", "MiB"),
    ]
    for axes, (name, unit, title, label) in zip(panels, bars, strict=True):
        for row, (each, look) in enumerate(_looks(groups)):
            mean = each.mean(name)
            if mean is not None:
                axes.bar_label(axes.barh(row, mean / unit, color=look.color), fmt=" {:,.0f}")
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.margins(x=0.2)
    panels[0].set_yticks(range(len(groups)), [each.label for each in groups])
    panels[0].invert_yaxis()
    _save(figure, path)


def plot_trade_offs(path: Path, groups: Sequence[Group]) -> None:
    """Validation loss against throughput and against cache, and what no other group betters."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    sides = [
        ("tokens_per_second", True, "training tokens per second"),
        ("cache_bytes_per_token", False, "cache bytes per token"),
    ]
    for axes, (name, more, label) in zip(panels, sides, strict=True):
        found: list[tuple[float, float]] = []
        for each, look in _looks(groups):
            x, y, error = each.mean(name), each.mean("val_loss"), each.spread("val_loss")
            if not each.finished or x is None or y is None:
                continue
            axes.errorbar(
                x, y, yerr=error, color=look.color, linestyle="none", marker=look.marker,
                markersize=7, capsize=3, label=each.title,
            )  # fmt: skip
            found.append((x, y))
        edge = _pareto(found, more)
        axes.plot(*_columns(edge), color="gray", linewidth=1, zorder=0, linestyle="--")
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.margins(x=0.1, y=0.15)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle("Dashed: what no other one betters in both")
    _add_legend(figure, panels[0])
    _save(figure, path)


def plot_rates(path: Path, groups: Sequence[Group]) -> None:
    """Validation loss against the learning rate, a line for what differs in it alone."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    swept: dict[Any, list[Group]] = {}
    for each in groups:
        key = each.mechanism, tuple((n, v) for n, v in each.point.items() if n != "lr")
        same = swept.setdefault(key, [])
        if "lr" in each.point and each.finished:
            same.append(each)
    heads = [Group(variant, dict(point), []) for variant, point in swept]
    for (head, look), same in zip(_looks(heads), swept.values(), strict=True):
        same.sort(key=lambda each: float(each.point["lr"]))
        if not same:
            continue
        axes.errorbar(
            [float(each.point["lr"]) for each in same],
            [each.mean("val_loss") or math.nan for each in same],
            yerr=[each.spread("val_loss") or 0.0 for each in same],
            color=look.color, linestyle=look.line, marker=look.marker, capsize=3, label=head.title,
        )  # fmt: skip
    rates = sorted({float(each.point["lr"]) for same in swept.values() for each in same})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    _add_legend(figure, axes)
    _save(figure, path)


def _looks(groups: Sequence[Group]) -> list[tuple[Group, Look]]:
    """Each group with a color of its variant, a line of its own there, and its own marker."""
    named = dict.fromkeys(each.mechanism for each in groups if each.mechanism not in MECHANISMS)
    places = {variant: divmod(index, len(PALETTE)) for index, variant in enumerate(named)}
    seen: Counter[str] = Counter()
    found = []
    for index, each in enumerate(groups):
        row = MECHANISMS.get(each.mechanism)
        again, place = (0, 0) if row else places[each.mechanism]
        line = LINES[(seen[each.mechanism] + again) % len(LINES)]
        seen[each.mechanism] += 1
        color = row.color if row else PALETTE[place]
        found.append((each, Look(color, line, MARKERS[index % len(MARKERS)])))
    return found


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Below the plots, for which the figure grows."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        width, height = figure.get_size_inches()
        columns = min(len(labels), max(1, int(11 * width) // (max(map(len, labels)) + 8)))
        figure.set_figheight(height + 0.25 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _plot_group(axes: Axes, each: Group, look: Look, top: float) -> None:
    """Validation as one line, a lone run's training as a faint one, a cross where a run ended."""
    for run in each.runs:
        line = _smoothed(run)
        if len(each.runs) == 1:
            axes.plot(
                *_columns(line), color=look.color, linestyle=look.line, alpha=0.35, linewidth=1
            )
        if run.status != "finished" and line:
            tokens, loss = line[-1]
            axes.plot(
                tokens, min(loss, top), "X", color=look.color, markersize=11, clip_on=False,
                zorder=5,
            )  # fmt: skip
    _plot_validation(axes, each, look, lambda record: record.tokens)


def _plot_validation(axes: Axes, each: Group, look: Look, place: Callable[[Record], float]) -> None:
    """The mean over the runs, step by step, and their range."""
    validated = [
        {r.step: r for r in run.history if r.val_loss is not None and math.isfinite(r.val_loss)}
        for run in each.runs
    ]
    validated = [records for records in validated if records] or [{}]
    shared = sorted(set.intersection(*(set(records) for records in validated)))
    places = [sum(place(v[step]) for v in validated) / len(validated) for step in shared]
    values = [[v[step].val_loss or 0.0 for v in validated] for step in shared]
    means = [sum(v) / len(v) for v in values]
    axes.plot(
        places, means, color=look.color, linestyle=look.line, marker=look.marker, markersize=5,
        label=each.label,
    )  # fmt: skip
    if len(validated) > 1:
        low, high = [*map(min, values)], [*map(max, values)]
        axes.fill_between(places, low, high, color=look.color, alpha=0.2, linewidth=0)


def _smoothed(run: Run) -> Points:
    """Training loss, each point the mean of the latest tenth of the records before it."""
    records = [record for record in run.history if math.isfinite(record.loss)]
    width = max(1, len(records) // 10)
    points: Points = []
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


def _pareto(points: Points, more: bool) -> Points:
    """The points that no other one betters: of more (or less) x and less y."""
    kept: Points = []
    for point in sorted(points, key=lambda p: (-p[0] if more else p[0], p[1])):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)
