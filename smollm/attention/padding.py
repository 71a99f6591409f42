"""Padded batches become packed sequences, which is the only form of mask that the kernels know."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """A padded [B, T] batch as one row [1, N] of its real tokens.

    A graph, whose shapes depend on no values, has all B * T tokens in the row: each run of padding
    is a sequence of its own, of zeros.
    """

    real: Tensor  # boolean [B, T]
    cu_seqlens: Tensor  # int32, of the rows' real tokens [B+1], or with the padding around [3B+1]
    places: Tensor | None  # [N], of the real tokens in [B * T]; None for all tokens

    @property
    def lengths(self) -> Tensor:
        """Real tokens in each row, int32 [B]."""
        return self.real.sum(dim=1, dtype=torch.int32)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N, ...]."""
        if self.places is None:
            return self._without_padding(x).flatten(0, 1)[None]
        return x.flatten(0, 1)[self.places][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [B, T, ...], zeros at padding."""
        shape = *self.real.shape, *x.shape[2:]
        if self.places is None:
            return self._without_padding(x.reshape(shape))
        padded = x.new_zeros(self.real.numel(), *x.shape[2:])
        return padded.index_copy(0, self.places, x[0]).view(shape)

    def _without_padding(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self.real.view(*self.real.shape, *(1,) * (x.dim() - 2)), 0)


def packing(attention_mask: Tensor, batch: int, tokens: int) -> Packing | None:
    """Read a padding mask.

    Args:
        attention_mask: [B, T], True or 1 at real tokens, padding on the left, the right or both.
        batch, tokens: the B and T that it must have.

    Returns:
        The packing, or None when nothing is padding, which a graph cannot know.

    Raises:
        ValueError, TypeError: another shape or type, values that are not 0 or 1, padding between
            real tokens, or no real token at all; of values a graph raises RuntimeError as it runs.
    """
    name = "attention_mask"
    if list(attention_mask.shape) != [batch, tokens]:
        raise ValueError(
            f"{name}: expected [B={batch}, T={tokens}] (True = real token; causality and windows "
            f"are the module's own), got {list(attention_mask.shape)}"
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"{name}: expected booleans or integers, got {attention_mask.dtype}")
    real = attention_mask.bool()
    lengths = real.sum(dim=1)
    if torch.compiler.is_compiling():
        torch._assert_async(
            (real == attention_mask).all() & real.any() & ~has_gap(real).any(),
            f"{name}: expected 0 or 1, a real token, and padding at the ends only, got another",
        )
        edges = torch.arange(batch + 1, device=real.device) * tokens
        start = edges[:-1] + real.int().argmax(dim=1)
        runs = torch.stack((edges[:-1], start, start + lengths), dim=1).flatten()
        return Packing(real, torch.cat((runs, edges[-1:])).int(), None)
    if not torch.equal(real, attention_mask == 1):
        raise ValueError(f"{name}: expected 0 or 1, got values up to {int(attention_mask.max())}")
    if bool(real.all()):
        return None
    if not bool(real.any()):
        raise ValueError(f"{name}: expected a real token, got padding only")
    gaps = has_gap(real)
    if bool(gaps.any()):
        row = int(gaps.nonzero()[0])
        raise ValueError(f"{name}: expected padding at the ends only, got a gap inside row {row}")
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Packing(real, cu_seqlens, real.flatten().nonzero()[:, 0])


def has_gap(real: Tensor) -> Tensor:
    """Which rows of real [B, T] have padding between real tokens, [B]."""
    rises = real & ~F.pad(real, (1, 0))[:, :-1]
    return rises.sum(dim=1) > 1
