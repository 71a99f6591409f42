"""Hugging Face: its checkpoints as our models, and our attention under its models.

transformers is imported when it is used, not before.
"""

from typing import TYPE_CHECKING

from smollm.clash import check_distribution
from smollm.lazy import exports

if TYPE_CHECKING:
    from smollm.hf.attention import register
    from smollm.hf.weights import from_hf, save_hf
else:
    __getattr__, __dir__ = exports(
        __name__, {"attention": ("register",), "weights": ("from_hf", "save_hf")}
    )

__all__ = ["from_hf", "register", "save_hf"]

check_distribution()
