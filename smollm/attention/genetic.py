"""Multi-head genetic attention (MGA)."""

import math

import torch
from torch import Tensor, nn

from kernels import (
    attention,
    attention_decode,
    gene_keys,
    genetic_attention,
    genetic_decode,
    rotate,
)
from smollm.attention.base import Attention, Bias, check_divides, checked_bias
from smollm.attention.cache import LayerCache
from smollm.attention.layers import Linear, split_heads
from smollm.attention.mechanisms import Environment
from smollm.attention.options import OutputGate
from smollm.attention.rope import Rope
from smollm.attention.scaling import Llama3Scaling


class MultiHeadGeneticAttention(Attention):
    """Selection of the window's tokens by the closed-form fitness of their genes (MGA).

    The tokens in a causal window are organisms, the features of a head their genes: a gene is the
    fitter the rarer it is in the window, an organism the fitter its genes are. The README's "MGA
    in one page" explains it, `kernels.genetic_attention` has the formulas. Always causal and always
    windowed, so there is no use_sliding_window.

    Args:
        d_model: model width.
        num_heads: heads.
        window_size: tokens in a full window, the token itself included. Required.
        num_value_heads: value heads, a divisor of num_heads. Default num_heads.
        environment: what re-weighs gene fitness: "query" (the token's own projection, default),
            "kin" (its genes) or "none".
        head_dim: width of a head. Default d_model / num_heads.
        rotary: rotate genes and fitness. Default True.
        selection_pressure: initial kappa of every head. Default 4.
        learn_pressure: kappa is learned. Default True; False keeps its start, in the state too.
        gene_fitness: genes are the fitter the rarer they are in the window. Default True; False, a
            control, leaves the window's means out: gamma_i = softmax_D(log eps_i).
        bias: biases on the projections, "qkv" for all but the output's. Default False.
        dropout: on the output. Default 0.
        rope_theta: rotary base. Default 100,000.
        rope_scaling: of the rotary frequencies. Default none.
        exclusive, output_gate: as in `GroupedQueryAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        window_size: int,
        num_value_heads: int | None = None,
        *,
        head_dim: int | None = None,
        environment: Environment = "query",
        rotary: bool = True,
        selection_pressure: float = 4.0,
        learn_pressure: bool = True,
        gene_fitness: bool = True,
        bias: Bias = False,
        dropout: float = 0.0,
        rope_theta: float = 100_000.0,
        rope_scaling: Llama3Scaling | None = None,
        exclusive: bool = False,
        output_gate: OutputGate = "none",
    ) -> None:
        if window_size is None:
            raise ValueError("window_size: expected an integer >= 1 (the population), got None")
        if environment not in ("query", "kin", "none"):
            raise ValueError(f"environment: expected 'query', 'kin' or 'none', got {environment!r}")
        if not 0 < selection_pressure < math.inf:
            raise ValueError(f"selection_pressure: expected > 0, got {selection_pressure}")
        if head_dim is None:
            check_divides("num_heads", num_heads, "d_model", d_model)
        super().__init__(
            d_model,
            num_heads,
            head_dim=head_dim,
            dropout=dropout,
            window_size=window_size,
            is_causal=True,
            rope_dim=None if rotary else 0,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            exclusive=exclusive,
            output_gate=output_gate,
        )
        self.num_value_heads = num_heads if num_value_heads is None else num_value_heads
        check_divides("num_value_heads", self.num_value_heads, "num_heads", num_heads)
        self.environment = environment
        self.gene_fitness = gene_fitness
        self._initial_pressure = selection_pressure
        bias, out_bias = checked_bias(bias)
        width = num_heads * self.head_dim
        self.w_g = Linear(d_model, width, bias=bias)
        self.w_e = Linear(d_model, width, bias=bias) if environment == "query" else None
        self.w_v = Linear(d_model, self.num_value_heads * self.head_dim, bias=bias)
        self.out_proj = Linear(width, d_model, bias=out_bias)
        self.log_selection_pressure = nn.Parameter(
            torch.empty(num_heads), requires_grad=learn_pressure
        )
        self.reset_parameters()

    def reset_constants(self) -> None:
        """The selection pressure starts at its given value."""
        nn.init.constant_(self.log_selection_pressure, math.log(self._initial_pressure))

    def heads(  # noqa: D102
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        g = split_heads(self.w_g(x), self.num_heads)
        e = None if self.w_e is None else split_heads(self.w_e(x), self.num_heads)
        v = split_heads(self.w_v(x), self.num_value_heads)
        pressure, tables = self.log_selection_pressure.exp(), rope if self.rotation.width else None
        if not self.gene_fitness:
            return self._without_fitness(g, e, v, pressure, tables, cu_seqlens, cache), v
        assert self.window_size is not None
        if cache is not None:
            rings = cache.store(g=g, k=gene_keys(g, tables), v=v)
            if cache.decoding:
                o = genetic_decode(
                    g,
                    e,
                    pressure,
                    rings["g"],
                    rings["k"],
                    rings["v"],
                    cache.lengths,
                    window_size=self.window_size,
                    environment=self.environment,
                    rope=tables,
                )
                return o, v
        o = genetic_attention(
            g,
            e,
            v,
            pressure,
            window_size=self.window_size,
            environment=self.environment,
            rope=tables,
            cu_seqlens=cu_seqlens,
        )
        return o, v

    def _without_fitness(
        self,
        g: Tensor,
        e: Tensor | None,
        v: Tensor,
        pressure: Tensor,
        tables: Rope | None,
        cu_seqlens: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """Attention with the same keys, whose queries know no other token's genes."""
        kin = g if self.environment == "kin" else torch.zeros_like(g)
        precise = torch.promote_types(g.dtype, torch.float32)
        gamma = nn.functional.logsigmoid((kin if e is None else e).to(precise)).softmax(dim=-1)
        q = gamma * pressure[:, None] * self.head_dim**0.5
        q = (q if tables is None else rotate(q, *tables)).to(g.dtype)
        k, window_size = gene_keys(g, tables), self.window_size
        if cache is not None:
            rings = cache.store(k=k, v=v)
            if cache.decoding:
                return attention_decode(
                    q, rings["k"], rings["v"], cache.lengths, window_size=window_size, scale=1.0
                )
        return attention(q, k, v, window_size=window_size, scale=1.0, cu_seqlens=cu_seqlens)
