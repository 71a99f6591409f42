"""The eager oracle of every op: a few obvious lines each, in whatever type the inputs have.

`visible` is the one definition of who sees whom. Scores, softmaxes and sums are in fp32 (fp64 for
fp64 inputs), and weights are rounded to the values' type before they meet, as in the fused kernels:
on rounded inputs these are the twins that those are measured against, and in fp64 the truth.
Everything here is quadratic in T.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from kernels.autocast import product, without_autocast
from kernels.core.problem import bias_of
from kernels.derivatives import ask_for_gradients, is_traced


def visible(
    q_pos: Tensor,
    k_pos: Tensor,
    *,
    causal: bool = True,
    window_size: int | None = None,
    q_sequence: Tensor | None = None,
    k_sequence: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: 0 <= q_pos - k_pos < window_size, in the same sequence.

    Args:
        q_pos: [..., Tq] integer positions of the queries.
        k_pos: [..., Tk] integer positions of the keys.
        causal: False drops the condition 0 <= q_pos - k_pos.
        window_size: keys seen, the query's own included; None is unlimited.
        q_sequence, k_sequence: [..., Tq], [..., Tk] index of each token's packed sequence.

    Returns:
        Boolean [..., Tq, Tk].
    """
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    behind, ahead = reach(causal, window_size)
    seen = (distance <= behind) & (distance >= -ahead)
    if q_sequence is not None and k_sequence is not None:
        seen = seen & (q_sequence[..., :, None] == k_sequence[..., None, :])
    return seen


def reach(causal: bool, window_size: int | None) -> tuple[float, float]:
    """How many tokens behind its own place and ahead of it a query sees; inf is unlimited."""
    return math.inf if window_size is None else window_size - 1, 0 if causal else math.inf


def sequence_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Index of the packed sequence that each of `tokens` tokens belongs to, [T]."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


@without_autocast
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves rotated as in Llama: (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        x: [B, T, H, D], D even; x1 and x2 are the halves of its last axis.
        cos, sin: [T, D/2] or [B, T, D/2], fp32; no gradient reaches them.

    Returns:
        [B, T, H, D] in x's type, computed in at least fp32.

    Source: RoFormer, arXiv 2104.09864.
    """
    cos, sin = (y.detach() if y.requires_grad else y for y in (cos, sin))
    if ask_for_gradients(x) and not is_traced():
        rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    return _rotated(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = x.to(accumulator(x)).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # over heads
    x1, x2 = halves.unbind(-2)
    if is_traced():  # where what is in place ends vmap, and fixes the shapes of a graph
        rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    else:
        rotated = halves * cos.unsqueeze(-2)
        y1, y2 = rotated.unbind(-2)
        y1.addcmul_(x2, sin, value=-1)  # in place: new memory costs a CPU more than the sums
        y2.addcmul_(x1, sin)
        rotated = rotated.flatten(-2)
    # A cast to its own type would lose the gradient where PyTorch 2.11 compiles this.
    return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back, which needs nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(d, cos, -sin), None, None  # type: ignore[no-untyped-call]


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
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q k^T + bias) v over visible keys, and the lse: oracle of `attention`."""
    t_q, t_k = q.shape[1], k.shape[1]
    k_pos = torch.arange(t_k, device=q.device)
    q_pos = torch.arange(t_k - t_q, t_k, device=q.device)  # both sequences end together
    sequence = None if cu_seqlens is None else sequence_index(cu_seqlens, t_k)
    seen = visible(
        q_pos,
        k_pos,
        causal=causal,
        window_size=window_size,
        q_sequence=sequence,
        k_sequence=sequence,
    )
    return _attend(q, k, v, seen[None], scale, sinks, key_bias, q_pos[None])


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
) -> Tensor:
    """The newest tokens against their cache: oracle of `kernels.attention_decode`."""
    tokens, rows = q if q.dim() == 4 else q[:, None], k_cache.shape[1]
    seen = _seen_rows(cache_lengths, tokens.shape[1], rows, window_size)
    own_row = _newest_positions(cache_lengths, tokens.shape[1]) % max(rows, 1)
    o, _ = _attend(tokens, k_cache, v_cache, seen, scale, sinks, key_bias, own_row)
    return o.view(*q.shape[:-1], o.shape[-1])


def _seen_rows(lengths: Tensor, q_tokens: int, rows: int, window_size: int | None) -> Tensor:
    """Which rows of its sequence's ring each of the newest tokens sees, boolean [B, Tq, rows]."""
    q_pos = _newest_positions(lengths, q_tokens)
    k_pos = ring_positions(lengths, rows)
    return visible(q_pos, k_pos, window_size=window_size) & (k_pos >= 0)[:, None]


