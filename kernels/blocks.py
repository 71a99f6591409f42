"""Blocks of queries, and the interval of keys that one of each block's sees."""

from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.core.problem import power_of_2

_FEWEST_QUERIES, _MOST_QUERIES = 64, 256  # of a causal block
_MOST_MASKED = 4096  # keys of a mask that caches still hold; PyTorch's causal kernel has none


class Block(NamedTuple):
    """Queries, and the keys that at least one of them sees."""

    queries: slice
    keys: slice
    mask: Tensor | None = None  # [queries, keys], 0 where seen and else -inf
    is_causal: bool = False  # instead: each of as many queries sees the keys up to its own

    def after(self, tokens: int) -> "Block":
        """The same behind so many tokens of other sequences."""
        queries, keys = (slice(x.start + tokens, x.stop + tokens) for x in self[:2])
        return self._replace(queries=queries, keys=keys)


def blocks(
    q_tokens: int,
    k_tokens: int,
    *,
    causal: bool,
    window_size: int | None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    most: int | None = None,
) -> list[Block]:
    """Who sees whom, as `reference.visible` has it; queries without keys are in no block.

    Blocks have `most` queries at the most, or as many as are fastest.
    """
    if cu_seqlens is not None:
        own = partial(blocks, causal=causal, window_size=window_size, dtype=dtype, most=most)
        sequences = pairwise(cu_seqlens.tolist())
        return [x.after(start) for start, end in sequences for x in own(*[end - start] * 2)]
    behind, ahead = reference.reach(causal, window_size)
    if ahead:
        size = most or max(q_tokens, 1)
        starts = range(0, q_tokens if k_tokens else 0, size)
        return [Block(slice(x, min(x + size, q_tokens)), slice(0, k_tokens)) for x in starts]
    found = []
    shift = k_tokens - q_tokens  # both sequences end together
    window = int(min(behind + 1, power_of_2(max(k_tokens, 1))))  # one mask for many a length
    if shift == 0 and window >= k_tokens > _MOST_MASKED and most is None:
        return [Block(slice(0, q_tokens), slice(0, k_tokens), is_causal=True)]
    first = max(0, -shift)
    most = most or min(max(window // 4, _FEWEST_QUERIES), _MOST_QUERIES)
    while first < q_tokens:
        end = min(first + most, q_tokens)
        start = first + shift + 1 - window
        keys = slice(max(0, start), end + shift)
        mask = _band(most, window, dtype)[: end - first, keys.start - start : keys.stop - start]
        found.append(Block(slice(first, end), keys, mask=mask if end - first > 1 else None))
        first = end
    return found


@lru_cache(maxsize=16)
def _band(queries: int, window: int, dtype: torch.dtype) -> Tensor:
    """The mask of so many queries in a row, from the first key that the first of them sees."""
    k_pos = torch.arange(window + queries - 1)
    seen = reference.visible(k_pos[window - 1 :], k_pos, window_size=window)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
