"""The folder of a study's results: whose it is, and which files there are ours.

Names of variants are free, so that a file like a run's is ours only where study.toml or the results
name its variant, or where it is named after mechanisms.
"""

import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from smollm.data.tokenizer import TOKENIZER_FILE
from smollm.files import locked
from smollm.studies.plan_file import PLAN
from smollm.studies.variants import of_mechanisms, variant_of
from smollm.training.record import Run, checkpoint_folder, log_file, model_file
from smollm.training.state import checkpoint_files

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
        ValueError: it cannot be written, or holds another study's files and neither is allowed, or
            files of others where the runs' belong.
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
        ours = _variants(folder)
        others = [f for name in names if not _is_ours(name, ours) for f in _run_files(folder, name)]
        if others:
            raise ValueError(
                f"output_dir: expected no files but a study's where {', '.join(names)} go, got "
                f"{folder} with {', '.join(map(str, others[:12]))}, which no study there names; "
                "move them, or give another --output-dir"
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

    return sorted(name for name in names if variant_of(name) and has_weights(name))


def clear(folder: Path) -> None:
    """Remove an older study's files, and no others."""
    for file in reversed(_files(folder)):  # last those that name the others
        (folder / file).unlink()
        for parent in file.parents[:-1]:
            with suppress(OSError):  # files are still in it, ours or someone else's
                (folder / parent).rmdir()


_EXPECTED = "output_dir: expected a folder that can be written"


def _files(folder: Path) -> list[Path]:
    """Every file in a folder that a study wrote, by its path inside."""
    found = [file for file in OWN if os.path.lexists(folder / file)]
    ours = _variants(folder)
    names = {path.name.removesuffix(model_file("").name) for path in folder.iterdir()}
    for name in sorted(names):
        if _is_ours(name, ours):
            found += _run_files(folder, name)
    return found


def _variants(folder: Path) -> set[str]:
    """What a folder's study.toml and results say was trained; a damaged file says nothing."""
    damaged = OSError, ValueError, KeyError, TypeError
    said = []
    with suppress(*damaged):
        said.append(tomllib.loads((folder / PLAN).read_text(encoding="utf-8"))["variants"])
    with suppress(*damaged):
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        said.append(results["config"]["variants"])
    lists = [names for names in said if isinstance(names, list)]
    return {name for names in lists for name in names if isinstance(name, str)}


def _is_ours(name: str, variants: set[str]) -> bool:
    """Whether a run's name is of one of the variants, or named after mechanisms."""
    variant = variant_of(name)
    return variant is not None and (variant in variants or of_mechanisms(variant))


def _run_files(folder: Path, name: str) -> list[Path]:
    """The files that stand where a run's do."""
    found = [model_file(name)] if (folder / model_file(name)).is_file() else []
    checkpoints = checkpoint_files(folder / checkpoint_folder(name))
    found += [file.relative_to(folder) for file in sorted(checkpoints)]
    return found + [log_file(name)] * os.path.lexists(folder / log_file(name))
