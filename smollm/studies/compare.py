"""What a study's runs say: which belong together, which differ beyond their spread, by how much.

Runs that differ in their seed alone are one group. A group stands for its variant at one point of
the study; where the learning rate was swept, each variant is compared at its best one.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from smollm.studies.fields import NOTHING
from smollm.training.record import Run, title_of

LEVEL = 0.95  # of intervals


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    mechanism: str  # as the runs' own
    point: dict[str, Any]  # what sets it apart from the others of that name
    runs: list[Run]

    @property
    def title(self) -> str:
        """What tables, plots and verdicts call it."""
        varied = (f"{name}={_shown(value)}" for name, value in self.point.items())
        return " ".join((title_of(self.mechanism), *varied))

    @property
    def finished(self) -> list[Run]:
        """The runs that finished."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def label(self) -> str:
        """Its title, and how runs ended that did not finish."""
        ends = [run.status for run in self.runs if run.status != "finished"]
        if not ends:
            return self.title
        if len(self.runs) == 1:
            return f"{self.title} ({ends[0]})"
        counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
        return f"{self.title} ({counts} of {len(self.runs)})"

    def values(self, name: str) -> list[float]:
        """A field of the runs that finished, or else of all, where it was measured."""
        found = [getattr(run, name) for run in self.finished or self.runs]
        return [float(value) for value in found if value is not None and math.isfinite(value)]

    def mean(self, name: str) -> float | None:
        """The mean of a field; None where no run measured it."""
        values = self.values(name)
        return sum(values) / len(values) if values else None

    def spread(self, name: str) -> float | None:
        """The sample standard deviation of a field; None of fewer than two runs."""
        values = self.values(name)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def by_seed(self, name: str) -> dict[Any, float]:
        """A field of the runs that finished, by seed."""
        return {
            seed_of(run): float(getattr(run, name))
            for run in self.finished
            if getattr(run, name) is not None
        }


class Difference(NamedTuple):
    """By how much the loss of one group is below another's, in nats per token."""

    ours: Group
    theirs: Group
    mean: float
    low: float | None  # ends of the interval; None where no spread is known
    high: float | None
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.low > 0

    def __str__(self) -> str:
        ours, theirs = self.ours.title, self.theirs.title
        if self.low is None:
            return f"{ours} ends {self.mean:.4f} below {theirs}; one seed says nothing of spread"
        interval = f"{LEVEL:.0%} interval {self.low:.4f} to {self.high:.4f}, {self.seeds} seeds"
        if self.clear:
            return f"{ours} is better than {theirs} by {self.mean:.4f} ({interval})"
        return f"{ours} and {theirs} are within the spread: {self.mean:.4f} apart ({interval})"


class PowerLaw(NamedTuple):
    """loss = floor + scale * tokens ** -exponent, and the points that it was fitted to."""

    floor: float
    scale: float
    exponent: float
    points: tuple[tuple[float, float], ...]

    def tokens(self, loss: float) -> float:
        """With how many the law reaches a loss; inf where it never does."""
        if loss <= self.floor:
            return math.inf
        return float(((loss - self.floor) / self.scale) ** (-1 / self.exponent))

    def __str__(self) -> str:
        points = ", ".join(f"{loss:.4f} at {tokens:,.0f}" for tokens, loss in self.points)
        return (
            f"loss = {self.floor:.4f} + {self.scale:.4g} tokens^-{self.exponent:.4f}, "
            f"fitted to {points}"
        )


class SpeedUp(NamedTuple):
    """How many times a group's tokens, or its time, the baseline needs to reach its loss."""

    group: Group
    tokens: float
    time: float | None
    extrapolated: bool  # its loss is outside the baseline's points

    def __str__(self) -> str:
        times = "" if self.time is None else f", {self.time:.2f}x at equal time"
        beyond = "; outside the points, so extrapolated" if self.extrapolated else ""
        return f"{self.group.title}: {self.tokens:.2f}x at equal tokens{times}{beyond}"


def seed_of(run: Run) -> Any:
    """A run's seed; None of one that did not come to have a config."""
    return (run.config or {}).get("seed", run.seed)


def group(runs: Sequence[Run]) -> list[Group]:
    """The groups of runs, in the order of their first ones."""
    found: dict[Any, Group] = {}
    for run in runs:
        same = [other.config for other in runs if other.mechanism == run.mechanism and other.config]
        config = run.config or {}
        names = [n for n in config if n != "seed" and any(o.get(n) != config[n] for o in same)]
        point = {name: _key(config[name]) for name in names} if config else run.point
        key = run.mechanism, tuple(point.items())
        found.setdefault(key, Group(run.mechanism, point, [])).runs.append(run)
    return list(found.values())


def at_their_best(groups: Sequence[Group]) -> list[Group]:
    """The groups, but of those that differ in the learning rate alone that of the lowest loss."""
    found: dict[Any, Group] = {}
    for each in groups:
        key = each.mechanism, tuple((n, v) for n, v in each.point.items() if n != "lr")
        other = found.get(key)
        if other is None or _loss(each) < _loss(other):
            found[key] = each
    return list(found.values())


