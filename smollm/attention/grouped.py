"""Softmax attention over keys and values of their own: GQA and, with a head each, MHA."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels import attention, attention_decode, rotate
from smollm.attention.base import Attention, Bias, check_divides, checked_bias, checked_window
from smollm.attention.cache import LayerCache
from smollm.attention.decay import ROW as DECAY_ROW
from smollm.attention.layers import Linear, QKNorm, head_norm, split_heads
from smollm.attention.options import Decay, OutputGate
from smollm.attention.rope import Rope
from smollm.attention.scaling import Llama3Scaling


class GroupedQueryAttention(Attention):
    """Softmax attention in which groups of query heads share one key and value head.

    Args:
        embed_dim: model width.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads.
        dropout: on the output. Default 0.
        bias: biases on the projections; "qkv" for all but the output's (Qwen 2). Default True.
        use_sliding_window, window_size: see only the latest window_size tokens, itself included;
            implies causality.
        qk_norm: True for LayerNorm over the head width before rotation, "rms" for RMSNorm,
            "rms-full" for RMSNorm over all heads together (OLMo 2). Default none.
        head_dim: width of a head. Default embed_dim / num_heads.
        norm_eps: what these norms add to a variance. Default 1e-5.
        is_causal: see no later token. Default False; inside a SmolLM always True.
        rotary: rotate queries and keys. Default True.
        rope_dim: how many features of a head are rotated, the first ones. Default all.
        rope_theta: rotary base. Default 100,000.
        rope_scaling: of the rotary frequencies. Default none.
        sinks: a learned logit per head, 0 at first, that joins the softmax and carries no value.
            Default False.
        decay: scores fall with the distance, see `smollm.attention.decay.KeyDecay`: "alibi",
            "learned" or "forget". Default "none".
        exclusive: take off a head's output its part along the token's own value. Default False.
        output_gate: sigmoid gates from x on the outputs of heads, one for each ("head") or one for
            each of its features ("element"). Default "none".

    Source: arXiv 2305.13245; sinks, arXiv 2309.17453.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        dropout: float = 0.0,
        bias: Bias = True,
        use_sliding_window: bool = False,
        window_size: int | None = None,
        qk_norm: QKNorm = False,
        is_causal: bool = False,
        *,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        rotary: bool = True,
        rope_dim: int | None = None,
        rope_theta: float = 100_000.0,
        rope_scaling: Llama3Scaling | None = None,
        sinks: bool = False,
        decay: Decay = "none",
        exclusive: bool = False,
        output_gate: OutputGate = "none",
    ) -> None:
        window_size = checked_window(use_sliding_window, window_size)
        if sinks and decay != "none":
            raise ValueError(
                f"decay: expected 'none' with sinks, which have no distance, got {decay!r}"
            )
        if not rotary and rope_dim:
            raise ValueError(f"rope_dim: expected None or 0 with rotary=False, got {rope_dim}")
        super().__init__(
            embed_dim,
            num_heads,
            head_dim=head_dim,
            dropout=dropout,
            window_size=window_size,
            is_causal=is_causal or use_sliding_window,
            rope_dim=rope_dim if rotary else 0,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            decay=decay,
            exclusive=exclusive,
            output_gate=output_gate,
        )
        if self.rotation.width > self.head_dim:
            raise ValueError(
                f"rope_dim: expected at most head_dim={self.head_dim}, got {self.rotation.width}"
            )
        check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        self.num_kv_heads = num_kv_heads
        q_dim, kv_dim = (heads * self.head_dim for heads in (num_heads, num_kv_heads))
        bias, out_bias = checked_bias(bias)
        self.q_proj = Linear(embed_dim, q_dim, bias=bias)
        self.k_proj = Linear(embed_dim, kv_dim, bias=bias)
        self.v_proj = Linear(embed_dim, kv_dim, bias=bias)
        self.out_proj = Linear(q_dim, embed_dim, bias=out_bias)
        self.sinks = nn.Parameter(torch.empty(num_heads)) if sinks else None
        self.norms_all_heads = qk_norm == "rms-full"
        q_width, k_width = (q_dim, kv_dim) if self.norms_all_heads else (self.head_dim,) * 2
        self.q_norm = head_norm(qk_norm, q_width, norm_eps)
        self.k_norm = head_norm(qk_norm, k_width, norm_eps)
        self.reset_parameters()

    def reset_constants(self) -> None:
        """Sinks start at 0, as a key that every query meets with that score."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def heads(  # noqa: D102
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        q, k = self.q_proj(x), self.k_proj(x)
        if self.norms_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = split_heads(q, self.num_heads), split_heads(k, self.num_kv_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if not self.norms_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.rotation.width:
            q, k = self._rotated(q, k, rope)
        key_bias = None if self.decay is None else self.decay(x, cache)
        if cache is not None:
            rings = cache.store(k=k, v=v, **({} if key_bias is None else {DECAY_ROW: key_bias}))
            if cache.decoding:
                o = attention_decode(
                    q,
                    rings["k"],
                    rings["v"],
                    cache.lengths,
                    window_size=self.window_size,
                    sinks=self.sinks,
                    key_bias=rings.get(DECAY_ROW),
                )
                return o, v
        o = attention(
            q,
            k,
            v,
            causal=self.is_causal,
            window_size=self.window_size,
            cu_seqlens=cu_seqlens,
            sinks=self.sinks,
            key_bias=key_bias,
        )
        return o, v

    def _rotated(self, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        width, heads = self.rotation.width, (self.num_heads, self.num_kv_heads)
        joint = rotate(torch.cat((q[..., :width], k[..., :width]), dim=2), *rope)
        turned_q, turned_k = joint.split_with_sizes(heads, dim=2)
        if width == self.head_dim:
            return turned_q, turned_k
        return (
            torch.cat((turned_q, q[..., width:]), dim=-1),
            torch.cat((turned_k, k[..., width:]), dim=-1),
        )


class MultiHeadAttention(GroupedQueryAttention):
    """Softmax attention with as many key and value heads as query heads.

    Arguments as `GroupedQueryAttention`, without num_kv_heads. Source: arXiv 1706.03762.
    """

    def __init__(self, embed_dim: int, num_heads: int, *shared: Any, **named: Any) -> None:
        super().__init__(embed_dim, num_heads, num_heads, *shared, **named)
