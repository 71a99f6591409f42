"""The transformer block: SwiGLU, and where the norms stand."""

from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn

from smollm.attention.base import Attention
from smollm.attention.cache import LayerCache
from smollm.attention.layers import Layer, Linear, RMSNorm, dropout_layer, unchanged
from smollm.attention.rope import Rope
from smollm.model.config import NormStrategy


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), [..., embed_dim] -> [..., embed_dim].

    Source: arXiv 2002.05202.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.gate_proj = Linear(embed_dim, hidden_dim, bias=bias)
        self.up_proj = Linear(embed_dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, embed_dim, bias=bias)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """x + post(attention(pre(x))), then x + post(mlp(pre(x))).

    norm_strategy "pre" (Llama) norms a branch's input, "post" (OLMo 2) its output before it
    joins the residual, "sandwich" both; the other norms change nothing.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: SwiGLU,
        embed_dim: int,
        norm_strategy: NormStrategy,
        norm_eps: float,
    ) -> None:
        super().__init__()
        if norm_strategy not in get_args(NormStrategy):
            raise ValueError(
                f"norm_strategy: expected one of {get_args(NormStrategy)}, got {norm_strategy!r}"
            )

        def norm(*strategies: NormStrategy) -> Layer:
            used = norm_strategy in strategies
            return RMSNorm(embed_dim, eps=norm_eps) if used else unchanged

        self.attention = attention
        self.mlp = mlp
        self.attention_pre_norm = norm("pre", "sandwich")
        self.attention_post_norm = norm("post", "sandwich")
        self.mlp_pre_norm = norm("pre", "sandwich")
        self.mlp_post_norm = norm("post", "sandwich")

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, embed_dim] -> [B, T, embed_dim]; arguments as `Attention.forward`."""
        branch = self.attention(
            self.attention_pre_norm(x), rope=rope, cu_seqlens=cu_seqlens, cache=cache
        )
        x = x + self.attention_post_norm(branch)
        return x + self.mlp_post_norm(self.mlp(self.mlp_pre_norm(x)))
