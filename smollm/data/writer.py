"""Token streams cut into shards, and where a preparation that ended early goes on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smollm.data.corpus import PROGRESS
from smollm.data.shards import write_shard
from smollm.files import json_text, write_json

SPLITS = ("train", "val")


@dataclass
class Mark:
    """How far the whole shards of a split reach."""

    documents: int = 0  # of the split that began in them
    chain: str = ""  # digest of those documents, in order
    left: int = 0  # tokens of the last of them that are not in the shards
    files: dict[str, str] = field(default_factory=dict)  # sha256 by name


class Place(NamedTuple):
    """A document's number in its split, from 1, and the digest of all up to it."""

    number: int
    chain: str


class ChangedError(ValueError):
    """The documents are others than those whose shards are there."""


class ShardWriter:
    """Cuts the documents of a split into shards of shard_tokens tokens.

    Args:
        folder: where they go.
        split: "train" or "val".
        shard_tokens: tokens in each but the last.
        start: what is there already.
        completed: called when a shard is whole, and `mark` says so.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shard_tokens: int,
        start: Mark,
        completed: Callable[[], None],
    ) -> None:
        self.mark = start
        self.files = dict(start.files)  # sha256 by name
        self.tokens = shard_tokens * len(start.files)
        self._folder = folder
        self._split = split
        self._start = start
        self._completed = completed
        self._met = Place(0, "")
        self._filled = 0
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)

    def meet(self, digest: bytes) -> Place | None:
        """Count a document, by the digest of its text; None if whole shards hold all of it.

        Raises:
            ChangedError: it is another than that which the shards end in.
        """
        chain = hashlib.sha256(self._met.chain.encode() + digest).hexdigest()
        self._met = Place(self._met.number + 1, chain)
        start = self._start
        if self._met.number == start.documents and chain != start.chain:
            raise ChangedError(f"document {start.documents} of {self._split}")
        held = start.documents - (start.left > 0)
        return None if self._met.number <= held else self._met

    def add(self, place: Place, ids: list[int]) -> None:
        """Append the tokens of a document that `meet` gave a place; those in no shard yet."""
        new = np.array(ids, dtype=np.uint16)
        if place.number == self._start.documents:
            new = new[len(new) - self._start.left :]
        self.tokens += len(new)
        while len(new):
            taken = new[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            new = new[len(taken) :]
            if self._filled == len(self._buffer):
                self._write()
                self.mark = Mark(place.number, place.chain, len(new), dict(self.files))
                self._completed()

    def close(self) -> None:
        """Write what is left as the last shard.

        Raises:
            ChangedError: fewer documents came than the shards hold.
        """
        if self._met.number < self._start.documents:
            raise ChangedError(f"{self._met.number} documents of {self._split}")
        if self._filled:
            self._write()

    def _write(self) -> None:
        name = f"{self._split}_{len(self.files):06d}.bin"
        self.files[name] = write_shard(self._folder / name, self._buffer[: self._filled])
        self._filled = 0


def save_progress(folder: Path, request: Any, marks: Mapping[str, Mark]) -> None:
    """Keep what of a request is whole, so that `read_progress` finds it."""
    plain = {split: asdict(mark) for split, mark in marks.items()}
    write_json(folder / PROGRESS, {"request": request, **plain})


def read_progress(folder: Path, request: Any) -> dict[str, Mark]:
    """What an earlier preparation of the same request left whole.

    All else in the folder is removed, and all of it unless each shard is what it was.
    """
    marks = {split: Mark() for split in SPLITS}
    try:
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        found = {split: Mark(**content[split]) for split in SPLITS}
        same = content["request"] == json.loads(json_text(request))
        if same and all(_is_whole(folder, split, mark) for split, mark in found.items()):
            marks = found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    kept = {name for mark in marks.values() for name in mark.files}
    for path in folder.iterdir():
        if path.name not in kept and not (kept and path.name == PROGRESS):
            path.unlink()
    return marks


def _is_whole(folder: Path, split: str, mark: Mark) -> bool:
    names = [f"{split}_{number:06d}.bin" for number in range(len(mark.files))]
    return list(mark.files) == names and all(
        _digest(folder / name) == mark.files[name] for name in names
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
