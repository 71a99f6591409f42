"""Shuffling without a table: a keyed permutation, computed where it is asked."""

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

ROUNDS = 8
MOST = 2**62  # places that a permutation may have

Places = npt.NDArray[np.uint64]


def shuffled(examples: Sequence[int], count: int, key: tuple[int, ...]) -> Places:
    """The places of examples in a stream of permutations of [0, count), one after another.

    Example i is place i mod count of permutation i div count. Each is a Feistel network: with
    a = ceil(sqrt(count)) and b = ceil(count / a), place l b + r becomes, in turns,
    l + F(r) mod a and r + F(l) mod b, where F is keyed by a hash of the key, the permutation's
    number and the turn. What leaves [0, count), less than one in sqrt(count), goes through
    again, so that no two places meet. It takes O(1) time and memory per example.

    Args:
        examples: their numbers, >= 0.
        count: places in a permutation, 1 to 2**62.
        key: integers that name the stream.

    Returns:
        [len(examples)].

    Raises:
        ValueError: a count out of range.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count: expected 1 to {MOST}, got {count}")
    places = np.array([i % count for i in examples], dtype=np.uint64)
    keys = np.array([_round_keys(key, i // count) for i in examples], dtype=np.uint64)
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    places = _network(places, keys, a, b)
    while (outside := places >= count).any():
        places[outside] = _network(places[outside], keys[outside], a, b)
    return places


def _network(places: Places, keys: Places, a: int, b: int) -> Places:
    """One pass of a permutation of [0, a b); keys are [N, ROUNDS]."""
    left, right = np.divmod(places, np.uint64(b))
    for turn in range(0, ROUNDS, 2):
        left = (left + _mixed(right + keys[:, turn]) % np.uint64(a)) % np.uint64(a)
        right = (right + _mixed(left + keys[:, turn + 1]) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mixed(x: Places) -> Places:
    """SplitMix64's finalizer: every bit of x changes half of the result's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...], permutation: int) -> tuple[int, ...]:
    digest = blake2b(repr((key, permutation)).encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))
