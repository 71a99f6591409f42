"""The flags that choose a trained run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import tyro

from smollm.attention.options import check_range

if TYPE_CHECKING:
    from smollm.studies.trained import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A run; what a command takes besides is a field of a class derived from it."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Weights that a study saved, or a study's folder."""
    variant: str | None = None
    """Which run, where the folder has several: its name, or its variant's if that has one run."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        """Read the flags of the command that has the class's name.

        Raises:
            ValueError: a value out of its range. SystemExit: flags that are none.
        """
        given = tyro.cli(cls, prog=f"train.py {cls.__name__.lower()}", args=argv)
        check_range(given)
        return given

    def open(self, device: str = "cpu") -> "TrainedRun":
        """Load the run; raises what `open_run` does."""
        from smollm.studies.trained import open_run

        return open_run(self.run, self.variant, device)
