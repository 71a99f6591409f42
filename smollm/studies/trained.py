"""A run of an earlier study: found, and loaded with the tokenizer that it was trained with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from smollm.data.tokenizer import read_tokenizer, vocab_size
from smollm.model import SmolLM
from smollm.model.build import build_model
from smollm.model.checkpoint import read_model
from smollm.model.config import ModelConfig
from smollm.studies.folder import TOKENIZER, trained
from smollm.studies.variants import variant_of
from smollm.training.config import TrainConfig
from smollm.training.parallel import find_device
from smollm.training.record import checkpoint_folder, model_file
from smollm.training.state import newest_checkpoint

MEASURED_BY = ("seq_len", "batch_size", "document_mask", "val_tokens", "dtype")


@dataclass(frozen=True)
class TrainedRun:
    """A model, in evaluation mode, and what is known of its training."""

    path: Path  # of its weights, or of the folder of its checkpoints
    model: SmolLM
    tokenizer: Tokenizer
    mechanism: str
    steps: int
    about: dict[str, Any]
    """As `training.state.origin` says it."""

    @property
    def measured_by(self) -> TrainConfig:
        """What its validation and its sample followed from; other fields are not the run's."""
        train = self.about["config"]["train"]
        return TrainConfig(**{name: train[name] for name in MEASURED_BY})


def open_run(path: Path, variant: str | None, device: str) -> TrainedRun:
    """Load a run's weights, or its last checkpoint where that has taken more steps.

    Nothing in its folder is changed.

    Args:
        path: of weights that a study saved, or of a study's folder.
        variant: the run's name, or its variant's if that has no other; only for a folder, which
            may have one run alone instead.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: there is no such run, or something of it is missing or damaged.
        OSError: it cannot be read.
    """
    place = find_device(device)
    if not path.exists():
        raise ValueError(f"run: expected weights or a study's folder, got {path}, where nothing is")
    folder, name = (path, _choose(path, variant)) if path.is_dir() else (path.parent, None)
    if name is None and variant is not None:
        raise ValueError(f"variant: expected none beside a file of weights, got {variant!r}")
    if not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"{folder}: expected the corpus's {TOKENIZER} beside the weights, got none; a copy of "
            "the one in the corpus's folder will do"
        )
    tokenizer = read_tokenizer(folder / TOKENIZER)
    run = _read_weights(path, tokenizer) if name is None else _newest(folder, name, tokenizer)
    if run.model.vocab_size != vocab_size(tokenizer):
        raise ValueError(
            f"{folder / TOKENIZER}: expected {run.model.vocab_size} tokens as {run.path} has, got "
            f"{vocab_size(tokenizer)}"
        )
    run.model.to(place)
    return run


def _choose(folder: Path, variant: str | None) -> str:
    names = trained(folder)
    if not names:
        raise ValueError(
            f"run: expected weights or a study's folder, with --variant where it has several runs, "
            f"got {folder} with none in it"
        )
    if variant in names:
        return variant
    found = [name for name in names if variant in (None, variant_of(name))]
    if len(found) != 1:
        raise ValueError(
            f"variant: expected one of {', '.join(names)} in {folder}, got {variant or 'none'}"
        )
    return found[0]


def _newest(folder: Path, name: str, tokenizer: Tokenizer) -> TrainedRun:
    path = folder / model_file(name)
    saved = _read_weights(path, tokenizer) if path.is_file() else None
    if saved is not None and saved.about["status"] == "finished":
        return saved
    checkpoints = folder / checkpoint_folder(name)
    content = newest_checkpoint(checkpoints)
    if content is None or (saved is not None and content["run"]["steps"] <= saved.steps):
        if saved is None:
            raise ValueError(f"{checkpoints}: expected a checkpoint that is whole, got none")
        return saved
    if "about" not in content:
        raise ValueError(
            f"{checkpoints}: expected a checkpoint of this version, got an older one's"
        )
    run, about = content["run"], content["about"]
    shape = ModelConfig.of(**about["config"]["model"])
    tokens = len(content["model"]["embed_tokens.weight"])
    model = build_model(run["mechanism"], shape, tokens)
    model.load_state_dict(content["model"])
    return TrainedRun(checkpoints, model.eval(), tokenizer, run["mechanism"], run["steps"], about)


def _read_weights(path: Path, tokenizer: Tokenizer) -> TrainedRun:
    model, about = read_model(path)
    if not isinstance(about.get("config"), dict) or "corpus_sha256" not in about:
        raise ValueError(f"{path}: expected weights that a study saved, got others")
    return TrainedRun(path, model, tokenizer, about["mechanism"], about["steps"], about)
