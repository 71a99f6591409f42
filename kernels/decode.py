"""attention_decode() and latent_decode(): one new token per sequence against its cache."""

from torch import Tensor

from kernels import checks, reference


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    window_size: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Attention of the newest token: o = sum_s softmax_s(scale <q, k_s>) v_s.

    The token stands at position cache_lengths - 1 and sees keys s with
    max(0, cache_lengths - window_size) <= s < cache_lengths.

    Args:
        q: [B, HQ, D_QK], one query per sequence.
        k_cache: [B, S, HK, D_QK], HQ a multiple of HK.
        v_cache: [B, S, HV, D_V], HK a multiple of HV.
        cache_lengths: int32 [B], rows in use, the new token's included. 0 gives o = 0.
        window_size: keys that the query sees, its own included; None (default) is unlimited.
        scale: factor on the scores. Default D_QK ** -0.5.
        sinks: [HQ], a logit per head that joins the softmax and carries no value.
        impl: "auto" (default), "eager" or "triton".

    Returns:
        [B, HQ, D_V] in q's type.

    Raises:
        ValueError, TypeError: an argument breaks its contract. NotImplementedError:
            impl="triton".
    """
    checks.attention_decode(
        q, k_cache, v_cache, cache_lengths, window_size=window_size, scale=scale, sinks=sinks
    )
    checks.eager_only(impl)
    return reference.attention_decode(
        q, k_cache, v_cache, cache_lengths, window_size=window_size, scale=scale, sinks=sinks
    )


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor | None,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    cache_lengths: Tensor,
    *,
    window_size: int | None = None,
    scale: float,
    impl: checks.Impl = "auto",
) -> Tensor:
    """MLA's newest token, absorbed: scores and values straight from the latent cache.

        o_h = sum_s softmax_s(scale (<q_latent_h, c_s> + <q_rope_h, r_s>)) c_s

    With q_latent = q_nope W_k the score equals <q_nope, W_k c_s>, and o W_v^T is the head's
    output, so keys and values are never expanded.

    Args:
        q_latent: [B, H, D_LATENT], queries absorbed into the latent space.
        q_rope: [B, H, D_ROPE], rotated queries, or None together with rope_cache.
        latent_cache: c [B, S, D_LATENT].
        rope_cache: r [B, S, D_ROPE], the rotated key shared by all heads, or None.
        cache_lengths: int32 [B], rows in use, the new token's included. 0 gives o = 0.
        window_size: rows that the query sees, its own included; None (default) is unlimited.
        scale: factor on the scores; required, since the widths here do not determine it.
        impl: "auto" (default), "eager" or "triton".

    Returns:
        [B, H, D_LATENT] in q_latent's type.

    Raises:
        ValueError, TypeError: an argument breaks its contract. NotImplementedError:
            impl="triton".

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """
    checks.latent_decode(
        q_latent,
        q_rope,
        latent_cache,
        rope_cache,
        cache_lengths,
        window_size=window_size,
        scale=scale,
    )
    checks.eager_only(impl)
    return reference.latent_decode(
        q_latent,
        q_rope,
        latent_cache,
        rope_cache,
        cache_lengths,
        window_size=window_size,
        scale=scale,
    )
