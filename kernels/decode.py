"""attention_decode(), latent_decode() and genetic_decode(): new tokens against caches."""

from typing import Any

from torch import Tensor

from kernels import checks, reference, sdpa
from kernels.autocast import without_autocast
from kernels.derivatives import without_backward
from kernels.operators import operator


def _decode_results(q: Tensor, k_cache: Tensor, v_cache: Tensor | None, *_: Any) -> Tensor:
    values = k_cache if v_cache is None else v_cache
    return q.new_empty(*q.shape[:-1], values.shape[-1])


@operator(
    "decode(Tensor q, Tensor k_cache, Tensor? v_cache, Tensor? q_rope, Tensor? rope_cache, "
    "Tensor cache_lengths, Tensor? sinks, Tensor? key_bias, int? window_size, float scale)"
    " -> Tensor",
    fake=_decode_results,
)
def _decode(*arguments: Any) -> Tensor:
    """o of q, as `launch_decode` takes them."""
    from kernels.core.decode import launch_decode

    return launch_decode(*arguments)


def _select_results(g: Tensor, *arguments: Any) -> Tensor:
    v_cache = arguments[-1]
    return g.new_empty(*g.shape[:-1], v_cache.shape[-1])


@operator(
    "select_decode(Tensor g, Tensor? e, Tensor pressure, Tensor? cos, Tensor? sin, Tensor g_cache, "
    "Tensor cache_lengths, int window_size, str environment, Tensor k_cache, Tensor v_cache)"
    " -> Tensor",
    fake=_select_results,
)
def _select_decode(*arguments: Any) -> Tensor:
    """o of MGA's newest tokens, the queries as `launch_gene_decode` makes them."""
    from kernels.core.decode import launch_decode
    from kernels.core.gene_decode import launch_gene_decode

    *genes, k_cache, v_cache = arguments
    q = launch_gene_decode(*genes)
    lengths, window_size, _ = genes[-3:]
    return launch_decode(q, k_cache, v_cache, None, None, lengths, None, None, window_size, 1.0)


def _without_gradients(operator: Any, *arguments: Any) -> Tensor:
    """operator(*arguments), whose backward is refused."""
    refusal = "decoding: expected no backward but of 'eager', got one"
    o: Tensor = without_backward(refusal, operator, *arguments)
    return o


@without_autocast
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    window_size: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Attention of the newest tokens to a cache: o = sum_s softmax_s(scale <q, k_s> + b_s) v_s.

    The cache is a ring: the token at position p stands at row p % S, so of a sequence longer
    than S its last S tokens are there. The token at position p sees positions s with
    max(0, p - window_size + 1) <= s <= p, of those in the cache. Rows that no query sees may hold
    anything, nan as well.

    Args:
        q: [B, HQ, D_QK], the newest token of each sequence, or [B, Tq, HQ, D_QK], its newest Tq,
            whose keys are in the cache already.
        k_cache: [B, S, HK, D_QK], HQ a multiple of HK.
        v_cache: [B, S, HV, D_V], HK a multiple of HV.
        cache_lengths: int32 [B], tokens of each sequence so far, those of q included. A token
            before position 0 sees nothing: o = 0.
        window_size: keys that a query sees, its own included; None (default) is unlimited.
        scale: factor > 0 on the scores. Default D_QK ** -0.5.
        sinks: [HQ], a logit per head that joins the softmax and carries no value.
        key_bias: b [B, S, HQ], or [1, S, HQ] for all, of the cache's rows, as in `attention`.
        impl: "triton", "sdpa", "eager", or "auto" (default): Triton for CUDA tensors, PyTorch's
            fused attention over the rows in use for CPU tensors none of which asks for its
            gradient, else eager. Types, widths and strides that Triton takes are those of
            `attention`; it never reads the lengths on the CPU. Both are deterministic and have no
            backward.

    Returns:
        [B, HQ, D_V] or [B, Tq, HQ, D_V] in q's type.

    Raises:
        ValueError, TypeError: an argument breaks its contract.

    Source: keys split over programs as in Flash-Decoding (Dao et al., 2023).
    """
    checks.attention_decode(
        q,
        k_cache,
        v_cache,
        cache_lengths,
        window_size=window_size,
        scale=scale,
        sinks=sinks,
        key_bias=key_bias,
    )
    window_size = checks.bounded(window_size)
    inputs = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    way = checks.implementation(impl, inputs, others=(sinks, key_bias))
    if way != "eager":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        caches = k_cache, v_cache, None, None, cache_lengths
        decode = sdpa.decode if way == "sdpa" else _decode
        bias = None if key_bias is None else key_bias.expand(q.shape[0], -1, -1)
        return _without_gradients(decode, q, *caches, sinks, bias, window_size, scale)
    return reference.attention_decode(
        q,
        k_cache,
        v_cache,
        cache_lengths,
        window_size=window_size,
        scale=scale,
        sinks=sinks,
        key_bias=key_bias,
    )


@without_autocast
def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor | None,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    cache_lengths: Tensor,
    *,
    window_size: int | None = None,
    scale: float,
    key_bias: Tensor | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """MLA's newest tokens, absorbed: scores and values straight from the latent cache.

        o_h = sum_s softmax_s(scale (<q_latent_h, c_s> + <q_rope_h, r_s>)) c_s

    With q_latent = q_nope W_k the score equals <q_nope, W_k c_s>, and o W_v^T is the head's
    output, so keys and values are never expanded. Positions, rows and lengths are those of
    `attention_decode`.

    Args:
        q_latent: [B, H, D_LATENT] or [B, Tq, H, D_LATENT], queries absorbed into the latent space.
        q_rope: [B, H, D_ROPE] or [B, Tq, H, D_ROPE], rotated queries, or None with rope_cache.
        latent_cache: c [B, S, D_LATENT].
        rope_cache: r [B, S, D_ROPE], the rotated key shared by all heads, or None.
        cache_lengths: int32 [B], tokens of each sequence so far, those of q included.
        window_size: rows that a query sees, its own included; None (default) is unlimited.
        scale: factor > 0 on the scores; required, since the widths here do not determine it.
        key_bias: [B, S, H], or [1, S, H] for all, of the cache's rows, as in `attention`.
        impl: as in `attention_decode`. Triton takes latents of up to 512, which with q_rope fill
            at most 576 columns of tiles (512 + 64).

    Returns:
        [B, H, D_LATENT] or [B, Tq, H, D_LATENT] in q_latent's type.

    Raises:
        ValueError, TypeError: an argument breaks its contract.

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
        key_bias=key_bias,
    )
    window_size = checks.bounded(window_size)
    inputs = {
        "q_latent": q_latent,
        "q_rope": q_rope,
        "latent_cache": latent_cache,
        "rope_cache": rope_cache,
    }
    way = checks.implementation(impl, inputs, widest=512, others=(key_bias,))
    if way != "eager":
        decode = sdpa.decode if way == "sdpa" else _decode
        caches = latent_cache, None, q_rope, rope_cache, cache_lengths
        bias = None if key_bias is None else key_bias.expand(q_latent.shape[0], -1, -1)
        return _without_gradients(decode, q_latent, *caches, None, bias, window_size, scale)
    return reference.latent_decode(
        q_latent,
        q_rope,
        latent_cache,
        rope_cache,
        cache_lengths,
        window_size=window_size,
        scale=scale,
        key_bias=key_bias,
    )


