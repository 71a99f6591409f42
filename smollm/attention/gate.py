"""Gates on the outputs of heads."""

from torch import Tensor, nn

from smollm.attention.layers import Linear, split_heads
from smollm.attention.options import OutputGate


class HeadGate(nn.Module):
    """o * sigmoid(x W): a gate for each head's output, or for each of its features.

    Args:
        kind: "head" or "element".
        embed_dim: width of x.
        num_heads, width: of o.

    Source: arXiv 2505.06708.
    """

    def __init__(self, kind: OutputGate, embed_dim: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.num_heads = num_heads
        gates = num_heads * (width if kind == "element" else 1)
        self.proj = Linear(embed_dim, gates, bias=False)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        """[B, T, H, D], and x [B, T, embed_dim] -> [B, T, H, D]."""
        return o * split_heads(self.proj(x), self.num_heads).sigmoid()
