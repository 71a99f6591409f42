"""Every op on CPUs through PyTorch's fused attention, over the keys that blocks of queries see.

`kernels.reference` holds the scores of all pairs; here a block of queries meets the interval of
keys that one of them sees, so that memory and, under a window, time are linear in T. Numbers are in
fp32, or fp64 for fp64 inputs, throughout; biases of keys are compared in their own type.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from kernels import reference
from kernels.blocks import Block, blocks
from kernels.core.problem import Problem, bias_of
from kernels.derivatives import Function, ask_for_gradients, gradients, is_traced, run
from kernels.operators import operator
from kernels.sums import window_sums

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_BIASED_QUERIES = 64  # of a block whose mask is made of a bias: it then stays in the cache
_HIDDEN = -1e30  # a finite bias, as the lse that PyTorch gives rows of -inf alone is 0
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? cu_seqlens, float scale, "
    "bool causal, int? window"
)


def _by_blocks(*call: Any) -> tuple[Tensor, Tensor]:
    """o [B, Tq, HQ, D] and its lse [B, Tq, HQ]; q, k and v are of one width.

    With a bias of the keys, each query's lse is less that of its own key.
    """
    q, k, v, key_bias, _cu_seqlens, scale, *_ = call
    mask = _masks(q, k, key_bias)

    def of(block: Block) -> list[Tensor]:
        q_t, k_t, v_t = _heads_first(q[:, block.queries], k[:, block.keys], v[:, block.keys])
        o, lse = _flash(q_t, k_t, v_t, 0.0, block.is_causal, attn_mask=mask(block), scale=scale)
        if key_bias is not None:
            hidden = lse < _HIDDEN / 2
            o.masked_fill_(hidden[..., None], 0.0)
            lse.masked_fill_(hidden, -torch.inf)
        return _heads_first(o, lse)

    found = _blocks_of(*call)
    if _is_whole(found, q, k):
        o, lse = (x.contiguous() for x in of(found[0]))
        return o, lse
    o, lse = q.new_zeros(q.shape), q.new_full(q.shape[:-1], float("-inf"))
    for block in found:
        o[:, block.queries], lse[:, block.queries] = of(block)
    return o, lse


_forward = operator(
    f"sdpa({_CALL}) -> (Tensor, Tensor)",
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:-1])),
    folds=True,
)(_by_blocks)


@operator(
    f"sdpa_backward({_CALL}, Tensor o, Tensor lse, Tensor do) -> (Tensor, Tensor, Tensor)",
    fake=lambda *call: tuple(x.new_empty(x.shape) for x in call[:3]),
    folds=True,
)
def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    *call, o, lse, do = arguments
    q, k, v, key_bias, _cu_seqlens, scale, *_ = call
    if key_bias is not None:  # a query of hidden keys alone gives them no weight
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    mask = _masks(q, k, key_bias)

    def of(block: Block) -> list[Tensor]:
        rows, keys, _, is_causal = block
        do_t, q_t, k_t, v_t, o_t, lse_t = _heads_first(
            do[:, rows], q[:, rows], k[:, keys], v[:, keys], o[:, rows], lse[:, rows]
        )
        gradients = _flash_backward(
            do_t, q_t, k_t, v_t, o_t, lse_t, 0.0, is_causal, attn_mask=mask(block), scale=scale
        )
        return _heads_first(*gradients)

    found = _blocks_of(*call)
    if _is_whole(found, q, k):
        dq, dk, dv = (x.contiguous() for x in of(found[0]))
        return dq, dk, dv
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for block in found:
        dq[:, block.queries], dk_keys, dv_keys = of(block)
        dk[:, block.keys] += dk_keys
        dv[:, block.keys] += dv_keys
    return dq, dk, dv


def _blocks_of(
    q: Tensor,
    k: Tensor,
    _v: Tensor,
    key_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    _scale: float,
    causal: bool,
    window: int | None,
) -> list[Block]:
    if 0 in q.shape:
        return []
    return blocks(
        q.shape[1],
        k.shape[1],
        causal=causal,
        window_size=window,
        cu_seqlens=cu_seqlens,
        dtype=q.dtype,
        most=None if key_bias is None else _BIASED_QUERIES,
    )


def _masks(q: Tensor, k: Tensor, key_bias: Tensor | None) -> Callable[[Block], Tensor | None]:
    """What a block's scores have added: who sees whom, and how the keys' biases differ."""
    own_bias = Problem(q, k, k, key_bias=key_bias).own_bias
    if key_bias is None or own_bias is None:
        return lambda block: block.mask
    of_key, of_query = (x.transpose(1, 2).contiguous() for x in (key_bias, own_bias))

    def mask(block: Block) -> Tensor:
        distance = of_key[:, :, None, block.keys] - of_query[:, :, block.queries, None]
        distance = distance.to(q.dtype).clamp_(min=_HIDDEN)
        return distance if block.mask is None else distance.add_(block.mask)

    return mask


def _is_whole(found: list[Block], q: Tensor, k: Tensor) -> bool:
    """Whether one block has all queries and keys, so that its results need no other memory."""
    return [x[:2] for x in found] == [(slice(0, q.shape[1]), slice(0, k.shape[1]))]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """The axes of tokens and heads exchanged: into PyTorch's layout, or back."""
    return [x.transpose(1, 2) for x in tensors]


