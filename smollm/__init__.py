"""SmolLM: a small language model with a swappable attention mechanism."""

from typing import TYPE_CHECKING

import smollm.clash  # noqa: F401  whose `kernels` is it?
from smollm.lazy import exports

if TYPE_CHECKING:
    from smollm.attention import (
        GroupedQueryAttention,
        Llama3Scaling,
        MultiHeadAttention,
        MultiHeadGeneticAttention,
        MultiHeadLatentAttention,
    )
    from smollm.model import SmolLM, create_smollm_with_attention
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "attention": (
                "GroupedQueryAttention",
                "Llama3Scaling",
                "MultiHeadAttention",
                "MultiHeadGeneticAttention",
                "MultiHeadLatentAttention",
            ),
            "model": ("SmolLM", "create_smollm_with_attention"),
        },
    )

__all__ = [
    "GroupedQueryAttention",
    "Llama3Scaling",
    "MultiHeadAttention",
    "MultiHeadGeneticAttention",
    "MultiHeadLatentAttention",
    "SmolLM",
    "create_smollm_with_attention",
]
