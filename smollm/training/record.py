"""What a run has measured, as tables, plots and files show it."""

import math
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from smollm.attention import MECHANISMS


@dataclass
class Record:
    """One logged step; None where nothing was measured."""

    step: int
    tokens: int
    loss: float  # of the step's batch, nats per token
    lr: float
    gradient_norm: float  # before clipping
    seconds: float  # of training until here, without validations and checkpoints
    tokens_per_second: float | None = None  # since the record before
    val_loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """The record of these plain values."""
        return cls(**_not_finite(plain))

    @property
    def finite(self) -> bool:
        """Whether every measured number is."""
        return all(math.isfinite(x) for x in (self.loss, self.gradient_norm, self.val_loss or 0.0))


@dataclass
class Run:
    """What a run has measured so far; None where it did not come to that.

    Its plain values continue it: `Run.of` takes back what `plain` gave.
    """

    mechanism: str  # the variant's name, which a mechanism's is and others may be
    device: str  # "cpu" or "cuda"
    name: str = ""  # of its files; the mechanism's by default
    point: dict[str, str] = field(default_factory=dict)  # what a grid varies
    seed: int | None = None  # where a study has several
    config: dict[str, Any] | None = None  # all that its result depends on, by name
    parameters: int | None = None
    flops_per_token: int | None = None  # forward and backward
    status: str = "running"  # then "finished", "interrupted", "diverged" or "failed"
    error: str | None = None  # why it diverged or failed
    traceback: str | None = None  # where it failed
    steps: int = 0  # that were taken
    tokens: int = 0
    loss: float = math.nan  # of the last step that was read, in nats per token
    gradient_norm: float = math.nan  # of that step
    train_loss: float | None = None  # mean of the records of the last tenth
    val_loss: float | None = None  # nats per token
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    train_seconds: float = 0.0  # without validations and checkpoints
    timed_steps: int = 0  # those behind tokens_per_second: not the first ones
    timed_seconds: float = 0.0
    loader_seconds: float = 0.0  # of all steps, waited for their batches
    mfu: float | None = None  # of the GPU's datasheet rate for the type of the forward pass
    first_step_seconds: float | None = None  # compilation included
    compile_seconds: float = 0.0  # of all steps
    seconds: float | None = None
    peak_memory_bytes: int | None = None  # above what was in use before the model was built
    gradient_norm_mean: float | None = None  # of the steps after the warm-up, before clipping
    gradient_norm_max: float | None = None
    clipped_steps: int | None = None  # after the warm-up
    generation_tokens_per_second: float | None = None  # after a short prompt
    inference: list[dict[str, float | None]] = field(default_factory=list)  # by context
    cache_bytes_per_token: int | None = None
    cache_dtype: str | None = None
    prompt: str | None = None
    sample: str | None = None  # what the model continued the prompt with
    history: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or self.mechanism

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        seed = () if self.seed is None else (f"seed {self.seed}",)
        varied = (f"{name}={value}" for name, value in self.point.items())
        return " ".join((title_of(self.mechanism), *varied, *seed))

    @property
    def done(self) -> bool:
        """Whether training it again would only repeat it."""
        return self.status in ("finished", "diverged")

    @property
    def label(self) -> str:
        """Its title, and how it ended unless it finished."""
        return self.title if self.status == "finished" else f"{self.title} ({self.status})"

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """The run of these plain values.

        Raises:
            TypeError: fields that are none.
        """
        history = [Record.of(record) for record in plain["history"]]
        return cls(**_not_finite(plain) | {"history": history})

    @property
    def plain(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def take(self, measured: dict[str, Any]) -> None:
        """Keep measured values, by field."""
        for name, value in measured.items():
            setattr(self, name, value)

    def count_norm(self, norm: float, count: int, clip: float) -> None:
        """Take the gradient norm of a step after the warm-up, the count-th, into the statistics."""
        mean = self.gradient_norm_mean or 0.0
        self.gradient_norm_mean = mean + (norm - mean) / count
        self.gradient_norm_max = max(norm, self.gradient_norm_max or 0.0)
        self.clipped_steps = (self.clipped_steps or 0) + (norm > clip)

    def diverge(self, what: str) -> None:
        """End with status "diverged"."""
        self.status, self.error = "diverged", what

    def fail(self, error: BaseException) -> None:
        """End with status "failed" and the error's text."""
        self.status = "failed"
        self.error = traceback.format_exception_only(error)[0].splitlines()[0]
        self.traceback = "".join(traceback.format_exception(error))


def title_of(variant: str) -> str:
    """What tables and plots call a variant: the mechanisms that it is named after, or its name."""
    names = variant.split("+")
    known = [MECHANISMS[name].title for name in names if name in MECHANISMS]
    return "+".join(known) if len(known) == len(names) else variant


def _not_finite(plain: dict[str, Any]) -> dict[str, Any]:
    """JSON writes null for a number that is not finite."""
    names = ("loss", "gradient_norm")
    return plain | {name: math.nan for name in names if plain.get(name) is None}


def log_file(name: str) -> Path:
    """Where in a study's folder the records of a run are, one in a line."""
    return Path(name) / "metrics.jsonl"


def checkpoint_folder(name: str) -> Path:
    """Where in a study's folder a run's checkpoints are."""
    return Path(name) / "checkpoints"


def model_file(name: str) -> Path:
    """Where in a study's folder a run's weights are."""
    return Path(f"{name}_model.pt")
