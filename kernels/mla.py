"""latent_attention(): multi-head latent attention in the form it is trained in."""

from torch import Tensor

from kernels import checks, reference, sdpa
from kernels.attention import fused_attention
from kernels.autocast import without_autocast
from kernels.core.problem import Problem


@without_autocast
def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor | None,
    k_nope: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    *,
    causal: bool = True,
    window_size: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_bias: Tensor | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Attention with scores scale (<q_nope_i, k_nope_j> + <q_rope_i, k_rope_j>).

    Args:
        q_nope: [B, T, H, D_NOPE], the unrotated part of the queries.
        q_rope: [B, T, H, D_ROPE], the rotated part, or None together with k_rope.
        k_nope: [B, T, H, D_NOPE], keys expanded from the latent.
        k_rope: [B, T, D_ROPE], one rotated key shared by all heads, or None.
        v: [B, T, H, D_V], values expanded from the latent.
        causal: False lets every query see every key of its sequence. Default True.
        window_size: keys that a query sees, its own included; None (default) is unlimited.
        scale: factor > 0 on the scores. Default (D_NOPE + D_ROPE) ** -0.5.
        cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1. Default None.
        key_bias: [B, T, H], or [1, T, H] for all, as in `attention`. Default None.
        impl: as in `attention`, but that "sdpa" copies the shared key to every head. In Triton
            q_nope and q_rope together fill at most 256 columns of tiles (192 + 64, 128 + 128).

    Returns:
        [B, T, H, D_V] in the inputs' type.

    Raises:
        ValueError, TypeError: an argument breaks its contract.

    Source: DeepSeek-V2, arXiv 2405.04434.
    """
    checks.latent_attention(
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        v,
        causal=causal,
        window_size=window_size,
        scale=scale,
        cu_seqlens=cu_seqlens,
        key_bias=key_bias,
    )
    window_size = checks.bounded(window_size)
    inputs = {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "v": v}
    way = checks.implementation(impl, inputs)
    if way != "eager":
        if scale is None:
            rope_width = 0 if q_rope is None else q_rope.shape[-1]
            scale = (q_nope.shape[-1] + rope_width) ** -0.5
        problem = Problem(
            q_nope,
            k_nope,
            v,
            q_rope,
            k_rope,
            key_bias=None if key_bias is None else key_bias.expand(v.shape[0], -1, -1),
            cu_seqlens=cu_seqlens,
            scale=scale,
            causal=causal,
            window_size=window_size,
        )
        return (sdpa.attention(problem) if way == "sdpa" else fused_attention(problem))[0]
    return reference.latent_attention(
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        v,
        causal=causal,
        window_size=window_size,
        scale=scale,
        cu_seqlens=cu_seqlens,
        key_bias=key_bias,
    )
