"""Random inputs of the cases."""

import math

import torch
from torch import Tensor

DRAWN_BY_CPU = 1 << 24  # numbers, above which a GPU draws its own in a fraction of the time


def normal(*shape: int, device: str) -> Tensor:
    """Normal numbers, the same on every device unless they are very many."""
    few = math.prod(shape) <= DRAWN_BY_CPU
    return torch.randn(shape, device="cpu" if few else device).to(device)


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, contiguous: bool = True
) -> Tensor:
    """Normal numbers; unless contiguous, heads before tokens and a gap behind every row."""
    if contiguous:
        return normal(*shape, device=device).to(dtype)
    *outer, tokens, heads, width = shape
    x = normal(*outer, heads, tokens, width + 16, device=device).to(dtype)
    return x[..., :width].transpose(-3, -2)


def random_parts(
    shape: tuple[int, ...],
    widths: list[int],
    dtype: torch.dtype,
    device: str,
    contiguous: bool,
) -> list[Tensor]:
    """Two random tensors; unless contiguous, slices of one, as a projection's output is split."""
    joined = normal(*shape, sum(widths), device=device).to(dtype)
    return [x.contiguous() if contiguous else x for x in torch.split(joined, widths, dim=-1)]


def draw_bias(
    start: float | None, tokens: int, heads: int, batch: int, dtype: torch.dtype, device: str
) -> Tensor | None:
    """Normal numbers beside a slope; of positions from `start` on, in fp64 but from 0."""
    if start is None:
        return None
    position = start + torch.arange(tokens, dtype=torch.float64, device=device)[:, None]
    slope = 0.3 / (1 + torch.arange(heads, device=device))
    bias = position * slope + normal(batch, tokens, heads, device=device)
    return bias if start else bias.to(torch.promote_types(dtype, torch.float32))


def sequence_offsets(lengths: tuple[int, ...] | None, device: str) -> Tensor | None:
    if lengths is None:
        return None
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