@without_autocast
def genetic_decode(
    g: Tensor,
    e: Tensor | None,
    selection_pressure: Tensor,
    g_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    window_size: int,
    environment: checks.Environment = "query",
    rope: tuple[Tensor, Tensor] | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """MGA's newest tokens select from a cache of genes, of their keys and of values.

        s_ij = kappa_h sqrt(D) <R_i gamma_i, k_j>
        o_i  = sum_{j in W(i)} softmax_j(s_ij) v_j

    with the gamma of `gene_fitness` over W(i), the rows that `attention_decode` shows a token in a
    window. Positions, rows and lengths are those of `attention_decode`, the new tokens' rows are in
    the cache already, and head h selects from value head h // (H / HV).

    Args:
        g: [B, Tq, H, D], logits of the genes of each sequence's newest Tq tokens.
        e: [B, Tq, H, D], logits of the environment, for "query" only; else None.
        selection_pressure: kappa [H], positive.
        g_cache: [B, S, H, D], logits of the genes of all tokens.
        k_cache: [B, S, H, D], their keys, as `gene_keys` makes them.
        v_cache: [B, S, HV, D_V], values, H a multiple of HV.
        cache_lengths: int32 [B], tokens of each sequence so far, those of g included. A token
            before position 0 sees nothing: o = 0.
        window_size: tokens in a full window, the token itself included. Required.
        environment: "query" (default), "kin" or "none".
        rope: (cos, sin) of the new tokens, each [B, Tq, D/2] fp32, or None (default).
        impl: as in `attention_decode`.

    Returns:
        [B, Tq, H, D_V] in g's type.

    Raises:
        ValueError, TypeError: an argument breaks its contract.
    """
    checks.genetic_decode(
        g,
        e,
        selection_pressure,
        g_cache,
        k_cache,
        v_cache,
        cache_lengths,
        window_size=window_size,
        environment=environment,
        rope=rope,
    )
    window_size = checks.bounded(window_size)
    inputs = {"g": g, "e": e, "g_cache": g_cache, "k_cache": k_cache, "v_cache": v_cache}
    way = checks.implementation(impl, inputs, others=(selection_pressure,))
    if way == "eager":
        return reference.genetic_decode(
            g,
            e,
            selection_pressure,
            g_cache,
            k_cache,
            v_cache,
            cache_lengths,
            window_size=window_size,
            environment=environment,
            rope=rope,
        )
    if way == "triton":
        cos, sin = (None, None) if rope is None else rope
        genes = g, e, selection_pressure, cos, sin, g_cache, cache_lengths
        return _without_gradients(
            _select_decode, *genes, window_size, environment, k_cache, v_cache
        )
    q = reference.gene_decode_queries(
        g,
        e,
        selection_pressure,
        g_cache,
        cache_lengths,
        window_size=window_size,
        environment=environment,
        rope=rope,
    )
    caches = k_cache, v_cache, None, None, cache_lengths
    return _without_gradients(sdpa.decode, q, *caches, None, None, window_size, 1.0)
