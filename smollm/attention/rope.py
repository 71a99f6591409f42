"""Rotary position tables. They are computed in fp32 from positions, so no cast can touch them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smollm.attention.scaling import Llama3Scaling

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotation:
    """How a layer rotates queries and keys.

    Args:
        width: even number of rotated features, the first ones; 0 for no rotation.
        theta: base of the wavelengths.
        scaling: of the frequencies. Default none.
    """

    width: int
    theta: float
    scaling: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        if self.width % 2 or self.width < 0:
            raise ValueError(f"rotary width: expected an even number, got {self.width}")
        if not 0 < self.theta < math.inf:
            raise ValueError(f"rope_theta: expected > 0, got {self.theta}")

    def tables(self, positions: Tensor) -> Rope:
        """cos and sin of position * f_i, f_i = theta ** (-2i / width), scaled, i < width / 2.

        Args:
            positions: integers [...].

        Returns:
            (cos, sin), each fp32 [..., width / 2].

        Source: RoFormer, arXiv 2104.09864.
        """
        even = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32)
        frequencies = 1.0 / self.theta ** (even / self.width)
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        angles = positions[..., None].float() * frequencies  # as autocast, too, leaves it
        return angles.cos(), angles.sin()


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
