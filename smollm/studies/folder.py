"""The folder of a study's results: whose it is, and which files there are ours."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from smollm.attention import MECHANISMS
from smollm.data.tokenizer import TOKENIZER_FILE
from smollm.files import locked
from smollm.studies.plan_file import PLAN
from smollm.training.record import Run, checkpoint_folder, log_file, model_file
from smollm.training.state import checkpoint_files

RUN = re.compile(rf"({'|'.join(MECHANISMS)})(-\w+=[A-Za-z0-9.+_-]+)*", re.ASCII)
RESULTS = Path("ablation_results.json")
REPORT = Path("report.md")
PAGE = Path("report.html")
LOSS_PLOT = Path("loss.png")
BARS_PLOT = Path("speed_and_memory.png")
TRADE_OFF_PLOT = Path("trade_offs.png")
RATES_PLOT = Path("learning_rates.png")
TOKENIZER = Path(TOKENIZER_FILE)
OWN = (RESULTS, PLAN, TOKENIZER, REPORT, PAGE, LOSS_PLOT, BARS_PLOT, TRADE_OFF_PLOT, RATES_PLOT)


@contextmanager
def claimed(folder: Path, names: Sequence[str], *, overwrite: bool, resume: bool) -> Iterator[None]:
    """Hold a folder for one study, made if it is not there.

    Args:
        folder: the study's.
        names: of its runs.
        overwrite: it may hold another study's files.
        resume: it holds this study's.

    Raises:
        ValueError: it cannot be written, or holds another study's files and neither is allowed.
        BlockingIOError: another process's study is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{_EXPECTED}, got {folder} ({error.strerror})") from error
    folders = [path for name in names for path in (Path(name), checkpoint_folder(name))]
    for path in (folder, *(folder / inner for inner in folders)):
        if path.exists() and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            what = "no write permission" if path.is_dir() else "a file"
            raise ValueError(f"{_EXPECTED}, got {path} ({what})")
    for file in (*OWN, *(file(name) for name in names for file in (log_file, model_file))):
        if (folder / file).is_dir():
            raise ValueError(f"{_EXPECTED}, got {folder} with a folder {file} in it")
    with locked(folder):
        older = [str(file) for file in _files(folder)]
        if older and not overwrite and not resume:
            shown = ", ".join(older[:12]) + (", ..." if len(older) > 12 else "")
            raise ValueError(
                f"output_dir: expected a folder without another study's files, got {folder} with "
                f"{shown}; give another --output-dir, --resume {folder} to go on with that study, "
                "or --overwrite to replace its files"
            )
        yield


def read_runs(folder: Path) -> dict[str, Run]:
    """The runs whose results stand in a folder, by name; none where it has no results.

    Raises:
        ValueError: they are damaged, or of another version.
    """
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Run.of(plain) for name, plain in content["runs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a study's results, got {error!r}") from error


def trained(folder: Path) -> list[str]:
    """The names of the runs that have weights or checkpoints in a folder."""
    names = {path.name.removesuffix(model_file("").name) for path in folder.iterdir()}

    def has_weights(name: str) -> bool:
        checkpoints = checkpoint_files(folder / checkpoint_folder(name))
        return bool(checkpoints) or (folder / model_file(name)).is_file()

    return sorted(name for name in names if RUN.fullmatch(name) and has_weights(name))


def clear(folder: Path) -> None:
    """Remove an older study's files, and no others."""
    for file in _files(folder):
        (folder / file).unlink()
        for parent in file.parents[:-1]:
            with suppress(OSError):  # files are still in it, ours or someone else's
                (folder / parent).rmdir()


_EXPECTED = "output_dir: expected a folder that can be written"


def _files(folder: Path) -> list[Path]:
    """Every file in a folder that a study wrote, by its path inside."""
    found = [file for file in OWN if os.path.lexists(folder / file)]
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(model_file("").name)
        if name != path.name and RUN.fullmatch(name) and path.is_file():
            found.append(Path(path.name))
        if RUN.fullmatch(path.name) and path.is_dir():
            checkpoints = checkpoint_files(folder / checkpoint_folder(path.name))
            found += [file.relative_to(folder) for file in sorted(checkpoints)]
            if os.path.lexists(folder / log_file(path.name)):
                found.append(log_file(path.name))
    return found
