"""Rotary position tables. They are computed in fp32 from positions, so no cast can touch them."""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]


def token_positions(
    tokens: int, cu_seqlens: Tensor | None = None, *, device: torch.device | None = None
) -> Tensor:
    """Position of each token in its own sequence, int64 [tokens].

    Args:
        tokens: tokens in a row.
        cu_seqlens: int32 [N+1], offsets of the packed sequences; None is one sequence.
        device: where to put the result; cu_seqlens' own device when it is given.
    """
    if cu_seqlens is None:
        return torch.arange(tokens, device=device)
    index = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    return index - cu_seqlens[sequence]


def rotary_tables(positions: Tensor, width: int, theta: float) -> Rope:
    """cos and sin of position * theta ** (-2i / width), i < width / 2.

    Args:
        positions: integers [...].
        width: even number of rotated features.
        theta: base of the wavelengths.

    Returns:
        (cos, sin), each fp32 [..., width / 2].

    Source: RoFormer, arXiv 2104.09864.
    """
    even = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    with torch.autocast(positions.device.type, enabled=False):
        angles = positions[..., None].float() * (1.0 / theta ** (even / width))
        return angles.cos(), angles.sin()
