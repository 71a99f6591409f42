"""How rotary frequencies are scaled for longer sequences; needs no PyTorch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Slower rotation of what turns rarely, for sequences longer than those of pre-training.

    A frequency f turns L f / 2 pi times in L = original_max_positions tokens. Where that is at most
    low_freq_factor it becomes f / factor, where it is at least high_freq_factor it stays f, and
    between the two it is interpolated linearly in the number of turns.

    Source: Llama 3.1, arXiv 2407.21783, and its published code.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"rope_scaling: expected {name} > 0, got {value}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: expected low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )

    def __call__(self, frequencies: "Tensor") -> "Tensor":
        """The scaled frequencies, in radians per token."""
        turns = self.original_max_positions / (2 * math.pi) * frequencies
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)
