"""gene_fitness() and genetic_attention(): multi-head genetic attention (MGA).

The tokens in a causal window are organisms and the features of a head their genes. A gene is the
fitter the rarer it is in the window; an organism is selected by the fitness of its genes.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import checks, reference
from kernels.attention import core_backward, core_forward
from kernels.reference import closed_form_fitness

__all__ = ["closed_form_fitness", "gene_fitness", "genetic_attention"]


@torch.library.custom_op("smollm_attention::fitness", mutates_args=())
def _fitness(
    g: Tensor,
    e: Tensor | None,
    pressure: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    window_size: int,
    environment: str,
) -> tuple[Tensor, Tensor]:
    """q and k of a selection; without a pressure gamma, and nothing."""
    from kernels.core.fitness import launch_fitness

    return launch_fitness(g, e, pressure, cos, sin, cu_seqlens, window_size, environment)


@_fitness.register_fake
def _(g: Tensor, e: Tensor | None, pressure: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    if pressure is None:
        return g.new_empty(g.shape, dtype=torch.float32), g.new_empty((0,) * 4)
    return g.new_empty(g.shape), g.new_empty(g.shape)


@torch.library.custom_op("smollm_attention::fitness_backward", mutates_args=())
def _fitness_backward(
    g: Tensor,
    e: Tensor | None,
    pressure: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    dq: Tensor,
    dk: Tensor | None,
    excess: Tensor | None,
    window_size: int,
    environment: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, the gradient of eps' logits, and dpressure [H] in fp32; of absent inputs, empty ones."""
    from kernels.core.fitness import launch_fitness_backward

    return launch_fitness_backward(
        g, e, pressure, cos, sin, cu_seqlens, dq, dk, excess, window_size, environment
    )


@_fitness_backward.register_fake
def _(
    g: Tensor, e: Tensor | None, pressure: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    environment = rest[-1]
    dlogits = g.new_empty((0,) * 4 if environment == "none" else g.shape)
    dpressure = g.new_empty(0 if pressure is None else g.shape[2], dtype=torch.float32)
    return g.new_empty(g.shape), dlogits, dpressure


class _FitnessFunction(torch.autograd.Function):
    """gamma; keeps the inputs for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        e: Tensor | None,
        cu_seqlens: Tensor | None,
        window_size: int,
        environment: str,
    ) -> Tensor:
        gamma: Tensor
        gamma, _ = _fitness(g, e, None, None, None, cu_seqlens, window_size, environment)
        ctx.save_for_backward(g, e, cu_seqlens)
        ctx.arguments = window_size, environment
        return gamma

    @staticmethod
    def backward(ctx: Any, dgamma: Tensor) -> tuple[Tensor | None, ...]:
        g, e, cu_seqlens = ctx.saved_tensors
        dg, de, _ = _fitness_backward(
            g, e, None, None, None, cu_seqlens, dgamma, None, None, *ctx.arguments
        )
        return dg, None if e is None else de, None, None, None


class _GeneticFunction(torch.autograd.Function):
    """o; keeps the inputs, o and its lse for the backward, which forms q and k anew."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        e: Tensor | None,
        v: Tensor,
        pressure: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        window_size: int,
        environment: str,
    ) -> Tensor:
        q, k = _fitness(g, e, pressure, cos, sin, cu_seqlens, window_size, environment)
        o: Tensor
        o, lse_log2 = core_forward(q, k, v, None, None, None, cu_seqlens, True, window_size, 1.0)
        ctx.save_for_backward(g, e, pressure, cos, sin, cu_seqlens, v, o, lse_log2)
        ctx.arguments = window_size, environment
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *genes, v, o, lse_log2 = ctx.saved_tensors
        window_size, environment = ctx.arguments
        _, e, pressure, _, _, cu_seqlens = genes
        q, k = _fitness(*genes, window_size, environment)
        no_dlse = torch.zeros_like(lse_log2)
        masks = cu_seqlens, True, window_size
        dq, dk, dv, *_, excess = core_backward(
            q, k, v, None, None, o, lse_log2, do, no_dlse, *masks, 1.0, True
        )
        dg, de, dpressure = _fitness_backward(*genes, dq, dk, excess, window_size, environment)
        de = None if e is None else de
        return dg, de, dv, dpressure.to(pressure.dtype), None, None, None, None, None


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
        impl: "triton", "eager", or "auto" (default): Triton for CUDA tensors, else eager. Types,
            widths and strides that Triton takes are those of `attention`.

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
    if checks.implementation(impl, {"g": g, "e": e}) == "triton":
        gamma: Tensor = _FitnessFunction.apply(  # type: ignore[no-untyped-call]
            g, e, cu_seqlens, window_size, environment
        )
        return gamma
    return reference.gene_fitness(
        g, e, window_size=window_size, environment=environment, cu_seqlens=cu_seqlens
    )


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
        rope: (cos, sin), each [T, D/2] fp32, or None (default).
        cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1. Default None.
        impl: "triton", "eager", or "auto" (default): Triton for CUDA tensors, else eager. Types,
            widths and strides that Triton takes are those of `attention`.

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
    if checks.implementation(impl, {"g": g, "e": e, "v": v}) == "triton":
        cos, sin = (None, None) if rope is None else rope
        o: Tensor = _GeneticFunction.apply(  # type: ignore[no-untyped-call]
            g, e, v, selection_pressure, cos, sin, cu_seqlens, window_size, environment
        )
        return o
    return reference.genetic_attention(
        g,
        e,
        v,
        selection_pressure,
        window_size=window_size,
        environment=environment,
        rope=rope,
        cu_seqlens=cu_seqlens,
    )
