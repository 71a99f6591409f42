"""attention(): MHA, GQA and MQA, with windows, packing and sinks."""

from typing import Literal, overload

from torch import Tensor

from kernels import checks, reference


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: int | None = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: checks.Impl = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: int | None = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    impl: checks.Impl = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window_size: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: checks.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: o_i = sum_j softmax_j(scale <q_i, k_j>) v_j over the keys i sees.

    Counted from the end of both sequences, query t sees key s when 0 <= t - s < window_size.
    With window_size=3 and four tokens:

        t\\s  0 1 2 3
         0   x . . .
         1   x x . .
         2   x x x .
         3   . x x x

    Query head h reads key head h // (HQ / HK) and value head h // (HQ / HV).

    Args:
        q: [B, Tq, HQ, D_QK], fp16, bf16 or fp32 (fp64 in eager).
        k: [B, Tk, HK, D_QK], HQ a multiple of HK.
        v: [B, Tk, HV, D_V], HK a multiple of HV.
        causal: False lets every query see every key of its sequence. Default True.
        window_size: keys that a query sees, its own included; None (default) is unlimited.
        scale: factor on the scores. Default D_QK ** -0.5.
        cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1, Tq = Tk: tokens see
            only their own sequence. Default None.
        sinks: [HQ], a learned logit per head that joins the softmax, and so the lse, and
            carries no value. Default None.
        return_lse: also return the log-sum-exp of the scores. Default False.
        impl: "auto" (default), "eager" or "triton".

    Returns:
        o [B, Tq, HQ, D_V] in q's type; with return_lse also lse [B, Tq, HQ] in fp32, natural
        logarithm, differentiable. A row that sees no key gives o = 0, lse = -inf and zero
        gradients.

    Raises:
        ValueError, TypeError: an argument breaks its contract; the text names it, what was
            expected and what came. NotImplementedError: impl="triton".

    Source: Vaswani et al., arXiv 1706.03762; GQA, arXiv 2305.13245; sinks, arXiv 2309.17453.
    """
    checks.attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        scale=scale,
        cu_seqlens=cu_seqlens,
        sinks=sinks,
    )
    checks.implementation(impl)
    o, lse = reference.attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        scale=scale,
        cu_seqlens=cu_seqlens,
        sinks=sinks,
    )
    return (o, lse) if return_lse else o