class _AttentionFunction(Function):
    """o and its lse; keeps the inputs and both for the backward."""

    @staticmethod
    def forward(with_dlse: bool, with_excess: bool, *call: Any) -> tuple[Tensor, Tensor]:
        o, lse = _forward(*call)
        return o, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.flags, tensors, ctx.plain = inputs[:2], inputs[2:7], inputs[7:]
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_bias, cu_seqlens, o, lse = ctx.saved_tensors
        with_dlse, with_excess = ctx.flags
        with_dbias = ctx.needs_input_grad[5]
        width, keys = q.shape[-1], k
        if with_dlse or with_excess or with_dbias:  # in one more column, whose scores are 0
            q, o = F.pad(q, (0, 1), value=float(with_dbias)), F.pad(o, (0, 1))
            v, do = F.pad(v, (0, 1), value=1.0), torch.cat((do, dlse[..., None]), dim=-1)
            k = F.pad(k, (0, 1), value=float(with_excess))  # so that dq has sum_j dS there
        dq, dk, dv = gradients(_backward, q, k, v, key_bias, cu_seqlens, *ctx.plain, o, lse, do)
        if with_excess:  # rounding alone, but of scores that are much like the token's own
            dq = torch.addcmul(dq, dq[..., width:], F.pad(keys, (0, 1)), value=-1)
        scale, *_ = ctx.plain
        dbias = (dk[..., width] / scale).to(key_bias.dtype) if with_dbias else None
        own = (d[..., :width] for d in (dq, dk, dv))
        return None, None, *own, dbias, *(None,) * (1 + len(ctx.plain))


