"""Prepared corpora: folders with token shards, tokenizer.json and corpus.json, which seals them."""

import hashlib
import json
import re
import shlex
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smollm.data.names import DEFAULT_ROOT
from smollm.data.shards import TokenWindows, Windows, open_shard
from smollm.data.tokenizer import TOKENIZER_FILE, read_tokenizer, spellings, vocab_size
from smollm.files import write_json

ABOUT, TOKENIZER, VERIFIED = "corpus.json", TOKENIZER_FILE, "verified.json"
PROGRESS = "progress.json"  # of a folder that is being filled
FORMAT = 2  # of corpus.json; 1 had no digests
SHARD = re.compile(r"(train|val)_\d{6}\.bin", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
YOUNG = 2_000_000_000  # ns; file systems keep times as coarse as this


@dataclass(frozen=True)
class Manifest:
    """What corpus.json says of its folder."""

    name: str
    vocab_size: int
    eos_id: int
    documents: int
    train_tokens: int
    val_tokens: int
    files: dict[str, str]
    """sha256 of tokenizer.json and of each shard, by name."""
    python: str | None = None
    """The version whose text this is; of the built-in corpus alone."""
    request: dict[str, Any] | None = None
    """What it was prepared from: source, tokenizer's digest, share held out; not of the built-in
    ones."""

    @property
    def sha256(self) -> str:
        """Digest of all that training sees: the tokenizer and the shards."""
        lines = (f"{name} {digest}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class Corpus:
    """A prepared corpus.

    Its files are compared with the digests in corpus.json at the first opening; verified.json
    remembers each file's size and times, so that what has not changed is not read again.

    Args:
        folder: where it was prepared.

    Raises:
        FileNotFoundError: there is none. ValueError: a file of it is missing, malformed or not
            what was prepared; the text names the file and says what to do.
    """

    def __init__(self, folder: Path) -> None:
        about = read_manifest(folder)
        _verify(folder, about.files)
        self.folder = folder
        self.name = about.name
        self.sha256 = about.sha256
        self.python = about.python
        self.documents = about.documents
        self.tokenizer = read_tokenizer(folder / TOKENIZER)
        self.eos_id = about.eos_id
        self.vocab_size = vocab_size(self.tokenizer)
        train = self._split("train", about)
        self.train: Windows = train
        self.val: Windows = self._split("val", about)
        found = (self.vocab_size, train.last_token, train.tokens, self.val.tokens)
        said = (about.vocab_size, about.eos_id, about.train_tokens, about.val_tokens)
        if found != said:
            raise ValueError(
                f"{folder / ABOUT}: corrupt corpus: expected vocab_size, eos_id, train_tokens and "
                f"val_tokens {found}, got {said}; {_prepare_again(folder)}"
            )

    @cached_property
    def token_bytes(self) -> Tensor:
        """Bytes of text that each token stands for, int64 [vocab_size]; 0 for special tokens."""
        return torch.tensor([len(text) for text in spellings(self.tokenizer)], dtype=torch.int64)

    def _split(self, split: str, about: Manifest) -> TokenWindows:
        paths = [self.folder / name for name in sorted(about.files) if name.startswith(split)]
        return TokenWindows([open_shard(path) for path in paths], f"{self.name}'s {split} split")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write corpus.json; the files it lists are known to be what it says."""
    content = asdict(manifest) | {"format": FORMAT, "sha256": manifest.sha256}
    write_json(
        folder / ABOUT, {name: value for name, value in content.items() if value is not None}
    )
    _remember(folder, {n: [d, *_stamp(folder / n)] for n, d in manifest.files.items()})


def read_manifest(folder: Path) -> Manifest:
    """Read and check corpus.json.

    Raises:
        FileNotFoundError: there is none. ValueError: what is wrong with it, and what to do.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a prepared corpus, got no {ABOUT}")
    try:
        content = _read_object(path)
        if "format" not in content and is_manifest(content):
            raise ValueError("expected digests of its files, got an earlier version's corpus")
        if content.get("format") != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, got {content.get('format')!r:.80}")
        counts = ("vocab_size", "eos_id", "documents", "train_tokens", "val_tokens")
        manifest = Manifest(
            name=_field(content, "name", str),
            files=_files(content),
            python=_field(content, "python", str) if "python" in content else None,
            request=_field(content, "request", dict) if "request" in content else None,
            **{name: _field(content, name, int) for name in counts},
        )
        if content.get("sha256") != manifest.sha256:
            raise ValueError(
                f"sha256: expected {manifest.sha256} of the files it lists, "
                f"got {content.get('sha256')!r:.80}"
            )
    except ValueError as error:
        raise ValueError(f"{path}: corrupt corpus: {error}; {_prepare_again(folder)}") from error
    return manifest


def is_manifest(content: Any) -> bool:
    """Whether this was written as a corpus.json, by this version or an earlier one."""
    kinds = {"name": str, "sha256": str, "vocab_size": int, "train_tokens": int, "val_tokens": int}
    return isinstance(content, dict) and all(type(content.get(k)) is t for k, t in kinds.items())


def holds_corpus(folder: Path) -> bool:
    """Whether a folder's corpus.json was written by us; its files may be damaged."""
    try:
        return is_manifest(_read_object(folder / ABOUT))
    except (OSError, ValueError):
        return False


def prepare_command(folder: Path) -> str:
    """The command that prepares a corpus there."""
    root = folder.parent
    flag = "" if root == DEFAULT_ROOT else f" --root {shlex.quote(str(root))}"
    return f"python -m smollm.data --corpus {shlex.quote(folder.name)}{flag}"


def _prepare_again(folder: Path) -> str:
    if holds_corpus(folder):
        return f"prepare it again with `{prepare_command(folder)} --replace`"
    return f"move {folder} away and prepare it again with `{prepare_command(folder)}`"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {content!r:.80}")
    return content


def _field(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        wanted = {int: "a count", str: "text", dict: "an object"}[kind]
        raise ValueError(f"{name}: expected {wanted}, got {value!r:.80}")
    return value


def _files(content: dict[str, Any]) -> dict[str, str]:
    files = content.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"files: expected a sha256 by name, got {files!r:.80}")
    for name, digest in files.items():
        if name != TOKENIZER and not SHARD.fullmatch(name):
            raise ValueError(f"files: expected {TOKENIZER} and shards, got {name!r:.80}")
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise ValueError(f"files: expected the sha256 of {name}, got {digest!r:.80}")
    for part in (TOKENIZER, "train_000000.bin", "val_000000.bin"):
        if part not in files:
            raise ValueError(f"files: expected {part} among them, got none")
    return files


def _verify(folder: Path, files: dict[str, str]) -> None:
    """Compare with their digests the files that have changed since they last were."""
    try:
        known = _read_object(folder / VERIFIED)
    except (OSError, ValueError):
        known = {}
    seen = {}
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(
                f"{path}: corrupt corpus: expected the file that {ABOUT} lists, got none; "
                f"{_prepare_again(folder)}"
            )
        seen[name] = [digest, *_stamp(path)]
        if known.get(name) != seen[name]:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise ValueError(
                    f"{path}: corrupt corpus: expected sha256 {digest[:12]}, got {found[:12]}; "
                    f"{_prepare_again(folder)}"
                )
    if seen != known:
        _remember(folder, seen)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size and times; nobody sets the last, so that a change under an old mtime shows too."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remember(folder: Path, seen: dict[str, list[Any]]) -> None:
    """Keep the stamps of verified files, but of young ones: they could change and not show it."""
    old = time.time_ns() - YOUNG
    lasting = {name: stamp for name, stamp in seen.items() if max(stamp[2:]) < old}
    with suppress(OSError):  # a corpus that cannot be written to is verified every time
        write_json(folder / VERIFIED, lasting)
