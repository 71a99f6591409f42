"""Multi-head latent attention (MLA)."""

from collections import OrderedDict

from einops import einsum, rearrange
from torch import Tensor, nn

from kernels import latent_attention, latent_decode, rotate
from smollm.attention.base import Attention, Bias, checked_bias, checked_window
from smollm.attention.cache import LayerCache
from smollm.attention.decay import ROW as DECAY_ROW
from smollm.attention.layers import Linear, QKNorm, RMSNorm, head_norm, split_heads
from smollm.attention.options import Decay, OutputGate
from smollm.attention.rope import Rope
from smollm.attention.scaling import Llama3Scaling

LATENT_NORM_EPS = 1e-6  # DeepSeek's, whatever its config says


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
        bias: biases on the projections, "qkv" for all but the output's; up-projections never have
            one. Default True.
        qk_norm: as in `GroupedQueryAttention`, on the queries and on the shared rotary key.
            The keys expanded from the latent stay linear in it, which absorption needs, so
            rope_dim must not be 0, and no norm joins the heads as "rms-full" does; latents have an
            RMSNorm of their own in any case.
        head_dim: width of the part of queries and keys that is not rotated. Default
            embed_dim / num_heads.
        value_dim: width of the values. Default head_dim.
        norm_eps: as in `GroupedQueryAttention`; the latents' norms have DeepSeek's 1e-6.
        rope_theta, rope_scaling, decay, exclusive, output_gate: as in `GroupedQueryAttention`.

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
        bias: Bias = True,
        use_sliding_window: bool = False,
        window_size: int | None = None,
        qk_norm: QKNorm = False,
        is_causal: bool = False,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        norm_eps: float = 1e-5,
        rope_theta: float = 100_000.0,
        rope_scaling: Llama3Scaling | None = None,
        decay: Decay = "none",
        exclusive: bool = False,
        output_gate: OutputGate = "none",
    ) -> None:
        window_size = checked_window(use_sliding_window, window_size)
        if latent_dim < 1:
            raise ValueError(f"latent_dim: expected >= 1, got {latent_dim}")
        if rope_dim < 0:
            raise ValueError(f"rope_dim: expected >= 0, got {rope_dim}")
        if q_latent_dim is not None and q_latent_dim < 1:
            raise ValueError(f"q_latent_dim: expected >= 1 or None, got {q_latent_dim}")
        if value_dim is not None and value_dim < 1:
            raise ValueError(f"value_dim: expected >= 1 or None, got {value_dim}")
        if qk_norm == "rms-full":
            raise ValueError(
                "qk_norm: expected False, True or 'rms' with MLA, whose heads share the only key "
                f"that has a norm, got {qk_norm!r}"
            )
        if qk_norm and not rope_dim:
            raise ValueError(
                "qk_norm: expected False with rope_dim=0, where every key is expanded from the "
                f"latent and must stay linear in it, got {qk_norm!r}"
            )
        super().__init__(
            embed_dim,
            num_heads,
            head_dim=head_dim,
            dropout=dropout,
            window_size=window_size,
            is_causal=is_causal or use_sliding_window,
            rope_dim=rope_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            value_dim=value_dim,
            decay=decay,
            exclusive=exclusive,
            output_gate=output_gate,
        )
        self.latent_dim = latent_dim
        self.rope_dim = rope_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.scale = (self.head_dim + rope_dim) ** -0.5
        bias, out_bias = checked_bias(bias)
        q_dim = num_heads * (self.head_dim + rope_dim)
        self.q_proj: nn.Module = Linear(embed_dim, q_dim, bias=bias)
        if q_latent_dim is not None:
            self.q_proj = nn.Sequential(
                OrderedDict(
                    down_proj=Linear(embed_dim, q_latent_dim, bias=bias),
                    latent_norm=RMSNorm(q_latent_dim, eps=LATENT_NORM_EPS),
                    up_proj=Linear(q_latent_dim, q_dim, bias=False),
                )
            )
        self.kv_down_proj = Linear(embed_dim, latent_dim + rope_dim, bias=bias)
        self.latent_norm = RMSNorm(latent_dim, eps=LATENT_NORM_EPS)
        kv_dim = num_heads * (self.head_dim + self.value_dim)
        self.kv_up_proj = Linear(latent_dim, kv_dim, bias=False)
        self.out_proj = Linear(num_heads * self.value_dim, embed_dim, bias=out_bias)
        self.q_nope_norm = head_norm(qk_norm, self.head_dim, norm_eps)
        self.q_rope_norm = head_norm(qk_norm, rope_dim, norm_eps)
        self.k_rope_norm = head_norm(qk_norm, rope_dim, norm_eps)
        self.reset_parameters()

    def heads(  # noqa: D102
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        q = split_heads(self.q_proj(x), self.num_heads)
        kv = self.kv_down_proj(x)
        q_nope = self.q_nope_norm(q[..., : self.head_dim]).to(q.dtype)
        latent = self.latent_norm(kv[..., : self.latent_dim]).to(q.dtype)
        q_rope = k_rope = None
        if self.rope_dim:
            q_rope = self.q_rope_norm(q[..., self.head_dim :]).to(q.dtype)
            k_rope = self.k_rope_norm(kv[..., self.latent_dim :]).to(q.dtype)
            q_rope = rotate(q_rope, *rope)
            k_rope = rotate(k_rope[:, :, None], *rope)[:, :, 0]
        key_bias = None if self.decay is None else self.decay(x, cache)
        if cache is not None:
            optional = {"rope": k_rope, DECAY_ROW: key_bias}
            rows = {name: row for name, row in optional.items() if row is not None}
            rings = cache.store(latent=latent, **rows)
            if cache.decoding:
                o = self._decode(q_nope, q_rope, rings, cache.lengths)
                return o, self._expanded(latent)[1] if self.exclusive else None
        k_nope, v = self._expanded(latent)
        o = latent_attention(
            q_nope,
            q_rope,
            k_nope,
            k_rope,
            v,
            causal=self.is_causal,
            window_size=self.window_size,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
            key_bias=key_bias,
        )
        return o, v

    def _expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without rotation and values, [B, T, H, head_dim] and [B, T, H, value_dim]."""
        up = split_heads(self.kv_up_proj(latent), self.num_heads)
        k_nope, v = up.split_with_sizes((self.head_dim, self.value_dim), dim=-1)
        return k_nope, v

    def _decode(
        self, q_nope: Tensor, q_rope: Tensor | None, rings: dict[str, Tensor], lengths: Tensor
    ) -> Tensor:
        """Absorbed: <q_nope, W_k c> = <W_k^T q_nope, c>, and W_v is applied after the sum."""
        up = self.kv_up_proj.weight.to(q_nope.dtype)
        up = rearrange(up, "(h d) c -> h d c", h=self.num_heads)
        w_k, w_v = up.split_with_sizes((self.head_dim, self.value_dim), dim=1)
        selected = latent_decode(
            einsum(q_nope, w_k, "b t h d, h d c -> b t h c"),
            q_rope,
            rings["latent"],
            rings.get("rope"),
            lengths,
            window_size=self.window_size,
            scale=self.scale,
            key_bias=rings.get(DECAY_ROW),
        )
        o: Tensor = einsum(selected, w_v, "b t h c, h d c -> b t h d")
        return o

    def score_and_value_width(self) -> int:  # noqa: D102
        return self.num_heads * (self.head_dim + self.rope_dim + self.value_dim)