def differences(groups: Sequence[Group]) -> list[Difference]:
    """Of every pair of groups that finished at the same tokens, the one of lower loss first."""
    ranked = sorted((each for each in groups if each.finished), key=_loss)
    pairs = itertools.combinations(ranked, 2)
    return [_difference(*pair) for pair in pairs if len({g.mean("tokens") for g in pair}) == 1]


def power_law(points: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """The law of least squares through (tokens, loss); None without three points of falling loss.

    For each floor the rest is a line in logarithms; of the floors the one of the least error wins.
    """
    points = sorted(points)
    falling = all(later[1] < earlier[1] for earlier, later in itertools.pairwise(points))
    if len({tokens for tokens, _ in points}) < 3 or not falling:
        return None
    tokens, losses = np.array(points).T
    best = None
    low, high = 0.0, float(losses.min())
    for _ in range(4):  # each time between the neighbours of the best floor
        floors = np.linspace(low, high, 201)[:-1]
        fits = []
        for floor in floors:
            slope, intercept = np.polyfit(np.log(tokens), np.log(losses - floor), 1)
            error = losses - floor - np.exp(intercept) * tokens**slope
            fits.append((float(error @ error), floor, math.exp(intercept), -slope))
        index = min(range(len(fits)), key=lambda i: fits[i][0])
        best = fits[index]
        low, high = floors[max(0, index - 1)], (*floors, high)[index + 1]
    assert best is not None
    return PowerLaw(float(best[1]), best[2], float(best[3]), tuple(points))


def speed_ups(groups: Sequence[Group]) -> tuple[PowerLaw | None, list[SpeedUp]]:
    """The baseline's law over its budgets, and the speed-up of each other group against it.

    The baseline is the first group's variant, at its best at each number of tokens; without three
    such numbers there is no law.
    """
    best = [each for each in at_their_best(groups) if each.finished]
    if not best:
        return None, []
    ours = [each for each in best if each.mechanism == groups[0].mechanism]
    frontier: dict[float, Group] = {}
    for each in ours:
        tokens = each.mean("tokens") or 0.0
        if tokens not in frontier or _loss(each) < _loss(frontier[tokens]):
            frontier[tokens] = each
    law = power_law([(tokens, _loss(each)) for tokens, each in frontier.items()])
    if law is None:
        return None, []
    rates = [rate for each in frontier.values() if (rate := each.mean("tokens_per_second"))]
    losses = [loss for _, loss in law.points]
    found = []
    for each in best:
        if each.mechanism != groups[0].mechanism:
            factor = law.tokens(_loss(each)) / (each.mean("tokens") or math.nan)
            rate = each.mean("tokens_per_second")
            time = factor * rate * len(rates) / sum(rates) if rates and rate else None
            inside = min(losses) <= _loss(each) <= max(losses)
            found.append(SpeedUp(each, factor, time, not inside))
    return law, found


@cache
def student_t(level: float, freedom: int) -> float:
    """The t with which `level` of Student's distribution lies in [-t, t].

    With t = sqrt(freedom) tan(angle) the density is cos(angle) ** (freedom - 1).
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    inside = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, inside / inside[-1], angles)))


def _difference(ours: Group, theirs: Group) -> Difference:
    """Seed by seed where two seeds or more are shared; else of means, by Welch's interval."""
    mine, others = ours.by_seed("val_loss"), theirs.by_seed("val_loss")
    shared = sorted(mine.keys() & others.keys(), key=str)
    if len(shared) > 1:
        pairs = np.array([others[seed] - mine[seed] for seed in shared])
        mean, error = float(pairs.mean()), float(pairs.std(ddof=1)) / math.sqrt(len(pairs))
        freedom, seeds = len(pairs) - 1, len(pairs)
    else:
        mean, seeds = _loss(theirs) - _loss(ours), min(len(mine), len(others))
        if seeds < 2:
            return Difference(ours, theirs, mean, None, None, seeds)
        parts = [np.var(list(x.values()), ddof=1) / len(x) for x in (mine, others)]
        error = math.sqrt(sum(parts))
        bound = sum(p**2 / (len(x) - 1) for p, x in zip(parts, (mine, others), strict=True))
        freedom = max(1, int(sum(parts) ** 2 / bound)) if bound else 1
    reach = student_t(LEVEL, freedom) * error
    return Difference(ours, theirs, mean, mean - reach, mean + reach, seeds)


def _loss(each: Group) -> float:
    """The mean validation loss of the runs that finished; inf without one."""
    values = each.by_seed("val_loss").values()
    return sum(values) / len(values) if values else math.inf


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    """As a grid has it."""
    if isinstance(value, tuple):
        return "+".join(map(_shown, value)) or NOTHING
    return f"{value:g}" if isinstance(value, float) else str(value)
