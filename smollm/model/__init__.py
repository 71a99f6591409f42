"""The language model around a mechanism: its shape, generation, and files of its weights."""

from typing import TYPE_CHECKING

from smollm.lazy import exports

if TYPE_CHECKING:
    from smollm.model.model import SmolLM, create_smollm_with_attention
else:
    __getattr__, __dir__ = exports(__name__, {"model": ("SmolLM", "create_smollm_with_attention")})

__all__ = ["SmolLM", "create_smollm_with_attention"]
