"""`python -m smollm.data`: prepare a corpus for train.py."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import FrameType
from typing import TYPE_CHECKING

import tyro

from smollm.data.names import BUILTINS, DEFAULT_ROOT, HELD_OUT, SMOLLM_TOKENIZER

if TYPE_CHECKING:
    from smollm.data.corpus import Corpus
    from smollm.data.sources import Source


@dataclass(frozen=True)
class Arguments:
    """Prepare a corpus for train.py: download, tokenise, write shards."""

    corpus: str = "fineweb-edu-dedup"
    """"fineweb-edu-dedup" or "cosmopedia-v2" of the SmolLM corpus, "builtin" or "builtin-code" of
    this Python, or another name, for --dataset or --data-files."""
    shards: int = 2
    """Files of the SmolLM corpus to take, about 2 GB each."""
    dataset: str | None = None
    """Another dataset of the hub, OWNER/NAME, instead of the SmolLM corpus."""
    subset: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """Its split."""
    data_files: tuple[Path, ...] = ()
    """Local files instead of the hub's: FILE.jsonl, FILE.txt, any other is parquet."""
    text_column: str = "text"
    """Column of the dataset or of parquet, or key of jsonl, with the text."""
    separator: str | None = None
    """What stands between the documents of a txt file; by default it is one document."""
    max_documents: int | None = None
    """Take no more documents; all by default."""
    root: Path = DEFAULT_ROOT
    """Folder of prepared corpora."""
    tokenizer: str = SMOLLM_TOKENIZER
    """A tokenizer.json, or a model on the Hugging Face hub; byte-level BPE."""
    eos_token: str | None = None
    """The special token that ends a document; by default <|endoftext|>, else the tokenizer's
    own."""
    held_out: float = HELD_OUT
    """Share of the documents that validation is on; a document's own text decides."""
    replace: bool = False
    """Replace a corpus of that name. The built-in ones need no asking."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    arguments = tyro.cli(Arguments, prog="python -m smollm.data", args=argv)
    try:
        with _interruptible():
            corpus = _prepare(arguments)
    except BlockingIOError as error:
        print(f"smollm.data: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"smollm.data: {error}", file=sys.stderr)
        _say_what_stays(arguments)
        return 2
    except KeyboardInterrupt:
        print("smollm.data: interrupted", file=sys.stderr)
        _say_what_stays(arguments)
        return 130
    print(
        f"{corpus.folder}: {corpus.train.tokens:,} training and {corpus.val.tokens:,} validation "
        f"tokens of {corpus.documents:,} documents, sha256 {corpus.sha256[:12]}"
    )
    return 0


def _say_what_stays(arguments: Arguments) -> None:
    from smollm.data.folders import unfinished

    if (shards := unfinished(arguments.root, arguments.corpus)) is not None:
        print(
            f"smollm.data: whole shards stay in {shards}; the same command goes on from them",
            file=sys.stderr,
        )


def _prepare(arguments: Arguments) -> "Corpus":
    from smollm.data.corpus import Corpus
    from smollm.data.prepare import open_builtin, prepare_corpus

    name = arguments.corpus
    if name in BUILTINS:
        if arguments != Arguments(name, root=arguments.root, replace=arguments.replace):
            raise ValueError(f"corpus: expected {name!r} with --root alone, got other flags too")
        return open_builtin(arguments.root, name)
    folder = prepare_corpus(
        arguments.corpus,
        _source(arguments),
        arguments.root,
        max_documents=arguments.max_documents,
        tokenizer=arguments.tokenizer,
        eos_token=arguments.eos_token,
        held_out=arguments.held_out,
        replace=arguments.replace,
    )
    return Corpus(folder)


def _source(arguments: Arguments) -> "Source":
    """Where the documents come from; refuses flags of another source than the one asked for."""
    from smollm.data.hub import HubDataset
    from smollm.data.sources import LocalFiles

    of_hub = {name: getattr(arguments, name) for name in ("dataset", "subset", "split")}
    if arguments.data_files:
        for flag, value in of_hub.items():
            if value != getattr(Arguments, flag):
                raise ValueError(f"{flag}: expected none beside data_files, got {value!r}")
        return LocalFiles(arguments.data_files, arguments.text_column, arguments.separator)
    if arguments.separator is not None:
        raise ValueError(f"separator: expected data_files to divide, got {arguments.separator!r}")
    if arguments.dataset is not None:
        return HubDataset(**of_hub, text_column=arguments.text_column)
    for flag in ("subset", "split", "text_column"):
        if getattr(arguments, flag) != getattr(Arguments, flag):
            raise ValueError(f"{flag}: expected a dataset beside it, got none")
    return HubDataset.smollm(arguments.corpus, arguments.shards)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once; while that cleans up, they wait."""
    signals = [s for s in (SIGINT, SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
