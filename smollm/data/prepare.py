"""Documents become a prepared corpus: a folder that train.py reads.

It holds token shards (train_000000.bin, ..., val_000000.bin, ...), tokenizer.json and corpus.json.
"""

import hashlib
import platform
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from smollm.data.corpus import DEFAULT_ROOT, TOKENIZER, Corpus, Manifest, write_manifest
from smollm.data.folders import BUILTIN, build, check_new_name, find_place, settle
from smollm.data.shards import MAX_TOKENS, write_shard
from smollm.data.sources import Source, python_documents
from smollm.data.tokenizer import (
    END_OF_TEXT,
    SMOLLM_TOKENIZER,
    end_of_text,
    load_tokenizer,
    spellings,
    vocab_size,
)
from smollm.files import write_atomically

BUILTIN_VOCAB = 4096
SHARD_TOKENS = 100_000_000
HELD_OUT, BUILTIN_HELD_OUT = 0.005, 0.05  # of the documents


def prepare_builtin(root: Path = DEFAULT_ROOT) -> Path:
    """Tokenise the prose that CPython carries, unless this version's already stands there.

    Documents are pydoc's help topics and the docstrings of each module of the standard library,
    about 1.7 MB; the tokenizer is a byte-level BPE of 4096 entries trained on the training
    documents. The text varies with Python's version, and so does the corpus hash. A damaged one
    is made anew; of two processes that make it at once one waits for the other's.

    Args:
        root: folder of prepared corpora.

    Returns:
        The corpus's folder.

    Raises:
        ValueError: what stands there is no corpus of ours, and is left alone.
    """
    return open_builtin(root).folder


def open_builtin(root: Path = DEFAULT_ROOT) -> Corpus:
    """The built-in corpus, prepared when need be; see `prepare_builtin`."""
    folder = root / BUILTIN
    if (whole := _whole_builtin(folder)) is not None:
        return whole
    place = find_place(root, BUILTIN, replace=True)
    with build(place, wait=True) as new:
        if (whole := _whole_builtin(folder)) is not None:
            return whole
        documents = list(python_documents())
        tokenizer = _train_tokenizer([d for d in documents if not is_held_out(d, BUILTIN_HELD_OUT)])
        version = platform.python_version()
        _write_corpus(
            new,
            BUILTIN,
            documents,
            tokenizer,
            end_of_text(tokenizer),
            held_out=BUILTIN_HELD_OUT,
            python=version,
        )
        find_place(root, BUILTIN, replace=True)
        settle(new, place)
    return Corpus(folder)


def prepare_corpus(
    name: str,
    source: Source,
    root: Path = DEFAULT_ROOT,
    *,
    max_documents: int | None = None,
    tokenizer: str = SMOLLM_TOKENIZER,
    eos_token: str | None = None,
    held_out: float = HELD_OUT,
    shard_tokens: int = SHARD_TOKENS,
    replace: bool = False,
) -> Path:
    """Tokenise documents into shards.

    Args:
        name: the corpus's.
        source: where its documents come from.
        root: folder of prepared corpora.
        max_documents: read no more of them; all by default.
        tokenizer: a tokenizer.json, or a model on the hub; byte-level BPE, whose tokens spell
            every document byte for byte.
        eos_token: what ends a document; see `load_tokenizer` for the default.
        held_out: share of the documents that are for validation: those whose text's sha256 is
            below it, so that a larger share holds out the same ones and more.
        shard_tokens: tokens in a shard.
        replace: a corpus of that name goes once this one is whole.

    Returns:
        The corpus's folder.

    Raises:
        ValueError: an odd or taken name, a number out of range, a source that is not what it
            should be, a tokenizer that does not fit, or too few documents to hold some out.
        FileNotFoundError: no such data file or tokenizer. BlockingIOError: another process
            prepares a corpus of that name. ConnectionError: the hub cannot be reached.
    """
    check_new_name(name, source.own_name)
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents: expected >= 1, got {max_documents}")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ValueError(f"shard_tokens: expected 1 to {MAX_TOKENS}, got {shard_tokens}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    place = find_place(root, name, replace=replace)
    source.check()
    loaded, eos_id = load_tokenizer(tokenizer, eos_token)
    with build(place) as new:
        find_place(root, name, replace=replace)  # another process may just have finished
        documents = islice(source.texts(), max_documents)
        _write_corpus(
            new, name, documents, loaded, eos_id, held_out=held_out, shard_tokens=shard_tokens
        )
        find_place(root, name, replace=replace)
        settle(new, place)
    return root / name


