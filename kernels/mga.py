"""gene_fitness() and genetic_attention(): multi-head genetic attention (MGA).

The tokens in a causal window are organisms and the features of a head their genes. A gene is the
fitter the rarer it is in the window; an organism is selected by the fitness of its genes.
"""

from torch import Tensor

from kernels import checks, reference
from kernels.reference import closed_form_fitness

__all__ = ["closed_form_fitness", "gene_fitness", "genetic_attention"]


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
        impl: "auto" (default), "eager" or "triton".

    Returns:
        gamma [B, T, H, D] in fp32 (fp64 for fp64 inputs), summing to 1 over D.

    Raises:
        ValueError, TypeError: an argument breaks its contract. NotImplementedError:
            impl="triton".

    Source: the closed form is the equilibrium of the dominant-gene, balanced-organism game of
        Genetic AI, arXiv 2501.19113, under the replicator equation.
    """
    checks.gene_fitness(
        g, e, window_size=window_size, environment=environment, cu_seqlens=cu_seqlens
    )
    checks.eager_only(impl)
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
        impl: "auto" (default), "eager" or "triton".

    Returns:
        [B, T, H, D_V] in g's type.

    Raises:
        ValueError, TypeError: an argument breaks its contract. NotImplementedError:
            impl="triton".
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
    checks.eager_only(impl)
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