def _newest_positions(lengths: Tensor, tokens: int) -> Tensor:
    """Positions of the newest tokens of each sequence, [B, Tq]."""
    return lengths[:, None] - tokens + torch.arange(tokens, device=lengths.device)


def ring_positions(lengths: Tensor, rows: int) -> Tensor:
    """Position of the token in each row of a ring where token p stands at row p % rows.

    Args:
        lengths: [B], tokens of each sequence so far.
        rows: of the ring.

    Returns:
        int64 [B, rows]; negative where there is no token yet.
    """
    newest = lengths[:, None].long() - 1
    return newest - (newest - torch.arange(rows, device=lengths.device)) % max(rows, 1)


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
) -> Tensor:
    """Attention over q = [nope | rope], k = [nope | shared rope]: oracle of MLA as trained."""
    if q_rope is not None and k_rope is not None:
        shared = repeat(k_rope, "b t d -> b t h d", h=k_nope.shape[2])
        q_nope, k_nope = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, shared), dim=-1)
    o, _ = attention(
        q_nope, k_nope, v, causal=causal, window_size=window_size, scale=scale,
        cu_seqlens=cu_seqlens, key_bias=key_bias,
    )  # fmt: skip
    return o


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
) -> Tensor:
    """MLA absorbed: K = [latent | rope] and V = latent are one head that every query shares."""
    q, k = q_latent, latent_cache
    if q_rope is not None and rope_cache is not None:
        q, k = torch.cat((q, q_rope), dim=-1), torch.cat((k, rope_cache), dim=-1)
    k, v = k[:, :, None], latent_cache[:, :, None]
    return attention_decode(
        q, k, v, cache_lengths, window_size=window_size, scale=scale, key_bias=key_bias
    )


@without_autocast
def closed_form_fitness(
    expression: Tensor, g: Tensor, e: Tensor | None = None, *, environment: str = "query"
) -> Tensor:
    """gamma = softmax_D(log eps - log(phi + 1/2)): gene fitness at the game's equilibrium.

    Args:
        expression: phi [..., D], mean expression of each gene in the window, in (0, 1).
        g: [..., D], logits of the genes; eps = sigmoid(g) for "kin".
        e: [..., D], logits of the environment; eps = sigmoid(e) for "query".
        environment: "query" (default), "kin" or "none", where eps = 1.

    Returns:
        gamma [..., D] in expression's type, positive, summing to 1 over D.
    """
    logits = {"query": e, "kin": g, "none": None}[environment]
    rarity = -torch.log(expression + 0.5)
    if logits is None:
        return torch.softmax(rarity, dim=-1)
    return torch.softmax(rarity + F.logsigmoid(logits.to(rarity.dtype)), dim=-1)


