"""gene_fitness() and genetic_attention(): multi-head genetic attention (MGA).

The tokens in a causal window are organisms and the features of a head their genes. A gene is the
fitter the rarer it is in the window; an organism is selected by the fitness of its genes.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import checks, reference, sdpa
from kernels.autocast import without_autocast
from kernels.core.problem import Genes, Problem, new_lse, new_rest
from kernels.derivatives import Function, ask_for_gradients, gradients, run
from kernels.operators import operator
from kernels.reference import closed_form_fitness

__all__ = ["closed_form_fitness", "gene_fitness", "genetic_attention"]


GENES = (
    "Tensor g, Tensor? e, Tensor? pressure, Tensor? cos, Tensor? sin, Tensor? cu_seqlens, "
    "int window_size, str environment"
)
TENSORS = Genes._fields.index("window_size")


def _fitness_results(
    g: Tensor, e: Tensor | None, pressure: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    if pressure is None:
        return g.new_empty(g.shape, dtype=torch.float32), g.new_empty((0,) * 4)
    return g.new_empty(g.shape), g.new_empty(g.shape)


@operator(f"fitness({GENES}) -> (Tensor, Tensor)", fake=_fitness_results, folds=True)
def _fitness(*genes: Any) -> tuple[Tensor, Tensor]:
    """q and k of a selection among `Genes`; without a pressure gamma, and nothing."""
    from kernels.core.fitness import launch_fitness

    return launch_fitness(Genes(*genes))


def _fitness_backward_results(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    genes = Genes(*arguments[: len(Genes._fields)])
    g = genes.g
    dlogits = g.new_empty((0,) * 4 if genes.environment == "none" else g.shape)
    dpressure = g.new_empty(0 if genes.pressure is None else g.shape[2], dtype=torch.float32)
    return g.new_empty(g.shape), dlogits, dpressure


@operator(
    f"fitness_backward({GENES}, Tensor dq, Tensor? dk, Tensor? excess) -> (Tensor, Tensor, Tensor)",
    fake=_fitness_backward_results,
)
def _fitness_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dg, the gradient of eps' logits, and dpressure [H] in fp32; of absent inputs, empty ones."""
    from kernels.core.fitness import launch_fitness_backward

    *genes, dq, dk, excess = arguments
    return launch_fitness_backward(Genes(*genes), dq, dk, excess)


def _selected(genes: Genes, q: Tensor, k: Tensor, v: Tensor) -> Problem:
    return Problem(q, k, v, cu_seqlens=genes.cu_seqlens, window_size=genes.window_size)


