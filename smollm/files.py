"""Files that are either whole or absent, and folders that one process at a time writes to."""

import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

LOCK = ".lock"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file of its own beside path, then move it there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is moved to path once the block ends, and removed if it fails.

    Raises:
        OSError: path holds something.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield staged
        staged.chmod(0o777 & ~_umask())
        staged.replace(path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write value as indented JSON, atomically; see `json_text`."""
    text = json_text(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def json_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON: numbers that are not finite become null, paths become strings."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder, made if need be, against other processes; it is free when they end.

    Args:
        folder: what to hold, by a file in it that goes with the lock.
        wait: until another process lets go, instead of refusing.

    Raises:
        BlockingIOError: another process holds it; the text names the folder and the process.
    """
    with _lock_file(folder, wait) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def _lock_file(folder: Path, wait: bool) -> TextIO:
    """The folder's lock file, open and locked; its last holder may remove both meanwhile."""
    for _ in range(1000):
        try:
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
            file = (folder / LOCK).open("a+")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
            file.close()
        except FileNotFoundError:
            file.close()
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise BlockingIOError(
                f"{folder}: expected a folder of its own, got one that process {holder} writes to"
            ) from None
        except BaseException:
            file.close()
            raise
    raise FileNotFoundError(f"{folder}: expected a folder, got what none can be made of")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
