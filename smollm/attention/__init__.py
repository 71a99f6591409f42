"""The attention mechanisms of a model; `MECHANISMS` is all that the rest knows of them."""

from dataclasses import dataclass

from smollm.attention.base import Attention
from smollm.attention.genetic import GeneticOptions, MultiHeadGeneticAttention
from smollm.attention.grouped import (
    GroupedQueryAttention,
    GroupedQueryOptions,
    MultiHeadAttention,
)
from smollm.attention.latent import LatentOptions, MultiHeadLatentAttention
from smollm.attention.options import Options, SharedOptions

__all__ = [
    "MECHANISMS",
    "Attention",
    "GroupedQueryAttention",
    "Mechanism",
    "MultiHeadAttention",
    "MultiHeadGeneticAttention",
    "MultiHeadLatentAttention",
    "Options",
    "SharedOptions",
]


@dataclass(frozen=True)
class Mechanism:
    """A mechanism that models can be built with."""

    name: str  # as flags and files call it
    title: str  # as tables and plots call it
    color: str  # in plots
    options: type[Options]
    module: type[Attention]

    def build(self, shared: SharedOptions, options: Options) -> Attention:
        """A prototype of the module.

        Raises:
            ValueError: the options do not fit together.
        """
        return self.module(**options.arguments(shared))


MECHANISMS = {
    row.name: row
    for row in (
        Mechanism("mha", "MHA", "#4269d0", Options, MultiHeadAttention),
        Mechanism("gqa", "GQA", "#efb118", GroupedQueryOptions, GroupedQueryAttention),
        Mechanism("mla", "MLA", "#ff725c", LatentOptions, MultiHeadLatentAttention),
        Mechanism("mga", "MGA", "#3ca951", GeneticOptions, MultiHeadGeneticAttention),
    )
}
