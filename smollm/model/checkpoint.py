"""Trained models to keep."""

from pathlib import Path
from typing import Any

import torch

from smollm.files import write_atomically
from smollm.model.config import ModelConfig, build_model
from smollm.model.model import SmolLM


def save_model(
    path: Path, model: SmolLM, mechanism: str, config: ModelConfig, **about: Any
) -> None:
    """Save weights and everything that rebuilds the model, for `load_model`.

    Args:
        path: file to write; it loads with `torch.load(path, weights_only=True)`.
        model: the model.
        mechanism, config: what `build_model` built it from.
        about: further plain values to keep.
    """
    content = {
        "mechanism": mechanism,
        "model_config": config.flags,
        "vocab_size": model.vocab_size,
        "state_dict": model.state_dict(),
        **about,
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SmolLM:
    """The model that `save_model` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: no such file. ValueError: not a model of this library.
    """
    content = torch.load(path, map_location=device, weights_only=True)
    try:
        model = build_model(
            content["mechanism"], ModelConfig.of(**content["model_config"]), content["vocab_size"]
        )
        model.load_state_dict(content["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a model saved by save_model, got {error!r}") from error
    return model.to(device).eval()