def attention(
    problem: Problem, *, with_dlse: bool = False, with_excess: bool = False
) -> tuple[Tensor, Tensor]:
    """o [B, Tq, HQ, D_V] and its lse [B, Tq, HQ] as `reference.attention` has them.

    The lse has a gradient only if asked to. With the excess, for as many queries as keys and no
    bias, dq leaves out what rounding makes of sum_j dS = 0, as far as the keys are like the query's
    own.
    """
    sinks, own_bias = problem.sinks, problem.own_bias
    call = _arguments(problem)
    if ask_for_gradients(*call[:4]):
        o, lse = run(_AttentionFunction, with_dlse or sinks is not None, with_excess, *call)
    else:
        o, lse = _forward(*call)
    o = o[..., : problem.v.shape[-1]]
    if sinks is not None:
        o, lse = _with_sinks(o, lse, sinks if own_bias is None else sinks - own_bias)
    if own_bias is not None:
        lse = lse + own_bias
    return o.to(problem.v.dtype), lse.to(reference.accumulator(problem.q))


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """The problem, but its sinks, as `_by_blocks` takes it."""
    q, k, v, q_rope, k_rope, _sinks, key_bias, *plain = problem
    if q_rope is not None and k_rope is not None:
        shared = repeat(k_rope, "b t d -> b t h d", h=k.shape[2])
        q, k = torch.cat((q, q_rope), dim=-1), torch.cat((k, shared), dim=-1)
    if key_bias is not None and ask_for_gradients(key_bias):  # which differ by query head
        k = k.repeat_interleave(q.shape[2] // max(1, k.shape[2]), dim=2)
    return *_operands(q, k, v), key_bias, *plain


def _operands(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """All in the type that they are computed in, dense rows of one width, v with k's heads."""
    if v.shape[2] not in (0, k.shape[2]):
        v = v.repeat_interleave(k.shape[2] // v.shape[2], dim=2)
    columns, dtype = max(q.shape[-1], v.shape[-1]), reference.accumulator(q)
    return [_rows(x, columns, dtype) for x in (q, k, v)]


def _rows(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.shape[-1] < columns:
        return F.pad(x, (0, columns - x.shape[-1]))
    is_dense = x.stride(-1) == 1 and x.stride(1) >= columns
    return x if is_dense else x.contiguous()


def _with_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Both of the softmax that each head's sink has joined."""
    sinks = sinks.to(lse.dtype)
    sees_any = lse != float("-inf")
    finite = torch.where(sees_any, lse, 0.0)  # less a sink of -inf it must not be nan
    o = o * torch.sigmoid(finite - sinks)[..., None]
    alone = torch.where(sinks != float("-inf"), sinks, float("-inf"))  # without its gradient
    return o, torch.where(sees_any, torch.logaddexp(finite, sinks), alone)


def _new_output(q: Tensor, k_cache: Tensor, v_cache: Tensor | None, *_: Any) -> Tensor:
    """An empty output of decoding."""
    values = k_cache if v_cache is None else v_cache
    return q.new_empty(*q.shape[:-1], values.shape[-1])


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    q_rope: Tensor | None,
    rope_cache: Tensor | None,
    cache_lengths: Tensor,
    sinks: Tensor | None,
    key_bias: Tensor | None,
    window_size: int | None,
    scale: float,
) -> Tensor:
    """o of q [B, HQ, D_QK] or [B, Tq, HQ, D_QK]; without a v_cache latents are keys and values."""
    lengths = cache_lengths.tolist()
    if 0 in q.shape[:-1]:
        return _new_output(q, k_cache, v_cache)
    if q.dim() == 3:
        tokens = _decode(
            q[:, None],
            k_cache,
            v_cache,
            None if q_rope is None else q_rope[:, None],
            rope_cache,
            cache_lengths,
            sinks,
            key_bias,
            window_size,
            scale,
        )
        return tokens[:, 0]
    tensors = q, k_cache, v_cache, q_rope, rope_cache, key_bias
    rest = sinks, window_size, scale
    if lengths.count(lengths[0]) == len(lengths):
        return _decode_equal(lengths[0], *tensors, *rest)
    alone = ([None] * len(lengths) if x is None else torch.split(x, 1) for x in tensors)
    sequences: Any = zip(lengths, *alone, strict=True)
    equal: Any = _decode_equal
    return torch.cat([equal(*sequence, *rest) for sequence in sequences])


_decode_operator = operator(
    "sdpa_decode(Tensor q, Tensor k_cache, Tensor? v_cache, Tensor? q_rope, Tensor? rope_cache, "
    "Tensor cache_lengths, Tensor? sinks, Tensor? key_bias, int? window_size, float scale)"
    " -> Tensor",
    fake=_new_output,
)(_decode)


def decode(*arguments: Any) -> Tensor:
    """See `_decode`; an operator, which costs as much as what it does, only where it is traced."""
    o: Tensor = (_decode_operator if is_traced() else _decode)(*arguments)
    return o


def _decode_equal(
    length: int,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    q_rope: Tensor | None,
    rope_cache: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    window_size: int | None,
    scale: float,
) -> Tensor:
    """The same of sequences of one length."""
    batch, tokens, heads, _ = q.shape
    behind, _ahead = reference.reach(True, window_size)
    count = int(min(length, k_cache.shape[1], behind + tokens))  # of keys that any query sees
    k = _newest(k_cache if v_cache is not None else k_cache[:, :, None], length, count, tokens)
    if q_rope is not None and rope_cache is not None:
        q = torch.cat((q, q_rope), dim=-1)
        k = torch.cat((k, _newest(rope_cache, length, count, tokens)[:, :, None]), dim=-1)
    v = k if v_cache is None else _newest(v_cache, length, count, tokens)
    bias = None if key_bias is None else _newest(key_bias, length, count, tokens)
    o: Tensor
    if tokens == 1 and count:  # it sees all keys, so that the heads of a group pass for its tokens
        grouped, *in_use = _operands(q, k, v)
        grouped = grouped.reshape(batch, k.shape[2], heads // k.shape[2], -1)
        mask = None
        if key_bias is not None and bias is not None:
            newest = torch.full((batch, 1), (length - 1) % k_cache.shape[1])
            own = bias_of(key_bias, newest)
            mask = (bias - own).to(grouped.dtype).transpose(1, 2).reshape(*grouped.shape[:3], count)
            sinks = None if sinks is None else sinks - own
        o, lse = _flash(grouped, *_heads_first(*in_use), attn_mask=mask, scale=scale)
        o = o.reshape(batch, 1, heads, -1)
    else:
        problem = Problem(q, k, v, key_bias=bias, scale=scale, window_size=window_size)
        o, lse = _by_blocks(*_arguments(problem))
        if sinks is not None and problem.own_bias is not None:
            sinks = sinks - problem.own_bias
    if sinks is not None:
        o, _ = _with_sinks(o, lse.reshape(batch, tokens, heads), sinks)
    d_v = (k_cache if v_cache is None else v_cache).shape[-1]
    if o.shape[-1] != d_v or o.dtype != q.dtype:
        o = o[..., :d_v].to(q.dtype).contiguous()
    return o


def _newest(cache: Tensor, length: int, count: int, tokens: int) -> Tensor:
    """The rows of so many newest tokens of a ring, in order for more than one new token."""
    rows = cache.shape[1]
    if count == rows and tokens == 1:
        return cache
    start = (length - count) % max(rows, 1)
    if start + count <= rows:
        return cache[:, start : start + count]
    return torch.cat((cache[:, start:], cache[:, : start + count - rows]), dim=1)


def gene_fitness(
    g: Tensor,
    e: Tensor | None,
    *,
    window_size: int,
    environment: str,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """gamma as `reference.gene_fitness` has it, in time linear in T."""
    genes = torch.sigmoid(g.to(reference.accumulator(g)))
    own = genes.new_ones(1, genes.shape[1], 1, 1)
    total, population = (window_sums(x, cu_seqlens, window_size) for x in (genes, own))
    return reference.closed_form_fitness(total / population, g, e, environment=environment)


def genetic_attention(
    g: Tensor,
    e: Tensor | None,
    v: Tensor,
    selection_pressure: Tensor,
    *,
    window_size: int,
    environment: str,
    rope: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """o as `reference.genetic_attention` has it."""
    gamma = gene_fitness(
        g, e, window_size=window_size, environment=environment, cu_seqlens=cu_seqlens
    )
    q, k = reference.gene_queries(gamma, selection_pressure, rope), reference.gene_keys(g, rope)
    problem = Problem(  # whose default scale graphs of dynamic numbers could not share by layers
        q.to(g.dtype), k, v, scale=1.0, cu_seqlens=cu_seqlens, window_size=window_size
    )
    o, _ = attention(problem, with_excess=True)
    return o
