"""`python -m smollm.data`: prepare a corpus for train.py."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from smollm.data.corpus import Corpus
from smollm.data.prepare import BUILTIN, prepare_builtin, prepare_corpus
from smollm.data.sources import SMOLLM_TOKENIZER


@dataclass(frozen=True)
class Arguments:
    """Prepare a corpus for train.py: download, tokenise, write shards."""

    corpus: str = "fineweb-edu-dedup"
    """"fineweb-edu-dedup" or "cosmopedia-v2" of the SmolLM corpus, "builtin", or a name for
    --data-files."""
    shards: int = 2
    """Files of the SmolLM corpus to take, about 2 GB each."""
    root: Path = Path(".data")
    """Folder of prepared corpora."""
    data_files: tuple[Path, ...] = ()
    """Local parquet files with a `text` column, instead of the hub's."""
    tokenizer: str = SMOLLM_TOKENIZER
    """A tokenizer.json, or a model on the Hugging Face hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    arguments = tyro.cli(Arguments, prog="python -m smollm.data", args=argv)
    try:
        if arguments.corpus == BUILTIN:
            folder = prepare_builtin(arguments.root)
        else:
            folder = prepare_corpus(
                arguments.corpus,
                arguments.shards,
                arguments.root,
                data_files=arguments.data_files,
                tokenizer=arguments.tokenizer,
            )
        corpus = Corpus(folder)
    except (ValueError, OSError) as error:
        print(f"smollm.data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("smollm.data: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(
        f"{folder}: {corpus.train.tokens:,} training and {corpus.val.tokens:,} validation tokens "
        f"of {corpus.documents:,} documents, sha256 {corpus.sha256[:12]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
