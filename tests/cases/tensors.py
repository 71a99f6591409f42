"""Random inputs of the cases."""

import torch
from torch import Tensor


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, contiguous: bool = True
) -> Tensor:
    """Normal numbers; unless contiguous, heads before tokens and a gap behind every row."""
    if contiguous:
        return torch.randn(shape, device=device).to(dtype)
    *outer, tokens, heads, width = shape
    x = torch.randn(*outer, heads, tokens, width + 16, device=device).to(dtype)
    return x[..., :width].transpose(-3, -2)


def random_parts(
    shape: tuple[int, ...],
    widths: list[int],
    dtype: torch.dtype,
    device: str,
    contiguous: bool,
) -> list[Tensor]:
    """Two random tensors; unless contiguous, slices of one, as a projection's output is split."""
    joined = torch.randn(*shape, sum(widths), device=device).to(dtype)
    return [x.contiguous() if contiguous else x for x in torch.split(joined, widths, dim=-1)]


def draw_bias(
    start: float | None, tokens: int, heads: int, batch: int, dtype: torch.dtype, device: str
) -> Tensor | None:
    """Normal numbers beside a slope; of positions from `start` on, in fp64 but from 0."""
    if start is None:
        return None
    position = start + torch.arange(tokens, dtype=torch.float64, device=device)[:, None]
    slope = 0.3 / (1 + torch.arange(heads, device=device))
    bias = position * slope + torch.randn(batch, tokens, heads, device=device)
    return bias if start else bias.to(torch.promote_types(dtype, torch.float32))


def sequence_offsets(lengths: tuple[int, ...] | None, device: str) -> Tensor | None:
    if lengths is None:
        return None
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
