"""The attention mechanisms of a model; `MECHANISMS` is all that the rest knows of them."""

from typing import TYPE_CHECKING

from smollm.attention.mechanisms import MECHANISMS, Mechanism
from smollm.attention.options import Options, SharedOptions
from smollm.attention.scaling import Llama3Scaling
from smollm.lazy import exports

if TYPE_CHECKING:
    from smollm.attention.base import Attention
    from smollm.attention.genetic import MultiHeadGeneticAttention
    from smollm.attention.grouped import GroupedQueryAttention, MultiHeadAttention
    from smollm.attention.latent import MultiHeadLatentAttention
    from smollm.attention.rope import Rotation
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "base": ("Attention",),
            "genetic": ("MultiHeadGeneticAttention",),
            "grouped": ("GroupedQueryAttention", "MultiHeadAttention"),
            "latent": ("MultiHeadLatentAttention",),
            "rope": ("Rotation",),
        },
    )

__all__ = [
    "MECHANISMS",
    "Attention",
    "GroupedQueryAttention",
    "Llama3Scaling",
    "Mechanism",
    "MultiHeadAttention",
    "MultiHeadGeneticAttention",
    "MultiHeadLatentAttention",
    "Options",
    "Rotation",
    "SharedOptions",
]
