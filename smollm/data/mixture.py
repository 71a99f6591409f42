"""Several corpora at given weights, read as one."""

import hashlib
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smollm.data.corpus import Corpus
from smollm.data.shards import Windows

PERIOD = 10_000  # examples, at most
WEIGHT = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


class Mixture(Corpus):
    """Corpora of one tokenizer, mixed window by window.

    Weights are shares of the tokens. Of the examples that are trained on, each corpus has its
    share exactly in every `period`, and within one example in what comes before any: see `Turns`.
    Each is shuffled, and repeated when it is through, by itself. Validation takes windows of the
    corpora's held-out documents at the same shares, fewer where one has not enough: its loss is
    the mixture's own, and runs at other weights are validated on other text.

    Args:
        corpora: distinct ones.
        weights: how much of each, > 0, in any unit.

    Raises:
        ValueError: corpora of several tokenizers, or weights without a short period.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[Fraction]) -> None:
        whole = _whole_numbers(weights)
        order = sorted(range(len(corpora)), key=lambda i: corpora[i].name)
        self.corpora = [corpora[i] for i in order]
        whole = [whole[i] for i in order]
        first = self.corpora[0]
        for other in self.corpora[1:]:
            if other.tokenizer.to_str() != first.tokenizer.to_str() or other.eos_id != first.eos_id:
                raise ValueError(
                    "corpus: expected corpora of one tokenizer and end token to mix, got "
                    f"{first.name!r} and {other.name!r} of two; prepare one with the other's "
                    f"--tokenizer {first.folder / 'tokenizer.json'}"
                )
        parts = list(zip(self.corpora, whole, strict=True))
        self.folder = first.folder.parent
        self.name = ",".join(f"{corpus.name}={weight}" for corpus, weight in parts)
        seen = "".join(f"{weight} {corpus.sha256}\n" for corpus, weight in parts)
        self.sha256 = hashlib.sha256(seen.encode()).hexdigest()
        self.python = None
        self.documents = sum(corpus.documents for corpus in self.corpora)
        self.tokenizer = first.tokenizer
        self.eos_id = first.eos_id
        self.vocab_size = first.vocab_size
        turns = Turns(whole)
        self.train = MixedWindows([corpus.train for corpus in self.corpora], turns)
        self.val = MixedWindows([corpus.val for corpus in self.corpora], turns)


class Turns:
    """Whose turn it is, for shares of whole numbers.

    Part c with weight w of a period p has its n-th turn in [floor(n p / w), ceil((n + 1) p / w)):
    of the parts that may, the one that must soonest is next. So after any number i of turns a
    part has had less than one more or less than i w / p, and w in every p.

    Args:
        weights: of each part, >= 1.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.period = sum(weights)
        had = [0] * len(weights)
        parts, before = [], []
        for turn in range(self.period):
            allowed = [c for c, w in enumerate(weights) if had[c] * self.period < (turn + 1) * w]
            part = min(allowed, key=lambda c: -(-(had[c] + 1) * self.period // weights[c]))
            parts.append(part)
            before.append(had[part])
            had[part] += 1
        self._weights, self._parts, self._before = weights, parts, before

    def of(self, example: int) -> tuple[int, int]:
        """Whose an example is, and how many of that part come before it."""
        periods, turn = divmod(example, self.period)
        part = self._parts[turn]
        return part, periods * self._weights[part] + self._before[turn]

    def counts(self, examples: int) -> npt.NDArray[np.int64]:
        """How many of the first examples are each part's."""
        periods, turn = divmod(examples, self.period)
        rest = np.bincount(self._parts[:turn], minlength=len(self._weights))
        return np.array(self._weights) * periods + rest


class MixedWindows(Windows):
    """The windows of several corpora's splits; each takes its turns.

    Args:
        parts: the splits.
        turns: whose example which is.
    """

    def __init__(self, parts: Sequence[Windows], turns: Turns) -> None:
        self._parts, self._turns = parts, turns

    @property
    def tokens(self) -> int:
        """Tokens of all parts, whatever their weights."""
        return sum(part.tokens for part in self._parts)

    def num_windows(self, seq_len: int) -> int:
        """Windows of all parts, whatever their weights."""
        return sum(part.num_windows(seq_len) for part in self._parts)

    def examples(self, numbers: Sequence[int], seq_len: int, key: tuple[int, ...]) -> Tensor:
        """Examples of an endless stream: each is the next of the part whose turn it is."""
        rows = torch.empty(len(numbers), seq_len, dtype=torch.int64)
        owners = [self._turns.of(number) for number in numbers]
        for index, part in enumerate(self._parts):
            mine = [row for row, (owner, _) in enumerate(owners) if owner == index]
            if mine:
                own = [owners[row][1] for row in mine]
                rows[mine] = part.examples(own, seq_len, (*key, index))
        return rows

    def sequential(self, batch_size: int, seq_len: int) -> Iterator[Tensor]:
        """Every window once, one part after another."""
        return chain.from_iterable(part.sequential(batch_size, seq_len) for part in self._parts)

    def spread(self, batch_size: int, seq_len: int, most: int) -> Iterator[Tensor]:
        """At most `most` windows at the parts' shares, each part's evenly spaced over it."""
        there = np.array([part.num_windows(seq_len) for part in self._parts])
        sizes = range(1, min(most, int(there.sum())) + 1)
        fit = bisect_left(sizes, True, key=lambda n: bool((self._turns.counts(n) > there).any()))
        for part, count in zip(self._parts, self._turns.counts(fit).tolist(), strict=True):
            if count or most < 1:
                yield from part.spread(batch_size, seq_len, count)


def parse_weights(text: str) -> dict[str, Fraction]:
    """Read "NAME=WEIGHT,NAME=WEIGHT".

    Raises:
        ValueError: it is none, a name comes twice, or a weight is no number above 0.
    """
    weights: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        if not WEIGHT.fullmatch(weight) or (share := Fraction(weight)) == 0:
            raise ValueError(
                "corpus: expected NAME, or NAME=WEIGHT,NAME=WEIGHT with weights above 0 of at "
                f"most 9 digits and 9 decimals, got {part!r:.120}"
            )
        if name in weights:
            raise ValueError(f"corpus: expected distinct names to mix, got {name!r} twice")
        weights[name] = share
    return weights


def _whole_numbers(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in the weights' proportion."""
    unit = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * unit) for weight in weights]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) > PERIOD:
        raise ValueError(
            f"corpus: expected weights that whole numbers of a sum of at most {PERIOD:,} have, "
            f"got {':'.join(map(str, whole))}; round them to 3 decimals of their sum"
        )
    return whole
