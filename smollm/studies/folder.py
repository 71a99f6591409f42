"""The folder of a study's results: whose it is, and which files there are ours."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smollm.attention import MECHANISMS
from smollm.files import locked
from smollm.training.record import log_file, model_file

RESULTS = Path("ablation_results.json")
REPORT = Path("report.md")
LOSS_PLOT = Path("loss.png")
BARS_PLOT = Path("speed_and_memory.png")


@contextmanager
def claimed(folder: Path, overwrite: bool) -> Iterator[None]:
    """Hold a folder for one study, made if it is not there.

    Raises:
        ValueError: it cannot be written, or holds another study's files and not `overwrite`.
        BlockingIOError: another process's study is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{_EXPECTED}, got {folder} ({error.strerror})") from error
    for path in (folder, *(folder / file.parent for file in _files())):
        if path.exists() and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            what = "no write permission" if path.is_dir() else "a file"
            raise ValueError(f"{_EXPECTED}, got {path} ({what})")
    for file in _files():
        if (folder / file).is_dir():
            raise ValueError(f"{_EXPECTED}, got {folder} with a folder {file} in it")
    with locked(folder):
        older = [str(file) for file in _files() if os.path.lexists(folder / file)]
        if older and not overwrite:
            raise ValueError(
                f"output_dir: expected a folder without another study's files, got {folder} with "
                f"{', '.join(older)}; give another --output-dir, or --overwrite to replace them"
            )
        yield


def clear(folder: Path) -> None:
    """Remove an older study's files, and no others."""
    for file in _files():
        if os.path.lexists(folder / file):
            (folder / file).unlink()
            if file.parent.name:
                with suppress(OSError):  # someone else's files are in it
                    (folder / file.parent).rmdir()


_EXPECTED = "output_dir: expected a folder that can be written"


def _files() -> list[Path]:
    """Every file that a study may write."""
    files = [RESULTS, REPORT, LOSS_PLOT, BARS_PLOT]
    for mechanism in MECHANISMS:
        files += [model_file(mechanism), log_file(mechanism)]
    return files
