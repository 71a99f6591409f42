"""Hugging Face: this project's attention under its models. Nothing here imports transformers."""

from typing import Any

from smollm.clash import check_distribution

__all__ = ["register"]

check_distribution()


def __getattr__(name: str) -> Any:
    if name == "register":
        from smollm.hf.attention import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
