"""Documents become a prepared corpus: a folder that train.py reads.

It holds token shards (train_000000.bin, ..., val_000000.bin, ...), tokenizer.json and corpus.json.
"""

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from smollm.data.shards import MAX_VOCAB, write_shard
from smollm.data.sources import (
    HUB_SHARDS,
    SMOLLM_TOKENIZER,
    load_tokenizer,
    parquet_texts,
    python_documents,
)
from smollm.files import write_json

BUILTIN = "builtin"
BUILTIN_VOCAB = 4096
END_OF_TEXT = "<|endoftext|>"


def prepare_builtin(root: Path = Path(".data")) -> Path:
    """Tokenise the prose that CPython carries, unless this version's already stands there.

    Documents are pydoc's help topics and the docstrings of each module of the standard library,
    about 1.7 MB; the tokenizer is a byte-level BPE of 4096 entries trained on the training
    documents. The text varies with Python's version, and so does the corpus hash.

    Args:
        root: folder of prepared corpora.

    Returns:
        The corpus's folder.
    """
    folder = root / BUILTIN
    version = platform.python_version()
    about_file = folder / "corpus.json"
    if about_file.is_file() and json.loads(about_file.read_text()).get("python") == version:
        return folder
    documents = list(python_documents())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d for d in documents if not _held_out(d, 50)), trainer)
    return _prepare(BUILTIN, documents, tokenizer, root, held_out=50, python=version)


def prepare_corpus(
    name: str,
    shards: int,
    root: Path = Path(".data"),
    *,
    data_files: Sequence[Path] = (),
    tokenizer: str = SMOLLM_TOKENIZER,
    shard_tokens: int = 100_000_000,
) -> Path:
    """Tokenise parquet files with a `text` column into shards.

    Args:
        name: "fineweb-edu-dedup" or "cosmopedia-v2" of the SmolLM corpus, streamed from the
            Hugging Face hub; or any name for data_files.
        shards: how many of the hub's files, from the first.
        root: folder of prepared corpora.
        data_files: local parquet files to read instead.
        tokenizer: a tokenizer.json, or a model on the hub; byte-level BPE.
        shard_tokens: tokens in a shard.

    Returns:
        The corpus's folder.

    Raises:
        ValueError: an unknown name, shards out of range, a tokenizer that does not fit, or too
            few documents to hold some out. FileNotFoundError: no such data file.
        ConnectionError: the hub cannot be reached.
    """
    if name == BUILTIN or Path(name).name != name or name.startswith("."):
        raise ValueError(f"corpus: expected the name of a folder but {BUILTIN!r}, got {name!r}")
    if not data_files:
        if name not in HUB_SHARDS:
            raise ValueError(f"corpus: expected one of {[BUILTIN, *HUB_SHARDS]}, got {name!r}")
        if not 1 <= shards <= HUB_SHARDS[name]:
            raise ValueError(f"shards: expected 1 to {HUB_SHARDS[name]} of {name}, got {shards}")
    for path in data_files:
        if not path.is_file():
            raise FileNotFoundError(f"data_files: expected a parquet file, got {path}")
    loaded = load_tokenizer(tokenizer)
    texts = parquet_texts(name, shards, data_files)
    return _prepare(name, texts, loaded, root, held_out=5, shard_tokens=shard_tokens)


def _prepare(
    name: str,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    root: Path,
    *,
    held_out: int,
    shard_tokens: int = 100_000_000,
    **about: str,
) -> Path:
    """Write a corpus beside its place and move it there once it is whole."""
    eos_id = _end_of_text(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that spells one out does not end there
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    digest = hashlib.sha256()
    writers = {s: _ShardWriter(building, s, shard_tokens) for s in ("train", "val")}
    count = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(f"tokenising {name}")
            for texts in _batches(documents, 256):
                encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
                for text, encoding in zip(texts, encodings, strict=True):
                    raw = text.encode()
                    digest.update(len(raw).to_bytes(8, "little") + raw)
                    split = "val" if _held_out(text, held_out) else "train"
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
                    f"empty {split} split"
                )
        tokenizer.save(str(building / "tokenizer.json"))
        content = {
            "name": name,
            "sha256": digest.hexdigest(),
            "vocab_size": vocab_size(tokenizer),
            "eos_id": eos_id,
            "documents": count,
            "train_tokens": writers["train"].tokens,
            "val_tokens": writers["val"].tokens,
            **about,
        }
        write_json(building / "corpus.json", content)
        building.chmod(0o755)
        shutil.rmtree(root / name, ignore_errors=True)
        return building.rename(root / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _batches(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    stream = iter(documents)
    while batch := list(islice(stream, size)):
        yield batch


class _ShardWriter:
    """Cuts a stream of documents into shards of shard_tokens tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.tokens = 0
        self._folder = folder
        self._split = split
        self._shards = 0
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
            path = self._folder / f"{self._split}_{self._shards:06d}.bin"
            write_shard(path, self._buffer[: self._filled])
            self._shards, self._filled = self._shards + 1, 0


def _held_out(text: str, per_mille: int) -> bool:
    """Whether a document is for validation: its own text decides, whatever stands around it."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") % 1000 < per_mille


def _end_of_text(tokenizer: Tokenizer) -> int:
    """Check that the tokenizer fits the shards; the id that ends a document."""
    size = vocab_size(tokenizer)
    if size > MAX_VOCAB:
        raise ValueError(
            f"tokenizer: expected a vocabulary of at most {MAX_VOCAB} (uint16), got {size}"
        )
    eos_id: int | None = tokenizer.token_to_id(END_OF_TEXT)
    if eos_id is None:
        raise ValueError(f"tokenizer: expected a token {END_OF_TEXT}, got none")
    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        raise ValueError("tokenizer: expected a byte-level BPE, got another decoder")
    return eos_id


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1
