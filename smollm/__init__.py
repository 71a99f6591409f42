"""SmolLM: a small language model with a swappable attention mechanism."""

from smollm.attention import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)
from smollm.model import SmolLM, create_smollm_with_attention

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiHeadGeneticAttention",
    "MultiHeadLatentAttention",
    "SmolLM",
    "create_smollm_with_attention",
]
