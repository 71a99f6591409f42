"""Trained models to keep."""

from pathlib import Path
from typing import Any

import torch

from smollm.files import write_atomically
from smollm.model.build import build_model
from smollm.model.config import ModelConfig
from smollm.model.model import SmolLM


def save_model(
    path: Path, model: SmolLM, mechanism: str, config: ModelConfig, /, **about: Any
) -> None:
    """Save weights and everything that rebuilds the model, for `load_model`.

    Args:
        path: file to write; it loads with `torch.load(path, weights_only=True)`.
        model: the model.
        mechanism, config: what `build_model` built it from.
        about: further plain values to keep.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        **about,
        "mechanism": mechanism,
        "model_config": config.flags,
        "vocab_size": model.vocab_size,
        "state_dict": model.state_dict(),
    }
    write_tensors(path, content)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values for `torch.load(path, weights_only=True)`, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError as error:  # torch's own, raised over the file's
        cause = error.__context__ or error
        raise OSError(f"{path}: expected room for the weights, got {cause}") from error


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SmolLM:
    """The model that `save_model` wrote, in evaluation mode; it raises what `read_model` does."""
    return read_model(path, device)[0]


def read_model(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[SmolLM, dict[str, Any]]:
    """The model that `save_model` wrote, in evaluation mode, and what was said of it.

    Raises:
        FileNotFoundError, PermissionError: no such file, or none that may be read.
        ValueError: damaged, or not a model of this library.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = build_model(
            content["mechanism"], ModelConfig.of(**content["model_config"]), content["vocab_size"]
        )
        model.load_state_dict(content["state_dict"])
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ValueError(
            f"{path}: expected a model saved by save_model, got a file or folder that is none "
            f"({_first_line(error)})"
        ) from error
    del content["state_dict"]
    return model.to(device).eval(), content


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
