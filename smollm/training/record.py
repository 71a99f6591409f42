"""What a run has measured, as tables, plots and files show it."""

import math
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smollm.attention import MECHANISMS


@dataclass
class Record:
    """One logged step; None where nothing was measured."""

    step: int
    tokens: int
    loss: float  # of the step's batch, nats per token
    lr: float
    gradient_norm: float  # before clipping
    tokens_per_second: float | None = None  # since the record before
    val_loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None

    @property
    def finite(self) -> bool:
        """Whether every measured number is."""
        return all(math.isfinite(x) for x in (self.loss, self.gradient_norm, self.val_loss or 0.0))


@dataclass
class Run:
    """What a run has measured so far; None where it did not come to that."""

    mechanism: str
    device: str  # "cpu" or "cuda"
    parameters: int | None = None
    flops_per_token: int | None = None  # forward and backward
    status: str = "running"  # then "finished", "interrupted", "diverged" or "failed"
    error: str | None = None  # why it diverged or failed
    traceback: str | None = None  # where it failed
    steps: int = 0  # that were taken
    tokens: int = 0
    train_loss: float | None = None  # mean of the records of the last tenth
    val_loss: float | None = None  # nats per token
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None  # of the GPU's datasheet bf16 rate
    first_step_seconds: float | None = None  # compilation included
    seconds: float | None = None
    peak_memory_bytes: int | None = None  # above what was in use before the model was built
    gradient_norm_mean: float | None = None  # of the steps after the warm-up, before clipping
    gradient_norm_max: float | None = None
    clipped_steps: int | None = None  # after the warm-up
    generation_tokens_per_second: float | None = None
    cache_bytes_per_token: int | None = None
    cache_dtype: str | None = None
    prompt: str | None = None
    sample: str | None = None  # what the model continued the prompt with
    history: list[Record] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        return MECHANISMS[self.mechanism].title

    @property
    def label(self) -> str:
        """Its title, and how it ended unless it finished."""
        return self.title if self.status == "finished" else f"{self.title} ({self.status})"

    @property
    def plain(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def take(self, measured: dict[str, Any]) -> None:
        """Keep measured values, by field."""
        for name, value in measured.items():
            setattr(self, name, value)

    def diverge(self, what: str) -> None:
        """End with status "diverged"."""
        self.status, self.error = "diverged", what

    def fail(self, error: BaseException) -> None:
        """End with status "failed" and the error's text."""
        self.status = "failed"
        self.error = traceback.format_exception_only(error)[0].splitlines()[0]
        self.traceback = "".join(traceback.format_exception(error))


def log_file(mechanism: str) -> Path:
    """Where in a study's folder a run's records are, one in a line."""
    return Path(mechanism) / "metrics.jsonl"


def model_file(mechanism: str) -> Path:
    """Where in a study's folder a run's weights are."""
    return Path(f"{mechanism}_model.pt")
