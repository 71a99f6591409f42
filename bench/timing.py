"""The GPU's own clock for pytest-benchmark, a cold L2, and how training is timed."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3 if torch.cuda.is_available() else 0  # rounds that are not timed
FLUSHED_BYTES = 1 << 30  # past any L2, and long enough on its way to hide the next launch


class Instant:
    """A point on the GPU's stream; the difference of two waits for the later one."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def __sub__(self, earlier: "Instant") -> float:
        """Seconds since an earlier point."""
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def clock() -> Instant | float:
    """Now, on the GPU where there is one."""
    return Instant() if torch.cuda.is_available() else time.perf_counter()


@cache
def _scratch() -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")


def flush_l2() -> None:
    """Overwrite what L2 holds; the GPU is busy with it while the next launch is prepared."""
    if torch.cuda.is_available():
        _scratch().zero_()


def training_call(
    attend: Callable[[], Tensor], leaves: Sequence[Tensor], do: Tensor, direction: str
) -> Callable[[], Any]:
    """What "forward" or "backward" of a function of the leaves runs when it is timed."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attend()

    if direction == "forward":
        return forward
    o = attend()
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def median_seconds(call: Callable[[], Any], rounds: int, warmup_rounds: int = 3) -> float:
    """The median of so many rounds, L2 flushed before each, without pytest-benchmark."""
    for _ in range(warmup_rounds):
        call()
    instants: list[tuple[Any, Any]] = []
    for _ in range(rounds):
        flush_l2()
        begin = clock()
        call()
        instants.append((begin, clock()))
    return statistics.median(float(end - begin) for begin, end in instants)


def time_training(
    benchmark: Any,
    attend: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    do: Tensor,
    direction: str,
    about: dict[str, Any],
    rounds: int,
) -> None:
    """Time "forward" or "backward" of a function of the leaves, and note what it is about."""
    benchmark.group = f"{about['case']} {direction}"
    benchmark.extra_info.update(about, direction=direction)
    call = training_call(attend, leaves, do, direction)
    benchmark.pedantic(call, setup=flush_l2, rounds=rounds, warmup_rounds=WARM_UP)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory on the CPU that the call holds at once beyond what was there."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    held = most = 0
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
