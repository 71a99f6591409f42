"""The language model around a mechanism: its shape, generation, and files of its weights."""

from smollm.model.model import SmolLM, create_smollm_with_attention

__all__ = ["SmolLM", "create_smollm_with_attention"]