def gene_fitness(
    g: Tensor,
    e: Tensor | None = None,
    *,
    window_size: int,
    environment: str = "query",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """gamma from the causal window's mean expression: oracle of `kernels.gene_fitness`."""
    position = torch.arange(g.shape[1], device=g.device)
    sequence = None if cu_seqlens is None else sequence_index(cu_seqlens, g.shape[1])
    seen = visible(
        position, position, window_size=window_size, q_sequence=sequence, k_sequence=sequence
    )
    genes = g.to(accumulator(g))
    share = seen.to(genes.dtype) / seen.sum(dim=-1, keepdim=True)  # 1/n_i on the window
    total = product(share, rearrange(torch.sigmoid(genes), "b j h d -> j (b h d)"))
    expression = total.reshape(genes.transpose(0, 1).shape).transpose(0, 1)
    return closed_form_fitness(expression, g, e, environment=environment)


def genetic_attention(
    g: Tensor,
    e: Tensor | None,
    v: Tensor,
    selection_pressure: Tensor,
    *,
    window_size: int,
    environment: str = "query",
    rope: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Selection of organisms by fitness <gamma_i, p_j>: oracle of `kernels.genetic_attention`."""
    gamma = gene_fitness(
        g, e, window_size=window_size, environment=environment, cu_seqlens=cu_seqlens
    )
    q, k = gene_queries(gamma, selection_pressure, rope).to(g.dtype), gene_keys(g, rope)
    o, _ = attention(q, k, v, window_size=window_size, scale=1.0, cu_seqlens=cu_seqlens)
    return o


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
    environment: str = "query",
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """MGA's newest tokens against their cache: oracle of `kernels.genetic_decode`."""
    q = gene_decode_queries(
        g,
        e,
        selection_pressure,
        g_cache,
        cache_lengths,
        window_size=window_size,
        environment=environment,
        rope=rope,
    )
    return attention_decode(q, k_cache, v_cache, cache_lengths, window_size=window_size, scale=1.0)


def gene_decode_queries(
    g: Tensor,
    e: Tensor | None,
    selection_pressure: Tensor,
    g_cache: Tensor,
    cache_lengths: Tensor,
    *,
    window_size: int,
    environment: str,
    rope: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The queries of MGA's newest tokens, in g's type."""
    seen = _seen_rows(cache_lengths, g.shape[1], g_cache.shape[1], window_size)
    genes = torch.sigmoid(g_cache.to(accumulator(g)))
    genes = genes.masked_fill(~seen.any(dim=1)[..., None, None], 0.0)
    share = seen.to(genes.dtype) / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    total = product(share, rearrange(genes, "b s h d -> b s (h d)"))
    gamma = closed_form_fitness(total.reshape(g.shape), g, e, environment=environment)
    return gene_queries(gamma, selection_pressure, rope).to(g.dtype)


@without_autocast
def gene_keys(g: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """k = R sigmoid(g): genes as the keys of MGA's selection, rounded once.

    Args:
        g: [B, T, H, D], logits of the genes.
        rope: (cos, sin) as `rotate` takes them, or None (default) for no rotation.

    Returns:
        [B, T, H, D] in g's type.
    """
    k = torch.sigmoid(g.to(accumulator(g)))
    return (k if rope is None else rotate(k, *rope)).to(g.dtype)


def gene_queries(
    gamma: Tensor, selection_pressure: Tensor, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    """q = kappa sqrt(D) R gamma: fitness as the queries of MGA's selection, in gamma's type."""
    q = gamma * selection_pressure[:, None] * gamma.shape[-1] ** 0.5
    return q if rope is None else rotate(q, *rope)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,  # boolean [B or 1, Tq, Tk]
    scale: float | None,
    sinks: Tensor | None,
    key_bias: Tensor | None,  # [B or 1, Tk, HQ]
    own_key: Tensor,  # [B or 1, Tq], place of each query's own key
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the seen keys, and its lse [B, Tq, HQ]."""
    heads, precise = q.shape[2], accumulator(q)
    unseen = ~seen.any(dim=1)[..., None, None]  # by every query; 0 * nan would reach the output
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    q = rearrange(q, "b i h d -> b h i d").to(precise)
    k = repeat(k, "b j h d -> b (h g) d j", g=heads // max(1, k.shape[2])).to(precise)
    v = repeat(v, "b j h d -> b (h g) j d", g=heads // max(1, v.shape[2]))
    scores = product(q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    own_bias = None
    if key_bias is not None:  # less that of the query's own key, or large ones would lose digits
        own_bias = bias_of(key_bias, own_key)
        distance = key_bias[:, None] - own_bias[:, :, None]
        scores = scores + rearrange(distance, "b i j h -> b h i j").to(precise)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))

    # A row that sees nothing must give zeros and finite gradients, so its pivot stays finite
    # and its total is replaced before the logarithm.
    pivot = scores.new_full((*scores.shape[:-1], 1), torch.finfo(precise).min)
    if scores.shape[-1]:
        pivot = torch.maximum(pivot, scores.detach().amax(dim=-1, keepdim=True))
    if sinks is not None:
        sinks = sinks.to(precise)[:, None, None]  # a key of no value that every query sees
        if own_bias is not None:
            sinks = (sinks - rearrange(own_bias, "b i h -> b h i 1")).to(precise)
        pivot = torch.maximum(pivot, sinks.detach())
    weights = torch.exp(scores - pivot)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - pivot)
    sees_any = total != 0
    total = torch.where(sees_any, total, 1.0)
    lse = torch.where(sees_any, pivot + torch.log(total), float("-inf"))
    weights, unit = weights / total, total.detach()  # a row's largest weight, times that, is 1
    weights = (weights * unit).to(v.dtype).to(precise) / unit  # so that it is never rounded
    o = product(weights, v.to(precise))
    lse = rearrange(lse, "b h i 1 -> b i h")
    if own_bias is not None:
        lse = (lse + own_bias).to(precise)
    return rearrange(o, "b h i d -> b i h d").to(v.dtype), lse


def accumulator(x: Tensor) -> torch.dtype:
    """The type that scores, sums and softmaxes of x are computed in: fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
