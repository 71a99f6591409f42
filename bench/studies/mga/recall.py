"""Associative recall: a corpus whose losses with and without recall are known.

`python -m bench.studies.mga.recall [--root .data] [--seq-len 32] [--keys 8] [--documents 65600]`
prepares the corpus `recall` for `train.py --corpus recall --seq-len 32`, prints its bounds and
writes them to recall.json beside this file. A document is a start, pairs of a key and its value,
and the end: one sequence of training. Keys are drawn one by one, each key's value once for the
document, all of them uniformly, of as many values as keys:

    .Kx0yAqKxAq0y...      x, y and q cost ln KEYS nats at first, and nothing once they are recalled

`recalled` turns a validation loss over the whole held-out split into the share of what can be
recalled that was; --val-tokens has to reach over it, as 200000 does.
"""

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from smollm.data import Corpus
from smollm.data.names import DEFAULT_ROOT
from smollm.data.prepare import prepare_corpus
from smollm.data.sources import Source
from smollm.data.tokenizer import END_OF_TEXT, write_tokenizer
from smollm.files import write_json

NAME = "recall"
START, KEYS, VALUES = ".", ascii_uppercase + "012345", ascii_lowercase + "6789+-"
RESULTS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Pairs(Source):
    """Documents of pairs.

    Args:
        documents: how many.
        seq_len: tokens in each, its start and its end included; even.
        keys: how many there are, and values, 2 to 32.
        seed: of all that is drawn.
    """

    documents: int
    seq_len: int
    keys: int
    seed: int

    @property
    def plain(self) -> dict[str, Any]:
        return {NAME: asdict(self)}

    def check(self) -> int:
        if self.seq_len < 4 or self.seq_len % 2:
            raise ValueError(f"seq_len: expected an even number >= 4, got {self.seq_len}")
        if not 2 <= self.keys <= len(KEYS):
            raise ValueError(f"keys: expected 2 to {len(KEYS)}, got {self.keys}")
        return self.documents

    def texts(self) -> Iterator[str]:
        random = Random(self.seed)
        for _ in range(self.documents):
            drawn = random.choices(VALUES[: self.keys], k=self.keys)
            values = dict(zip(KEYS[: self.keys], drawn, strict=True))
            keys = random.choices(KEYS[: self.keys], k=self.seq_len // 2 - 1)
            yield START + "".join(key + values[key] for key in keys)


@dataclass(frozen=True)
class Bounds:
    """Losses of ideal predictors, in nats per target; each knows what stands where.

    Args:
        floor: recalls every value that came before.
        unbound: knows which values the keys so far have, but not which of these keys it is asked
            for, so that it recalls nothing and still is better than a guess.
        guess: takes all values for alike.
    """

    floor: float
    unbound: float
    guess: float

    def recalled(self, loss: float) -> float:
        """The share of what recall saves that a loss saves: 1 at the floor, 0 at a guess."""
        return (self.guess - loss) / (self.guess - self.floor)


def bounds(documents: Iterable[str], keys: int) -> Bounds:
    """The bounds over documents of so many keys; all but the start of each are targets."""
    floor = unbound = guess = 0.0
    targets = 0
    one = math.log(keys)  # nats of a key, or of a value
    for text in documents:
        known: dict[str, str] = {}
        for key, value in zip(text[1::2], text[2::2], strict=True):
            share = (Counter(known.values())[value] + (keys - len(known)) / keys) / keys
            floor += one if key in known else 2 * one
            unbound += one - math.log(share)
            guess += 2 * one
            known[key] = value
        targets += len(text)
    return Bounds(floor / targets, unbound / targets, guess / targets)


def held_out(corpus: Corpus, seq_len: int) -> list[str]:
    """The held-out documents, each of which has to be one window of seq_len tokens.

    Raises:
        ValueError: one is not.
    """
    start, end = corpus.tokenizer.token_to_id(START), corpus.eos_id
    texts = []
    for (ids,) in corpus.val.sequential(1, seq_len):
        if ids[0] != start or ids[-1] != end or (ids == end).sum() > 1:
            raise ValueError(f"seq_len: expected the tokens of a document, got {seq_len}")
        texts.append(corpus.tokenizer.decode(ids.tolist()))
    return texts


def prepare(root: Path, pairs: Pairs, *, replace: bool = False) -> Corpus:
    """Prepare the corpus.

    Args:
        root: folder of prepared corpora.
        pairs: its documents, a twentieth of which are held out.
        replace: it may take the place of a corpus of its name.

    Raises:
        ValueError: an odd seq_len, or there is such a corpus.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        write_tokenizer(path, _tokenizer(pairs.keys))
        return Corpus(
            prepare_corpus(NAME, pairs, root, tokenizer=str(path), held_out=0.05, replace=replace)
        )


def _tokenizer(keys: int) -> Tokenizer:
    """A token for each symbol."""
    symbols = START + KEYS[:keys] + VALUES[:keys]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.mga.recall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="of prepared corpora")
    parser.add_argument("--seq-len", type=int, default=32, help="tokens of a document")
    parser.add_argument("--keys", type=int, default=8, help="and values, of each so many")
    parser.add_argument("--documents", type=int, default=65_600)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--replace", action="store_true", help="a corpus of that name")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the bounds")
    given = parser.parse_args(argv)
    try:
        pairs = Pairs(given.documents, given.seq_len, given.keys, given.seed)
        corpus = prepare(given.root, pairs, replace=given.replace)
        found = bounds(held_out(corpus, given.seq_len), given.keys)
    except (ValueError, OSError) as error:
        print(f"recall: {error}", file=sys.stderr)
        return 2
    about = {"sha256": corpus.sha256, "val_tokens": corpus.val.tokens}
    write_json(given.output, asdict(pairs) | about | asdict(found))
    print(
        f"{corpus.folder}: {corpus.train.tokens:,} training and {corpus.val.tokens:,} validation "
        f"tokens; nats per target: {found.floor:.4f} with all recalled, {found.guess:.4f} with "
        f"none, {found.unbound:.4f} with values that no key is bound to "
        f"({found.recalled(found.unbound):.3f} of the way)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
