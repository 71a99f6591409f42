"""Documents become tokens, and tokens a corpus's folder."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer

from smollm.data.corpus import PROGRESS, TOKENIZER, Manifest, write_manifest
from smollm.data.tokenizer import spellings, vocab_size
from smollm.data.writer import (
    SPLITS,
    ChangedError,
    Place,
    ShardWriter,
    read_progress,
    save_progress,
)
from smollm.files import write_atomically

SHARD_TOKENS = 100_000_000
BATCH = 256  # documents; the tokenizer's threads share them


@dataclass(frozen=True)
class Recipe:
    """How documents become a corpus."""

    name: str
    tokenizer: Tokenizer
    eos_id: int  # ends each document
    held_out: float  # share of the documents
    shard_tokens: int = SHARD_TOKENS
    python: str | None = None  # see Manifest
    request: Any = None  # what a preparation that goes on must share, as JSON has it


def write_corpus(
    folder: Path,
    recipe: Recipe,
    documents: Callable[[], Iterable[str]],
    total: int | None = None,
) -> None:
    """Fill a folder: shards, tokenizer.json and last corpus.json.

    What an earlier preparation of the same request left there whole is kept: the documents are
    read again, but not tokenised, and the corpus is the same byte for byte.

    Args:
        folder: holds nothing else.
        recipe: how.
        documents: gives them, in the same order every time.
        total: how many there are about, to show.

    Raises:
        ValueError: a tokenizer that does not spell a document, or too few documents.
    """
    try:
        _write(folder, recipe, documents(), total)
    except ChangedError:
        (folder / PROGRESS).unlink()
        _write(folder, recipe, documents(), total)
    (folder / PROGRESS).unlink(missing_ok=True)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for validation: its own text decides, whatever stands around it."""
    return _is_below(hashlib.sha256(text.encode()).digest(), share)


def _is_below(digest: bytes, share: float) -> bool:
    return int.from_bytes(digest[:8], "little") < share * 2**64


def _write(folder: Path, recipe: Recipe, documents: Iterable[str], total: int | None) -> None:
    tokenizer = recipe.tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that spells one out does not end there
    spelled = spellings(tokenizer)
    screen = Console(stderr=True)
    count = 0

    def completed() -> None:
        save_progress(folder, recipe.request, {s: writers[s].mark for s in SPLITS})
        if not screen.is_terminal:
            print(f"{recipe.name}: {_state(count, writers.values())}", file=sys.stderr, flush=True)

    starts = read_progress(folder, recipe.request)
    writers = {s: ShardWriter(folder, s, recipe.shard_tokens, starts[s], completed) for s in SPLITS}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    shown = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    with shown as progress:
        task = progress.add_task(f"tokenising {recipe.name}", total=total)
        for texts in _batches(documents, BATCH):
            met = [_meet(text, writers, recipe.held_out) for text in texts]
            new = [(t, w, place) for t, (w, place) in zip(texts, met, strict=True) if place]
            encoded = _encode(tokenizer, spelled, [text for text, _, _ in new])
            for (_, writer, place), ids in zip(new, encoded, strict=True):
                writer.add(place, [*ids, recipe.eos_id])
            count += len(texts)
            state = f"tokenising {recipe.name}: {_state(count, writers.values())}"
            progress.update(task, description=state, completed=count)
    for split, writer in writers.items():
        writer.close()
        if writer.tokens == 0:
            raise ValueError(
                f"{recipe.name}: expected enough documents to hold some out, got {count} and an "
                f"empty {split} split with held_out {recipe.held_out}"
            )
    about = tokenizer.to_str(pretty=True).encode()
    write_atomically(folder / TOKENIZER, lambda file: file.write(about))
    files = {TOKENIZER: hashlib.sha256(about).hexdigest()}
    manifest = Manifest(
        name=recipe.name,
        vocab_size=vocab_size(tokenizer),
        eos_id=recipe.eos_id,
        documents=count,
        train_tokens=writers["train"].tokens,
        val_tokens=writers["val"].tokens,
        files=files | writers["train"].files | writers["val"].files,
        python=recipe.python,
        request=recipe.request or None,
    )
    write_manifest(folder, manifest)


def _state(count: int, writers: Iterable[ShardWriter]) -> str:
    tokens = sum(writer.tokens for writer in writers)
    return f"{count:,} documents, {tokens:,} tokens"


def _meet(
    text: str, writers: dict[str, ShardWriter], held_out: float
) -> tuple[ShardWriter, Place | None]:
    """Whose a document is, and its place there; None if whole shards hold it."""
    digest = hashlib.sha256(text.encode()).digest()
    writer = writers["val" if _is_below(digest, held_out) else "train"]
    return writer, writer.meet(digest)


def _encode(tokenizer: Tokenizer, spelled: list[bytes], texts: list[str]) -> Iterator[list[int]]:
    """The tokens of each text, checked to spell it; the tokenizer's threads share the texts."""
    try:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer: expected one that takes any text, got {error}") from error
    for text, encoding in zip(texts, encodings, strict=True):
        ids: list[int] = encoding.ids
        _check_spelling(text, b"".join(map(spelled.__getitem__, ids)))
        yield ids


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
