"""The mechanisms: their own options as flags, and a row for each; needs no PyTorch."""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Literal

from smollm.attention.options import LARGEST, WIDEST, Options, Range, SharedOptions

if TYPE_CHECKING:
    from smollm.attention.base import Attention

Environment = Literal["query", "kin", "none"]


@dataclass(frozen=True)
class MultiHeadOptions(Options):
    """MHA's, which has none of its own."""

    def arguments(self, shared: SharedOptions) -> dict[str, Any]:  # noqa: D102
        rope_dim = None
        if shared.rotary_fraction != 1:
            width = shared.head_dim or shared.embed_dim // shared.num_heads
            rope_dim = int(width * shared.rotary_fraction)
        return super().arguments(shared) | {"rope_dim": rope_dim, "sinks": shared.sinks}


@dataclass(frozen=True)
class GroupedQueryOptions(MultiHeadOptions):
    """GQA's own options."""

    num_kv_heads: Annotated[int, Range(1, WIDEST)] = 3
    """GQA: key and value heads."""


@dataclass(frozen=True)
class LatentOptions(Options):
    """MLA's own options."""

    latent_dim: Annotated[int, Range(1, WIDEST)] = 288
    """MLA: width of the latent that the cache holds."""
    rope_dim: Annotated[int, Range(0, WIDEST)] = 32
    """MLA: width of the rotary part; 0 for none."""
    q_latent_dim: Annotated[int | None, Range(1, WIDEST)] = None
    """MLA: width of a latent that queries are expanded from; none by default."""
    value_dim: Annotated[int | None, Range(1, WIDEST)] = None
    """MLA: width of a head's values; that of its keys without rotation by default."""

    def arguments(self, shared: SharedOptions) -> dict[str, Any]:  # noqa: D102
        shared.refuse("mla", sinks="whose attention takes none")
        given = super().arguments(shared)
        return given if shared.rotates else given | {"rope_dim": 0}


@dataclass(frozen=True)
class GeneticOptions(Options):
    """MGA's own options."""

    num_value_heads: Annotated[int | None, Range(1, WIDEST)] = None
    """MGA: value heads; as many as heads by default."""
    environment: Environment = "query"
    """MGA: what re-weighs the fitness of genes."""
    selection_pressure: Annotated[float, Range(1e-6, 1e6)] = 4.0
    """MGA: initial selection pressure of every head."""
    learn_pressure: bool = True
    """MGA: the selection pressure is learned; else it keeps its initial value."""
    gene_fitness: bool = True
    """MGA: genes are the fitter the rarer they are in the window; else the environment alone tells
    how fit they are."""
    genetic_window_size: Annotated[int, Range(1, LARGEST)] = 128
    """MGA: tokens in the window, which it always has."""

    def arguments(self, shared: SharedOptions) -> dict[str, Any]:  # noqa: D102
        shared.refuse(
            "mga",
            qk_norm="whose genes have no such norm",
            sinks="whose attention takes none",
            decay="whose attention takes no bias of keys",
        )
        return {
            "d_model": shared.embed_dim,
            "num_heads": shared.num_heads,
            "window_size": self.genetic_window_size,
            "num_value_heads": self.num_value_heads,
            "environment": self.environment,
            "selection_pressure": self.selection_pressure,
            "learn_pressure": self.learn_pressure,
            "gene_fitness": self.gene_fitness,
            "head_dim": shared.head_dim,
            "rotary": shared.rotates,
            "rope_theta": shared.rope_theta,
            "rope_scaling": shared.scaling,
            "bias": shared.biases,
            "dropout": shared.dropout,
            "exclusive": shared.exclusive,
            "output_gate": shared.output_gate,
        }


@dataclass(frozen=True)
class Mechanism:
    """A mechanism that models can be built with."""

    name: str  # as flags and files call it
    title: str  # as tables and plots call it
    color: str  # in plots
    options: type[Options]
    path: str  # MODULE:CLASS in this package, imported when one is built

    @property
    def module(self) -> "type[Attention]":
        """The module's class."""
        found: type[Attention] = resolve_name(f"{__package__}.{self.path}")
        return found


MECHANISMS = {
    row.name: row
    for row in (
        Mechanism("mha", "MHA", "#4269d0", MultiHeadOptions, "grouped:MultiHeadAttention"),
        Mechanism("gqa", "GQA", "#efb118", GroupedQueryOptions, "grouped:GroupedQueryAttention"),
        Mechanism("mla", "MLA", "#ff725c", LatentOptions, "latent:MultiHeadLatentAttention"),
        Mechanism("mga", "MGA", "#3ca951", GeneticOptions, "genetic:MultiHeadGeneticAttention"),
    )
}
