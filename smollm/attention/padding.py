"""Padded batches become packed sequences, which is the only form of mask that the kernels know."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Packing(NamedTuple):
    """Where the real tokens of a padded [B, T] batch stand once packed into [1, N]."""

    places: Tensor  # [N] indices into the flattened [B * T]
    cu_seqlens: Tensor  # int32 [B+1]
    batch: int
    tokens: int

    @property
    def lengths(self) -> Tensor:
        """Real tokens in each row, int32 [B]."""
        return self.cu_seqlens.diff()

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N, ...]."""
        return rearrange(x, "b t ... -> (b t) ...")[self.places][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [B, T, ...], zeros at padding."""
        padded = x.new_zeros(self.batch * self.tokens, *x.shape[2:])
        padded = padded.index_copy(0, self.places, x[0])
        return rearrange(padded, "(b t) ... -> b t ...", b=self.batch)


def packing(attention_mask: Tensor, batch: int, tokens: int) -> Packing | None:
    """Read a padding mask.

    Args:
        attention_mask: [B, T], True or 1 at real tokens, padding on the left, the right or both.
        batch, tokens: the B and T that it must have.

    Returns:
        The packing, or None when nothing is padding.

    Raises:
        ValueError, TypeError: another shape or type, values that are not 0 or 1, padding between
            real tokens, or no real token at all.
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
    lengths = real.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))
    return Packing(real.flatten().nonzero()[:, 0], cu_seqlens, batch, tokens)


def has_gap(real: Tensor) -> Tensor:
    """Which rows of real [B, T] have padding between real tokens, [B]."""
    rises = real[:, 1:] & ~real[:, :-1]
    return rises.sum(dim=1) + real[:, 0].int() > 1
