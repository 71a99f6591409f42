"""The GPU's own clock for pytest-benchmark, and a cold L2."""

import time
from functools import cache

import torch

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
