"""The four mechanisms: project, normalise, rotate, then one call to a public op."""

import math
from collections import OrderedDict
from typing import Literal

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from kernels import (
    attention,
    attention_decode,
    closed_form_fitness,
    genetic_attention,
    latent_attention,
    latent_decode,
    ring_positions,
    rotate,
)
from smollm.cache import LayerCache
from smollm.padding import packing
from smollm.rope import Rope, rotary_tables, token_positions

QKNorm = bool | Literal["rms"]
NORM_EPS = 1e-5
LATENT_NORM_EPS = 1e-6  # DeepSeek's


class Attention(nn.Module):
    """What every mechanism shares: padding, positions, the output projection, initialisation.

    A mechanism implements `heads`. A SmolLM calls `forward` with rope tables for the whole
    stack; alone, a module makes its own.
    """

    out_proj: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float,
        window_size: int | None,
        is_causal: bool,
        rope_dim: int,
        rope_theta: float,
    ) -> None:
        super().__init__()
        _divides("num_heads", num_heads, "embed_dim", embed_dim)
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size: expected >= 1 (it counts itself), got {window_size}")
        if rope_dim % 2:
            raise ValueError(f"rotary width: expected an even number, got {rope_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.window_size = window_size
        self.is_causal = is_causal
        self.rope_dim = rope_dim  # 0 for a mechanism that does not rotate
        self.rope_theta = rope_theta
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rope: Rope | None = None,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, T, embed_dim].
            attention_mask: [B, T], True at real tokens, padding at the ends. Default none.
            rope: rotary tables of the tokens' positions. Default: counted from each start.
            cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1.
            cache: this layer's cache; with it x continues the sequences that it holds.

        Returns:
            [B, T, embed_dim]; zeros at padding.

        Raises:
            ValueError, TypeError: wrong shapes, or a mask that is not padding at the ends.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected [B, T, embed_dim={self.embed_dim}], got {list(x.shape)}")
        if attention_mask is not None:
            if rope is not None or cu_seqlens is not None or cache is not None:
                raise ValueError("attention_mask: expected None beside rope, cu_seqlens or cache")
            packed = packing(attention_mask, x.shape[0], x.shape[1])
            if packed is not None:
                return packed.unpack(self(packed.pack(x), cu_seqlens=packed.cu_seqlens))
        if rope is None:
            if cache is not None:
                raise ValueError("rope: expected the tables of the tokens' positions, got None")
            rope = self.rope(token_positions(x.shape[1], cu_seqlens, device=x.device))
        heads = self.heads(x, rope, cu_seqlens, cache)
        merged: Tensor = self.out_proj(rearrange(heads, "b t h d -> b t (h d)"))
        dropped: Tensor = self.dropout(merged)
        return dropped

    def heads(
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """Each head's output, [B, T, H, D_V]."""
        raise NotImplementedError

    def rope(self, positions: Tensor) -> Rope:
        """Rotary tables for positions [...], each [..., rope_dim / 2]."""
        return rotary_tables(positions, self.rope_dim, self.rope_theta)

    def score_and_value_width(self) -> int:
        """Multiply-adds per query-key pair: H (D_QK + D_V)."""
        return 2 * self.num_heads * self.head_dim

    def reset_parameters(self) -> None:
        """Draw projections from N(0, 1 / embed_dim); zero the biases; unit norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, self.embed_dim)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()


class GroupedQueryAttention(Attention):
    """Softmax attention in which groups of query heads share one key and value head.

    Args:
        embed_dim: model width, a multiple of num_heads.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads.
        dropout: on the output. Default 0.
        bias: biases on the projections. Default True.
        use_sliding_window, window_size: see only the latest window_size tokens, itself included;
            implies causality.
        qk_norm: True for LayerNorm over the head width before rotation, "rms" for RMSNorm.
        is_causal: see no later token. Default False; inside a SmolLM always True.
        rotary: rotate queries and keys. Default True.
        rope_theta: rotary base. Default 100,000.

    Source: arXiv 2305.13245.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        use_sliding_window: bool = False,
        window_size: int | None = None,
        qk_norm: QKNorm = False,
        is_causal: bool = False,
        *,
        rotary: bool = True,
        rope_theta: float = 100_000.0,
    ) -> None:
        window_size = _window(use_sliding_window, window_size)
        _divides("num_heads", num_heads, "embed_dim", embed_dim)
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            window_size=window_size,
            is_causal=is_causal or use_sliding_window,
            rope_dim=embed_dim // num_heads if rotary else 0,
            rope_theta=rope_theta,
        )
        _divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        self.num_kv_heads = num_kv_heads
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.q_norm = _head_norm(qk_norm, self.head_dim)
        self.k_norm = _head_norm(qk_norm, self.head_dim)
        self.reset_parameters()

    def heads(  # noqa: D102
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        q = _split(self.q_proj(x), self.num_heads)
        k = _split(self.k_proj(x), self.num_kv_heads)
        v = _split(self.v_proj(x), self.num_kv_heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope_dim:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            rings = cache.store(k=k, v=v)
            if cache.decoding:
                return attention_decode(
                    q, rings["k"], rings["v"], cache.lengths, window_size=self.window_size
                )
        return attention(
            q, k, v, causal=self.is_causal, window_size=self.window_size, cu_seqlens=cu_seqlens
        )


class MultiHeadAttention(GroupedQueryAttention):
    """Softmax attention with as many key and value heads as query heads.

    Arguments as `GroupedQueryAttention`, without num_kv_heads. Source: arXiv 1706.03762.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        use_sliding_window: bool = False,
        window_size: int | None = None,
        qk_norm: QKNorm = False,
        is_causal: bool = False,
        *,
        rotary: bool = True,
        rope_theta: float = 100_000.0,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_heads,
            dropout,
            bias,
            use_sliding_window,
            window_size,
            qk_norm,
            is_causal,
            rotary=rotary,
            rope_theta=rope_theta,
        )


class MultiHeadLatentAttention(Attention):
    """Attention whose keys and values are expanded from one small latent per token (MLA).

    The cache holds latent_dim + rope_dim numbers per token. Decoding absorbs the up-projection
    into the query and the output, so keys and values are never expanded there.

    Args:
        embed_dim, num_heads, dropout, use_sliding_window, window_size, is_causal: as in
            `GroupedQueryAttention`.
        latent_dim: width of the latent.
        rope_dim: width of the rotated part of each query and of the shared key; 0 for none.
            Default 32.
        q_latent_dim: width of a second latent, normalised as the first, that the queries are
            expanded from. Default none: queries are projected from x.
        bias: biases on the projections; up-projections never have one. Default True.
        qk_norm: as in `GroupedQueryAttention`, on the queries and on the shared rotary key.
            The keys expanded from the latent stay linear in it, which absorption needs, so
            rope_dim must not be 0; latents have an RMSNorm of their own in any case.
        rope_theta: rotary base. Default 100,000.

    Source: DeepSeek-V2, arXiv 2405.04434.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        latent_dim: int,
        rope_dim: int = 32,
        q_latent_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        use_sliding_window: bool = False,
        window_size: int | None = None,
        qk_norm: QKNorm = False,
        is_causal: bool = False,
        *,
        rope_theta: float = 100_000.0,
    ) -> None:
        window_size = _window(use_sliding_window, window_size)
        if latent_dim < 1:
            raise ValueError(f"latent_dim: expected >= 1, got {latent_dim}")
        if rope_dim < 0:
            raise ValueError(f"rope_dim: expected >= 0, got {rope_dim}")
        if q_latent_dim is not None and q_latent_dim < 1:
            raise ValueError(f"q_latent_dim: expected >= 1 or None, got {q_latent_dim}")
        if qk_norm and not rope_dim:
            raise ValueError(
                "qk_norm: expected False with rope_dim=0, where every key is expanded from the "
                f"latent and must stay linear in it, got {qk_norm!r}"
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            window_size=window_size,
            is_causal=is_causal or use_sliding_window,
            rope_dim=rope_dim,
            rope_theta=rope_theta,
        )
        self.latent_dim = latent_dim
        self.scale = (self.head_dim + rope_dim) ** -0.5
        q_dim = num_heads * (self.head_dim + rope_dim)
        self.q_proj: nn.Module = nn.Linear(embed_dim, q_dim, bias=bias)
        if q_latent_dim is not None:
            self.q_proj = nn.Sequential(
                OrderedDict(
                    down_proj=nn.Linear(embed_dim, q_latent_dim, bias=bias),
                    latent_norm=nn.RMSNorm(q_latent_dim, eps=LATENT_NORM_EPS),
                    up_proj=nn.Linear(q_latent_dim, q_dim, bias=False),
                )
            )
        self.kv_down_proj = nn.Linear(embed_dim, latent_dim + rope_dim, bias=bias)
        self.latent_norm = nn.RMSNorm(latent_dim, eps=LATENT_NORM_EPS)
        self.kv_up_proj = nn.Linear(latent_dim, num_heads * 2 * self.head_dim, bias=False)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.q_nope_norm = _head_norm(qk_norm, self.head_dim)
        self.q_rope_norm = _head_norm(qk_norm, rope_dim)
        self.k_rope_norm = _head_norm(qk_norm, rope_dim)
        self.reset_parameters()

    def heads(  # noqa: D102
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        q = _split(self.q_proj(x), self.num_heads)
        kv = self.kv_down_proj(x)
        q_nope = self.q_nope_norm(q[..., : self.head_dim]).to(q.dtype)
        latent = self.latent_norm(kv[..., : self.latent_dim]).to(q.dtype)
        q_rope = k_rope = None
        if self.rope_dim:
            q_rope = self.q_rope_norm(q[..., self.head_dim :]).to(q.dtype)
            k_rope = self.k_rope_norm(kv[..., self.latent_dim :]).to(q.dtype)
            q_rope = rotate(q_rope, *rope)
            k_rope = rotate(k_rope[:, :, None], *rope)[:, :, 0]
        if cache is not None:
            rings = cache.store(latent=latent, **({} if k_rope is None else {"rope": k_rope}))
            if cache.decoding:
                return self._decode(q_nope, q_rope, rings, cache.lengths)
        up = rearrange(
            self.kv_up_proj(latent), "b t (h two d) -> two b t h d", two=2, d=self.head_dim
        )
        return latent_attention(
            q_nope,
            q_rope,
            up[0],
            k_rope,
            up[1],
            causal=self.is_causal,
            window_size=self.window_size,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
        )

    def _decode(
        self, q_nope: Tensor, q_rope: Tensor | None, rings: dict[str, Tensor], lengths: Tensor
    ) -> Tensor:
        """Absorbed: <q_nope, W_k c> = <W_k^T q_nope, c>, and W_v is applied after the sum."""
        up = self.kv_up_proj.weight.to(q_nope.dtype)
        w_k, w_v = rearrange(up, "(h two d) c -> two h d c", two=2, d=self.head_dim)
        selected = latent_decode(
            einsum(q_nope, w_k, "b t h d, h d c -> b t h c"),
            q_rope,
            rings["latent"],
            rings.get("rope"),
            lengths,
            window_size=self.window_size,
            scale=self.scale,
        )
        o: Tensor = einsum(selected, w_v, "b t h c, h d c -> b t h d")
        return o

    def score_and_value_width(self) -> int:  # noqa: D102
        return self.num_heads * (2 * self.head_dim + self.rope_dim)


class MultiHeadGeneticAttention(Attention):
    """Selection of the window's tokens by the closed-form fitness of their genes (MGA).

    The tokens in a causal window are organisms, the features of a head their genes: a gene is the
    fitter the rarer it is in the window, an organism the fitter its genes are. The README's "MGA
    in one page" explains it, `kernels.genetic_attention` has the formulas. Always causal and always
    windowed, so there is no use_sliding_window.

    Args:
        d_model: model width, a multiple of num_heads.
        num_heads: heads.
        window_size: tokens in a full window, the token itself included. Required.
        num_value_heads: value heads, a divisor of num_heads. Default num_heads.
        environment: what re-weighs gene fitness: "query" (the token's own projection, default),
            "kin" (its genes) or "none".
        rotary: rotate genes and fitness. Default True.
        selection_pressure: initial kappa of every head, learned. Default 4.
        bias: biases on the projections. Default False.
        dropout: on the output. Default 0.
        rope_theta: rotary base. Default 100,000.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        window_size: int,
        num_value_heads: int | None = None,
        *,
        environment: Literal["query", "kin", "none"] = "query",
        rotary: bool = True,
        selection_pressure: float = 4.0,
        bias: bool = False,
        dropout: float = 0.0,
        rope_theta: float = 100_000.0,
    ) -> None:
        if window_size is None:
            raise ValueError("window_size: expected an integer >= 1 (the population), got None")
        if environment not in ("query", "kin", "none"):
            raise ValueError(f"environment: expected 'query', 'kin' or 'none', got {environment!r}")
        if not 0 < selection_pressure < math.inf:
            raise ValueError(f"selection_pressure: expected > 0, got {selection_pressure}")
        _divides("num_heads", num_heads, "d_model", d_model)
        super().__init__(
            d_model,
            num_heads,
            dropout=dropout,
            window_size=window_size,
            is_causal=True,
            rope_dim=d_model // num_heads if rotary else 0,
            rope_theta=rope_theta,
        )
        self.num_value_heads = num_heads if num_value_heads is None else num_value_heads
        _divides("num_value_heads", self.num_value_heads, "num_heads", num_heads)
        self.environment = environment
        self._initial_pressure = selection_pressure
        self.w_g = nn.Linear(d_model, d_model, bias=bias)
        self.w_e = nn.Linear(d_model, d_model, bias=bias) if environment == "query" else None
        self.w_v = nn.Linear(d_model, self.num_value_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.log_selection_pressure = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As every mechanism; the selection pressure starts at its given value."""
        super().reset_parameters()
        nn.init.constant_(self.log_selection_pressure, math.log(self._initial_pressure))

    def heads(  # noqa: D102
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        g = _split(self.w_g(x), self.num_heads)
        e = None if self.w_e is None else _split(self.w_e(x), self.num_heads)
        v = _split(self.w_v(x), self.num_value_heads)
        pressure = self.log_selection_pressure.exp()
        if cache is not None:
            rings = cache.store(p=torch.sigmoid(g), v=v)
            if cache.decoding:
                return self._decode(g, e, pressure, rope, rings, cache.lengths)
        assert self.window_size is not None
        return genetic_attention(
            g,
            e,
            v,
            pressure,
            window_size=self.window_size,
            environment=self.environment,
            rope=rope if self.rope_dim else None,
            cu_seqlens=cu_seqlens,
        )

    def _decode(
        self,
        g: Tensor,
        e: Tensor | None,
        pressure: Tensor,
        rope: Rope,
        rings: dict[str, Tensor],
        lengths: Tensor,
    ) -> Tensor:
        """The newest tokens against the ring, whose window is averaged anew."""
        assert self.window_size is not None
        p, q_tokens = rings["p"], g.shape[1]
        own = lengths[:, None] - q_tokens + torch.arange(q_tokens, device=g.device)
        position = ring_positions(lengths, p.shape[1])
        age = own[:, :, None] - position[:, None]
        seen = (age >= 0) & (age < self.window_size) & (position >= 0)[:, None]  # [B, T, rows]
        weights = seen.to(torch.promote_types(p.dtype, torch.float32))
        weights /= weights.sum(dim=-1, keepdim=True)
        expression = einsum(weights, p.to(weights.dtype), "b t s, b s h d -> b t h d")
        gamma = closed_form_fitness(expression, g, e, environment=self.environment)
        q = gamma * pressure[:, None] * self.head_dim**0.5
        if self.rope_dim:
            q, p = rotate(q, *rope), rotate(p, *self.rope(position))
        return attention_decode(
            q.to(p.dtype), p, rings["v"], lengths, window_size=self.window_size, scale=1.0
        )


def init_linear(linear: nn.Linear, embed_dim: int) -> None:
    """The one initialisation of every projection: N(0, 1 / embed_dim), zero bias."""
    nn.init.normal_(linear.weight, std=embed_dim**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b t (h d) -> b t h d", h=heads)


def _head_norm(qk_norm: QKNorm, width: int) -> nn.Module:
    if qk_norm not in (False, True, "rms"):
        raise ValueError(f"qk_norm: expected False, True or 'rms', got {qk_norm!r}")
    if not qk_norm or width == 0:
        return nn.Identity()
    norm = nn.RMSNorm if qk_norm == "rms" else nn.LayerNorm
    return norm(width, eps=NORM_EPS)


def _window(use_sliding_window: bool, window_size: int | None) -> int | None:
    if use_sliding_window and window_size is None:
        raise ValueError("window_size: expected an integer with use_sliding_window, got None")
    if not use_sliding_window and window_size is not None:
        raise ValueError(
            f"window_size: expected None without use_sliding_window, got {window_size}"
        )
    return window_size


def _divides(name: str, part: int, whole_name: str, whole: int) -> None:
    if part < 1 or whole % part:
        raise ValueError(f"{name}: expected a divisor of {whole_name}={whole}, got {part}")