def _whole_builtin(folder: Path) -> Corpus | None:
    """The built-in corpus if it stands there undamaged and is of this Python's text."""
    try:
        corpus = Corpus(folder)
    except (ValueError, FileNotFoundError):
        return None
    return corpus if corpus.python == platform.python_version() else None


def _train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _write_corpus(
    folder: Path,
    name: str,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    eos_id: int,
    *,
    held_out: float,
    shard_tokens: int = SHARD_TOKENS,
    python: str | None = None,
) -> None:
    """Fill an empty folder: shards, tokenizer.json and last corpus.json."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that spells one out does not end there
    spelled = spellings(tokenizer)
    writers = {s: _ShardWriter(folder, s, shard_tokens) for s in ("train", "val")}
    count = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    screen = Console(stderr=True)
    shown = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    with shown as progress:
        task = progress.add_task(f"tokenising {name}")
        for texts in _batches(documents, 256):
            for text, encoding in zip(texts, _encode(tokenizer, texts), strict=True):
                _check_spelling(text, b"".join(map(spelled.__getitem__, encoding.ids)))
                split = "val" if is_held_out(text, held_out) else "train"
                writers[split].add([*encoding.ids, eos_id])
            count += len(texts)
            tokens = sum(writer.tokens for writer in writers.values())
            progress.update(
                task, description=f"tokenising {name}: {count:,} documents, {tokens:,} tokens"
            )
    for split, writer in writers.items():
        writer.close()
        if writer.tokens == 0:
            raise ValueError(
                f"{name}: expected enough documents to hold some out, got {count} and an "
                f"empty {split} split with held_out {held_out}"
            )
    about = tokenizer.to_str(pretty=True).encode()
    write_atomically(folder / TOKENIZER, lambda file: file.write(about))
    files = {TOKENIZER: hashlib.sha256(about).hexdigest()}
    manifest = Manifest(
        name=name,
        vocab_size=vocab_size(tokenizer),
        eos_id=eos_id,
        documents=count,
        train_tokens=writers["train"].tokens,
        val_tokens=writers["val"].tokens,
        files=files | writers["train"].files | writers["val"].files,
        python=python,
    )
    write_manifest(folder, manifest)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
    try:
        encodings: list[Encoding] = tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer: expected one that takes any text, got {error}") from error
    return encodings


def _check_spelling(text: str, spelled: bytes) -> None:
    """Bits per byte counts the bytes of tokens, so they must be those of the document."""
    raw = text.encode()
    if spelled != raw:
        pairs = zip(raw, spelled, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise ValueError(
            "tokenizer: expected tokens that spell every document byte for byte, got "
            f"{spelled[same : same + 40]!r} for {raw[same : same + 40]!r}; a normalizer, a prefix "
            "space, unknown tokens, or added tokens that take in spaces do this"
        )


def _batches(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    stream = iter(documents)
    while batch := list(islice(stream, size)):
        yield batch


class _ShardWriter:
    """Cuts a stream of documents into shards of shard_tokens tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.tokens = 0
        self.files: dict[str, str] = {}  # sha256 by name
        self._folder = folder
        self._split = split
        self._filled = 0
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)

    def add(self, ids: list[int]) -> None:
        new = np.array(ids, dtype=np.uint16)
        self.tokens += len(new)
        while len(new):
            taken = new[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            new = new[len(taken) :]
            if self._filled == len(self._buffer):
                self.close()

    def close(self) -> None:
        if self._filled:
            name = f"{self._split}_{len(self.files):06d}.bin"
            self.files[name] = write_shard(self._folder / name, self._buffer[: self._filled])
            self._filled = 0


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for validation: its own text decides, whatever stands around it."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64