def _select_results(g: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, v, with_rest = arguments
    o = g.new_empty(*g.shape[:-1], v.shape[-1])
    return o, new_lse(g), new_rest(o, with_rest)


@operator(
    f"select({GENES}, Tensor v, bool with_rest) -> (Tensor, Tensor, Tensor)",
    fake=_select_results,
    folds=True,
)
def _select(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o, base-2 lse and rest of the attention that selects among v by the fitness of `Genes`."""
    from kernels.core.fitness import launch_fitness
    from kernels.core.forward import launch_forward

    *given, v, with_rest = arguments
    genes = Genes(*given)
    return launch_forward(_selected(genes, *launch_fitness(genes), v), with_rest)


def _select_backward_results(*arguments: Any) -> tuple[Tensor, ...]:
    *genes, v, _o, _lse_log2, _rest, _do = arguments
    return v.new_empty(v.shape), *_fitness_backward_results(*genes)


@operator(
    f"select_backward({GENES}, Tensor v, Tensor o, Tensor lse_log2, Tensor rest, Tensor do)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_select_backward_results,
)
def _select_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """dv, then what `_fitness_backward` gives; q and k are formed anew."""
    from kernels.core.backward import launch_backward
    from kernels.core.fitness import launch_fitness, launch_fitness_backward, sum_blocks

    *given, v, o, lse_log2, rest, do = arguments
    genes = Genes(*given)
    windows = sum_blocks(genes)
    problem = _selected(genes, *launch_fitness(genes, windows), v)
    dq, dk, dv, *_, excess = launch_backward(problem, o, lse_log2, rest, do, None, with_excess=True)
    return dv, *launch_fitness_backward(genes, dq, dk, excess, windows)


class _FitnessFunction(Function):
    """gamma; keeps the inputs for the backward."""

    @staticmethod
    def forward(*genes: Any) -> Tensor:
        gamma: Tensor
        gamma, _ = _fitness(*genes)
        return gamma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:TENSORS])
        ctx.plain = inputs[TENSORS:]

    @staticmethod
    def backward(ctx: Any, dgamma: Tensor) -> tuple[Tensor | None, ...]:
        genes = Genes(*ctx.saved_tensors, *ctx.plain)
        dg, de, _ = gradients(_fitness_backward, *genes, dgamma, None, None)
        return dg, None if genes.e is None else de, *(None,) * (len(genes) - 2)


class _GeneticFunction(Function):
    """o, and its lse and rest, which have no gradient; keeps the inputs and all three."""

    @staticmethod
    def forward(v: Tensor, *genes: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = _select(*genes, v, True)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        v, *genes = inputs
        ctx.save_for_backward(*genes[:TENSORS], v, *output)
        ctx.plain = genes[TENSORS:]
        if not torch.compiler.is_compiling():  # which makes unread zeros nothing
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, v, o, lse_log2, rest = ctx.saved_tensors
        genes = Genes(*tensors, *ctx.plain)
        dv, dg, de, dpressure = gradients(_select_backward, *genes, v, o, lse_log2, rest, do)
        assert genes.pressure is not None
        dpressure = dpressure.to(genes.pressure.dtype)
        return dv, dg, None if genes.e is None else de, dpressure, *(None,) * (len(genes) - 3)


@without_autocast
def gene_fitness(
    g: Tensor,
    e: Tensor | None = None,
    *,
    window_size: int,
    environment: checks.Environment = "query",
    cu_seqlens: Tensor | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Fitness of each gene as each token sees it, over the window W(i) of n_i tokens.

        p     = sigmoid(g)
        phi_i = 1/n_i sum_{j in W(i)} p_j
        gamma_i = softmax_D(log eps_i - log(phi_i + 1/2))

    with eps = sigmoid(e) for environment "query", p for "kin" and 1 for "none".

    Args:
        g: [B, T, H, D], logits of the genes.
        e: [B, T, H, D], logits of the environment, for "query" only; else None.
        window_size: tokens in a full window, the token itself included. Required.
        environment: "query" (default), "kin" or "none".
        cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1. Default None.
        impl: as in `attention`; "sdpa" takes running sums, in time linear in T.

    Returns:
        gamma [B, T, H, D] in fp32 (fp64 for fp64 inputs), summing to 1 over D.

    Raises:
        ValueError, TypeError: an argument breaks its contract; the text names it, what was
            expected and what came.

    Source: the closed form is the equilibrium of the dominant-gene, balanced-organism game of
        Genetic AI, arXiv 2501.19113, under the replicator equation.
    """
    checks.gene_fitness(
        g, e, window_size=window_size, environment=environment, cu_seqlens=cu_seqlens
    )
    window_size = checks.bounded(window_size)
    way = checks.implementation(impl, {"g": g, "e": e})
    if way == "triton":
        genes = Genes(g, e, None, None, None, cu_seqlens, window_size, environment)
        gamma: Tensor = run(_FitnessFunction, *genes)
        return gamma
    fitness = sdpa.gene_fitness if way == "sdpa" else reference.gene_fitness
    return fitness(g, e, window_size=window_size, environment=environment, cu_seqlens=cu_seqlens)


@without_autocast
def genetic_attention(
    g: Tensor,
    e: Tensor | None,
    v: Tensor,
    selection_pressure: Tensor,
    *,
    window_size: int,
    environment: checks.Environment = "query",
    rope: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Causal selection of the window's organisms by the fitness of their genes.

        s_ij = kappa_h sqrt(D) <R_i gamma_i, R_j p_j>        gamma, p as in `gene_fitness`
        o_i  = sum_{j in W(i)} softmax_j(s_ij) v_j

    where R is the rotary embedding, or the identity when rope is None. Head h selects from value
    head h // (H / HV).

    Args:
        g: [B, T, H, D], logits of the genes.
        e: [B, T, H, D], logits of the environment, for "query" only; else None.
        v: [B, T, HV, D_V], values, H a multiple of HV.
        selection_pressure: kappa [H], positive.
        window_size: tokens in a full window, the token itself included. Required.
        environment: "query" (default), "kin" or "none".
        rope: (cos, sin), each [T, D/2] fp32, or None (default); no gradient reaches them.
        cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1. Default None.
        impl: as in `attention`.

    Returns:
        [B, T, H, D_V] in g's type.

    Raises:
        ValueError, TypeError: an argument breaks its contract; the text names it, what was
            expected and what came.
    """
    checks.genetic_attention(
        g,
        e,
        v,
        selection_pressure,
        window_size=window_size,
        environment=environment,
        rope=rope,
        cu_seqlens=cu_seqlens,
    )
    window_size = checks.bounded(window_size)
    way = checks.implementation(impl, {"g": g, "e": e, "v": v})
    if way == "triton":
        cos, sin = (None, None) if rope is None else rope
        genes = Genes(g, e, selection_pressure, cos, sin, cu_seqlens, window_size, environment)
        o: Tensor
        if ask_for_gradients(v, *genes[:TENSORS]):
            o, *_ = run(_GeneticFunction, v, *genes)
        else:
            o, *_ = _select(*genes, v, False)
        return o
    select = sdpa.genetic_attention if way == "sdpa" else reference.genetic_attention
    return select(
        g,
        e,
        v,
        selection_pressure,
        window_size=window_size,
        environment=environment,
        rope=rope,
        cu_seqlens=cu_seqlens,
    )
