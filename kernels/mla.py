"""latent_attention(): multi-head latent attention in the form it is trained in."""

from torch import Tensor

from kernels import checks, reference


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
        scale: factor on the scores. Default (D_NOPE + D_ROPE) ** -0.5.
        cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1. Default None.
        impl: "auto" (default), "eager" or "triton".

    Returns:
        [B, T, H, D_V] in the inputs' type.

    Raises:
        ValueError, TypeError: an argument breaks its contract. NotImplementedError:
            impl="triton".

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
    )
    checks.eager_only(impl)
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
    )
