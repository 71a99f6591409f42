"""`python train.py export RUN --to DIR`: a trained run as transformers loads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smollm.studies import OK
from smollm.studies.choice import Choice

if TYPE_CHECKING:
    from smollm.studies.trained import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Export(Choice):
    """Write a run's weights and tokenizer as a folder of Hugging Face's transformers."""

    to: Path
    """Folder to write, which is new or empty."""


def main(argv: Sequence[str]) -> int:
    """Run `train.py export`; returns its exit status.

    Raises:
        ValueError, OSError: what is refused. SystemExit: flags that are none.
    """
    given = Export.parse(argv)
    run = given.open()
    architecture = export(run, given.to)
    print(f"{run.path}, {run.steps:,} steps, as {architecture} in {given.to}/")
    return OK


def export(run: "TrainedRun", folder: Path) -> str:
    """Write what `smollm.hf.save_hf` does, with the run's tokenizer; returns the architecture.

    Raises:
        ValueError: no architecture carries the run's model, the folder holds something, or
            transformers is not installed.
    """
    from smollm.data.tokenizer import END_OF_TEXT
    from smollm.hf import save_hf

    end = run.about.get("eos_id")
    named = None if end is None else run.tokenizer.id_to_token(end)
    try:
        return save_hf(run.model, folder, tokenizer=run.tokenizer, eos_token=named or END_OF_TEXT)
    except FileExistsError as error:
        raise ValueError(f"to: expected a folder that is new or empty, got {folder}") from error
    except ImportError as error:
        raise ValueError(error) from error
