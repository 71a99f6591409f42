"""`python -m smollm.data`: prepare a corpus for train.py."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import FrameType

import tyro

from smollm.data.corpus import DEFAULT_ROOT, Corpus
from smollm.data.folders import BUILTIN
from smollm.data.prepare import HELD_OUT, open_builtin, prepare_corpus
from smollm.data.tokenizer import SMOLLM_TOKENIZER


@dataclass(frozen=True)
class Arguments:
    """Prepare a corpus for train.py: download, tokenise, write shards."""

    corpus: str = "fineweb-edu-dedup"
    """"fineweb-edu-dedup" or "cosmopedia-v2" of the SmolLM corpus, "builtin", or another name,
    for --data-files."""
    shards: int = 2
    """Files of the SmolLM corpus to take, about 2 GB each."""
    root: Path = DEFAULT_ROOT
    """Folder of prepared corpora."""
    data_files: tuple[Path, ...] = ()
    """Local parquet files with a `text` column, instead of the hub's."""
    tokenizer: str = SMOLLM_TOKENIZER
    """A tokenizer.json, or a model on the Hugging Face hub."""
    held_out: float = HELD_OUT
    """Share of the documents that validation is on; a document's own text decides."""
    replace: bool = False
    """Replace a corpus of that name. "builtin" needs no asking."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    arguments = tyro.cli(Arguments, prog="python -m smollm.data", args=argv)
    try:
        with _interruptible():
            corpus = _prepare(arguments)
    except (ValueError, OSError) as error:
        print(f"smollm.data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("smollm.data: interrupted", file=sys.stderr)
        return 130
    print(
        f"{corpus.folder}: {corpus.train.tokens:,} training and {corpus.val.tokens:,} validation "
        f"tokens of {corpus.documents:,} documents, sha256 {corpus.sha256[:12]}"
    )
    return 0


def _prepare(arguments: Arguments) -> Corpus:
    if arguments.corpus == BUILTIN:
        if arguments != Arguments(BUILTIN, root=arguments.root, replace=arguments.replace):
            raise ValueError(f"corpus: expected {BUILTIN!r} with --root alone, got other flags too")
        return open_builtin(arguments.root)
    folder = prepare_corpus(
        arguments.corpus,
        arguments.shards,
        arguments.root,
        data_files=arguments.data_files,
        tokenizer=arguments.tokenizer,
        held_out=arguments.held_out,
        replace=arguments.replace,
    )
    return Corpus(folder)


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
