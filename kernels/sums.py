"""Sums over each token's causal window on CPUs, in time linear in T."""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels.derivatives import Function, run
from kernels.operators import operator


def window_sums(x: Tensor, cu_seqlens: Tensor | None, window_size: int) -> Tensor:
    """Of x [B, T, H, D] over the latest window_size tokens of its sequence, each token included.

    A window spans two chunks of window_size tokens: the end of one, summed backward from there, and
    the start of the next. Nothing is subtracted, so no token outside a window is in its sum. Each
    of the two is rounded once, so that with their sum they err by at most 1.5 eps of numbers of one
    sign.
    """
    sums: Tensor = run(_WindowSums, x, cu_seqlens, window_size, False)
    return sums


class _WindowSums(Function):
    """Its gradient is the sums over the tokens that see a token."""

    @staticmethod
    def forward(x: Tensor, cu_seqlens: Tensor | None, window_size: int, ahead: bool) -> Tensor:
        sums: Tensor = _sums(x, cu_seqlens, window_size, ahead)
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _x, cu_seqlens, ctx.window_size, ctx.ahead = inputs
        ctx.save_for_backward(cu_seqlens)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return run(_WindowSums, d, cu_seqlens, ctx.window_size, not ctx.ahead), None, None, None


@operator(
    "window_sums(Tensor x, Tensor? cu_seqlens, int window_size, bool ahead) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    folds=True,
)
def _sums(x: Tensor, cu_seqlens: Tensor | None, window_size: int, ahead: bool) -> Tensor:
    """Over the windows that end at each token, or those ahead that begin there."""
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    sums = x.new_empty(x.shape)
    for start, end in pairwise(bounds):
        own, tokens = x[:, start:end], end - start
        if not own.numel():
            continue
        window = min(window_size, tokens)
        padded = F.pad(own.flip(1) if ahead else own, (0, 0, 0, 0, 0, -tokens % window))
        chunks = rearrange(padded, "b (c w) h d -> b c w h d", w=window)
        total = chunks.cumsum(dim=2)  # of the window's tokens in its last one's chunk
        total[:, 1:, :-1] += chunks[:, :-1, 1:].flip(2).cumsum(dim=2).flip(2)  # in that before
        total = total.flatten(1, 2)[:, :tokens]
        sums[:, start:end] = total.flip(1) if ahead else total
    return sums
