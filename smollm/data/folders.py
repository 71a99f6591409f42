"""Where corpora stand: how one takes its place and harms nothing that is there."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from smollm.data.corpus import (
    ABOUT,
    PROGRESS,
    SHARD,
    TOKENIZER,
    VERIFIED,
    holds_corpus,
    read_manifest,
)
from smollm.data.hub import HUB_SHARDS
from smollm.data.names import AUTO, BUILTINS, NAME, check_name
from smollm.data.shards import is_shard
from smollm.files import LOCK, locked

BUILDING = ".building"
NEW, OLD = "new", "old"  # inside the folder that is being built: what comes and what goes


def check_new_name(name: str, own: str | None = None) -> None:
    """Refuse what no corpus of this kind may be called.

    Args:
        name: the corpus's.
        own: the name that is reserved for it.

    Raises:
        ValueError: it may not.
    """
    check_name(name)
    reserved = (AUTO, *BUILTINS)
    if name.lower() in reserved:
        raise ValueError(f"corpus: expected a name other than {reserved}, got {name!r}")
    if name.lower() in HUB_SHARDS and name != own:
        raise ValueError(
            f"corpus: expected a name of its own for data_files or dataset, got {name!r}, the hub's"
        )


def find_place(root: Path, name: str, *, replace: bool) -> Path:
    """Where a corpus goes: root / name, or where a link there leads.

    Args:
        root: folder of prepared corpora; need not exist.
        name: the corpus's.
        replace: it may take the place of a corpus.

    Raises:
        ValueError: something stands there that it may not replace.
    """
    link = root / name
    if link.is_symlink() and not link.exists():
        raise ValueError(f"corpus: expected a folder, got {link}, a link that leads nowhere")
    place = link.resolve()
    nearest = next(path for path in place.parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"root: expected a folder that can be written to, got {str(nearest)!r}")
    if place.exists():
        _check_replaceable(place, link, replace=replace)
    return place


@contextmanager
def build(place: Path, *, wait: bool = False) -> Iterator[Path]:
    """A folder beside a place, in which to build what `settle` then moves there.

    One process at a time holds it. Of what one left that ended early, whole shards stay for the
    next, if there are any; the rest is cleared, and an interrupted replacement is undone.

    Args:
        place: where the corpus will stand.
        wait: for another process that builds it, instead of refusing.

    Yields:
        A folder, empty but for what is to go on from; gone once it was moved.

    Raises:
        BlockingIOError: another process builds it; the text names the process.
        OSError: nothing can be written there.
    """
    created = [path for path in (place.parent, *place.parent.parents) if not path.exists()]
    for leftover in place.parent.glob(f".*{BUILDING}"):
        if leftover.is_dir() and (leftover / LOCK).is_file() and _stranger(leftover) is None:
            with suppress(OSError), locked(leftover):
                _clear(leftover)
            _remove_empty(leftover)
    building = place.with_name(f".{place.name}{BUILDING}")
    if building.exists() and (stranger := _stranger(building)) is not None:
        raise ValueError(f"{building}: expected what a preparation left, got also {stranger}")
    try:
        with ExitStack() as held:
            try:
                held.enter_context(locked(building, wait=wait))
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"corpus: expected a name that nobody is preparing, got {place.name!r}: {error}"
                ) from None
            held.callback(_clear, building)
            _clear(building)
            (building / NEW).mkdir(exist_ok=True)
            yield building / NEW
    finally:
        for path in (building, *created):
            _remove_empty(path)


def settle(new: Path, place: Path) -> None:
    """Move what `build` gave to its place; a corpus that stood there goes once that is done."""
    if place.exists():
        place.rename(new.with_name(OLD))
    new.rename(place)


def unfinished(root: Path, name: str) -> Path | None:
    """Where the whole shards of a preparation that ended early are, if it left any."""
    link = root / name
    if not NAME.fullmatch(name) or (link.is_symlink() and not link.exists()):
        return None
    place = link.resolve()
    new = place.with_name(f".{place.name}{BUILDING}") / NEW
    return new if (new / PROGRESS).is_file() else None


def _check_replaceable(place: Path, shown: Path, *, replace: bool) -> None:
    """Only a folder that holds a corpus of ours, and nothing else, is ever replaced."""
    remedy = "move it away, or choose another name"
    if not place.is_dir():
        raise ValueError(f"corpus: expected a folder, got {shown}, a file; {remedy}")
    stranger = next((path for path in place.iterdir() if not _is_part(path)), None)
    with suppress(OSError, ValueError):  # a damaged corpus.json lists nothing
        listed = read_manifest(place).files
        shards = (path for path in place.iterdir() if SHARD.fullmatch(path.name))
        stranger = stranger or next((path for path in shards if path.name not in listed), None)
    if stranger is not None:
        raise ValueError(
            f"corpus: expected a corpus in {shown} and nothing else, got also {stranger.name!r}; "
            f"{remedy}"
        )
    if not holds_corpus(place) and not (shown.name in BUILTINS and _was_corpus(place)):
        raise ValueError(
            f"corpus: expected a corpus in {shown}, got a folder without a {ABOUT} of ours; "
            f"{remedy}"
        )
    if not replace:
        raise ValueError(
            f"corpus: expected a new name, got {shown.name!r}, which is prepared; --replace "
            "prepares it again"
        )


def _is_part(path: Path, *more: str) -> bool:
    """Whether a file in a corpus's folder is one that preparing or opening it writes."""
    name = re.sub(r"^\.(.+)\.\w+\.tmp$", r"\1", path.name)  # a killed process's write_atomically
    known = (ABOUT, TOKENIZER, VERIFIED, *more)
    return path.is_file() and (name in known or SHARD.fullmatch(name) is not None)


def _was_corpus(place: Path) -> bool:
    """Whether a folder is empty, or holds a shard though its corpus.json is damaged."""
    paths = list(place.iterdir())
    return not paths or any(SHARD.fullmatch(path.name) and is_shard(path) for path in paths)


def _stranger(building: Path) -> Path | None:
    """Anything in a building folder that `build` does not put there."""
    with suppress(FileNotFoundError):  # its process may be ending
        for path in building.iterdir():
            if path.name in (NEW, OLD) and path.is_dir() and not path.is_symlink():
                strangers = (part for part in path.iterdir() if not _is_part(part, PROGRESS))
                if (stranger := next(strangers, None)) is not None and stranger.exists():
                    return stranger
            elif path.name != LOCK:
                return path
    return None


def _clear(building: Path) -> None:
    """Remove what was built unless it can go on, and what was replaced once that has its place."""
    place = building.with_name(building.name[1 : -len(BUILDING)])
    old = building / OLD
    if old.exists() and not place.exists():
        old.rename(place)
    new = building / NEW
    for folder in (old,) if (new / PROGRESS).is_file() else (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
