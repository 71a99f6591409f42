"""Where a run's records go beside their file: a tracker that the user has installed."""

import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

from smollm.training.record import Record, Run

Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "smollm-attention"


class Sink(Protocol):
    """What takes the records of one run."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Write what is left."""


class _Nowhere:
    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, run: Run) -> None:
        self._writer = module.SummaryWriter(folder / "tensorboard" / run.name)

    def log(self, record: Record) -> None:
        for name, value in _measured(record).items():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """Trackio and Weights & Biases, which have one interface."""

    def __init__(self, module: Any, folder: Path, run: Run) -> None:
        self._module = module
        place = {"dir": str(folder)} if module.__name__ == "wandb" else {}
        module.init(project=PROJECT, name=f"{folder.name}/{run.name}", config=run.config, **place)

    def log(self, record: Record) -> None:
        self._module.log(_measured(record), step=record.step)

    def close(self) -> None:
        self._module.finish()


SINKS: dict[str, Callable[[Any, Path, Run], Sink]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Hosted,
    "wandb": _Hosted,
}


def check_tracker(name: Tracker) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ValueError: saying how it is.
    """
    if name != "none":
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise ValueError(
                f"log: expected {name} to be installed (`pip install {name}`), got {error}"
            ) from error


def open_tracker(name: Tracker, folder: Path, run: Run) -> Sink:
    """A sink for the records of a run; the study's folder holds what it writes."""
    if name == "none":
        return _Nowhere()
    return SINKS[name](importlib.import_module(MODULES[name]), folder, run)


def _measured(record: Record) -> dict[str, float]:
    """What a record has measured, without its step."""
    fields = asdict(record)
    del fields["step"]
    return {name: value for name, value in fields.items() if value is not None}
