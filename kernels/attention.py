"""attention(): MHA, GQA and MQA, with windows, packing and sinks."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kernels import checks, reference, sdpa
from kernels.autocast import without_autocast
from kernels.core.problem import Problem, new_lse, new_rest
from kernels.derivatives import Function, ask_for_gradients, gradients, is_transformed, run
from kernels.operators import operator

PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_rope, Tensor? k_rope, Tensor? sinks, "
    "Tensor? key_bias, Tensor? cu_seqlens, float scale, bool causal, int? window_size"
)
TENSORS, KEY_BIAS = map(Problem._fields.index, ("scale", "key_bias"))


def _forward_results(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    return o, new_lse(q), new_rest(o, with_rest=others[-1])


@operator(
    f"forward({PROBLEM}, bool with_rest) -> (Tensor, Tensor, Tensor)",
    fake=_forward_results,
    folds=True,
)
def core_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, Tq, HQ, D_V], its base-2 lse [B, HQ, parts, Tq] and its rest, of a `Problem`.

    With a bias of the keys, each query's lse is less that of its own key. The rest is what rounding
    takes off o, for the backward; it has no elements in fp32 or unless asked for.
    """
    from kernels.core.forward import launch_forward

    *problem, with_rest = arguments
    return launch_forward(Problem(*problem), with_rest)


def _backward_results(*arguments: Any) -> tuple[Tensor, ...]:
    *problem, _o, lse_log2, _rest, _do, _dlse_log2, with_excess = arguments
    q, key_bias = problem[0], problem[KEY_BIAS]
    gradients = (q.new_empty((0,) * 4 if x is None else x.shape) for x in problem[:5])
    delta, nothing = torch.empty_like(lse_log2[:, :, 0]), (0,) * 3
    dkey_bias = delta.new_empty(nothing if key_bias is None else key_bias.shape)
    return *gradients, dkey_bias, delta, delta.new_empty(delta.shape if with_excess else nothing)


@operator(
    f"backward({PROBLEM}, Tensor o, Tensor lse_log2, Tensor rest, Tensor do, Tensor? dlse_log2, "
    "bool with_excess) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_results,
    folds=True,
)
def core_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """dq, dk, dv, dq_rope, dk_rope, dkey_bias, delta = <do, o> - dlse and excess = sum_j dS.

    The last two are [B, HQ, Tq].
    """
    from kernels.core.backward import launch_backward

    *problem, o, lse_log2, rest, do, dlse_log2, with_excess = arguments
    return launch_backward(Problem(*problem), o, lse_log2, rest, do, dlse_log2, with_excess)


class _AttentionFunction(Function):
    """o, its lse, with a gradient if asked to, and its rest; keeps the inputs and all three."""

    @staticmethod
    def forward(with_lse: bool, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = core_forward(*problem, True)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        with_lse, *problem = inputs
        ctx.save_for_backward(*problem[:TENSORS], *output)
        ctx.plain, ctx.with_lse = problem[TENSORS:], with_lse
        if not torch.compiler.is_compiling():  # which makes unread zeros nothing
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, dlse_log2: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        *tensors, o, lse_log2, rest = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.plain)
        do = torch.zeros_like(o) if do is None else do
        dlse_log2 = dlse_log2 if ctx.with_lse else None
        *own, dkey_bias, delta, _ = gradients(
            core_backward, *problem, o, lse_log2, rest, do, dlse_log2, False
        )
        present = (d if x is not None else None for x, d in zip(problem, own, strict=False))
        dsinks, weights = None, problem.sink_weights(lse_log2)
        if problem.sinks is not None and weights is not None:
            dsinks = -(weights * delta).sum((0, 2)).to(problem.sinks.dtype)
        dbias = None if problem.key_bias is None else dkey_bias.to(problem.key_bias.dtype)
        rest = (None,) * (len(problem) - len(own) - 2)
        return None, *present, dsinks, dbias, *rest


class _Joined(torch.autograd.Function):
    """o and lse as they are; either alone gives every input of both a gradient."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return o.view_as(o), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
        return do, dlse  # zeros where the loss does not reach


def fused_attention(problem: Problem, with_lse: bool = False) -> tuple[Tensor, Tensor]:
    """o [B, Tq, HQ, D_V] and base-2 lse [B, HQ, parts, Tq], which has a gradient if asked to."""
    o: Tensor
    lse_log2: Tensor
    if ask_for_gradients(*problem[:TENSORS]):
        o, lse_log2, _ = run(_AttentionFunction, with_lse, *problem)
    else:
        o, lse_log2, _ = core_forward(*problem, False)
    return o, lse_log2


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
    key_bias: Tensor | None = ...,
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
    key_bias: Tensor | None = ...,
    return_lse: Literal[True],
    impl: checks.Impl = ...,
) -> tuple[Tensor, Tensor]: ...
@without_autocast
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
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: checks.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: o_i = sum_j softmax_j(scale <q_i, k_j> + b_j) v_j over the keys i sees.

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
        scale: factor > 0 on the scores. Default D_QK ** -0.5.
        cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1, Tq = Tk: tokens see
            only their own sequence. Default None.
        sinks: [HQ], a learned logit per head that joins the softmax, and so the lse, and
            carries no value; -inf is none, inf and nan give nan. Default None.
        key_bias: b [B, Tk, HQ], or [1, Tk, HQ] for all, fp32 or fp64: added to a query head's
            scores of a key. Default None, for 0. Differences alone count, so that slope * position
            is ALiBi and a running sum of gates forgets; they are what is computed with, and in
            fp64 they keep the digits of fp32 at any length. -inf hides a key, so does -2**24 or
            less; a lesser mask on a query's own key takes digits from the others.
        return_lse: also return the log-sum-exp of the scores. Default False.
        impl: "triton", "sdpa", "eager", or "auto" (default): Triton for CUDA tensors, PyTorch's
            fused attention by blocks for CPU tensors, else eager. Triton takes fp16, bf16 and
            fp32, widths up to 256, any strides with the last one 1 (rows that do not begin and
            end at multiples of 16 elements as copies with such rows). Of both the backward is
            deterministic and has no backward of its own, which eager has. What "sdpa" rounds off
            its lse errs the gradients by up to |lse| eps of themselves, in fp32.

    Returns:
        o [B, Tq, HQ, D_V] in q's type; with return_lse also lse [B, Tq, HQ] in fp32, natural
        logarithm, differentiable. A row that sees no key gives o = 0, lse = -inf (without a
        sink) and zero gradients. An input that asks for its gradient gets one, zeros where the
        loss does not reach it; keys that no query sees may hold anything, and get zeros.

    Raises:
        ValueError, TypeError: an argument breaks its contract; the text names it, what was
            expected and what came.

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
        key_bias=key_bias,
    )
    window_size = checks.bounded(window_size)
    way = checks.implementation(impl, {"q": q, "k": k, "v": v})
    if way != "eager":
        if key_bias is not None:
            key_bias = key_bias.expand(q.shape[0], -1, -1)
        problem = Problem(
            q,
            k,
            v,
            sinks=sinks,
            key_bias=key_bias,
            cu_seqlens=cu_seqlens,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            causal=causal,
            window_size=window_size,
        )
        if way == "sdpa":
            o, lse = sdpa.attention(problem, with_dlse=return_lse)
            return (o, lse) if return_lse else o
        o, lse_log2 = fused_attention(problem, with_lse=return_lse)
        if not return_lse:
            return o
        lse = math.log(2) * lse_log2[:, :, 0].transpose(1, 2)
        own_bias = problem.own_bias
        return o, lse if own_bias is None else (lse + own_bias).float()
    o, lse = reference.attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        scale=scale,
        cu_seqlens=cu_seqlens,
        sinks=sinks,
        key_bias=key_bias,
    )
    if not return_lse:
        return o
    if not is_transformed():
        o, lse = _Joined.apply(o, lse)  # type: ignore[no-untyped-call]
    return o, lse
