"""The configuration of a study and its presets.

Every field is a flag of train.py; its docstring is the flag's help.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from smollm.attention import MECHANISMS
from smollm.model.config import ModelConfig, build_model

Preset = Literal["cpu", "ablation", "smollm2-135m"]
Variants = Annotated[
    tuple[str, ...],
    tyro.conf.arg(constructor=tuple[Literal[tuple(MECHANISMS)], ...]),  # type: ignore[misc]
]


@dataclass(frozen=True)
class TrainConfig:
    """Data, optimisation and reporting of each run."""

    corpus: str = "auto"
    """Prepared corpus to train on. "auto": the newest that `python -m smollm.data` prepared,
    else "builtin", which needs no network."""
    data_dir: Path = Path(".data")
    """Folder of prepared corpora."""
    seq_len: int = 512
    """Tokens in a training sequence."""
    batch_size: int = 4
    """Sequences in a micro-batch."""
    grad_accum: int = 1
    """Micro-batches in a step."""
    steps: int = 1000
    """Optimizer steps of each run."""
    document_mask: bool = False
    """Keep attention and targets inside documents."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay_fraction: float = 0.2
    """Last part of the steps, in which the rate falls linearly to 0."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """On projections; never on embeddings, norms, biases and selection pressures."""
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 8
    """Seeds initialisation and data order, the same for every variant."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" is a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the forward pass; weights stay fp32. "auto": bfloat16 on a GPU, float32 on a CPU."""
    compile: bool = False
    """Run the model through torch.compile."""
    log_every: int = 10
    """Steps between training records."""
    val_every: int = 250
    """Steps between validations; one always ends a run."""
    val_tokens: int = 262_144
    """At most so many tokens of held-out documents are validated on."""
    generate_tokens: int = 128
    """Tokens generated after training, to measure speed and show a sample."""


@dataclass(frozen=True)
class Config:
    """Train small language models that differ in attention alone, and compare them."""

    preset: Preset = "ablation"
    """Where the other flags' defaults come from: "cpu" (about 2 minutes on 2 cores, the default
    without a GPU), "ablation" (the default with one), "smollm2-135m" (the full model)."""
    variants: Variants = tuple(MECHANISMS)
    """Mechanisms to train, in this order."""
    only_mga: bool = False
    """Short for --variants mga."""
    output_dir: Path = Path("ablation_results")
    """Folder of the results; an earlier study's files there are overwritten."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The mechanisms to train."""
        return ("mga",) if self.only_mga else self.variants


PRESETS: dict[Preset, Config] = {
    "cpu": Config(
        preset="cpu",
        model=ModelConfig.of(
            embed_dim=144,
            latent_dim=72,
            rope_dim=8,
            genetic_window_size=64,
            ffn_hidden_dim=384,
        ),
        train=TrainConfig(
            seq_len=128,
            batch_size=8,
            steps=160,
            warmup_steps=16,
            log_every=5,
            val_every=40,
            val_tokens=16_384,
            generate_tokens=64,
        ),
    ),
    "ablation": Config(preset="ablation"),
    "smollm2-135m": Config(
        preset="smollm2-135m",
        model=ModelConfig.of(num_layers=30, genetic_window_size=256),
        train=TrainConfig(
            seq_len=2048,
            batch_size=8,
            grad_accum=64,
            steps=10_000,
            warmup_steps=2000,
            val_every=500,
            val_tokens=1_048_576,
        ),
    ),
}


def check_config(config: Config, vocab_size: int) -> None:
    """Refuse what could only fail later: values out of range, shapes that no model can have.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    train = config.train
    positive = (
        "seq_len",
        "batch_size",
        "grad_accum",
        "steps",
        "lr",
        "eps",
        "clip",
        "log_every",
        "val_every",
        "val_tokens",
    )
    for name in positive:
        if not getattr(train, name) > 0:
            raise ValueError(f"{name}: expected > 0, got {getattr(train, name)}")
    for name in ("warmup_steps", "weight_decay", "generate_tokens", "seed"):
        if not getattr(train, name) >= 0:
            raise ValueError(f"{name}: expected >= 0, got {getattr(train, name)}")
    for name in ("decay_fraction", "beta1", "beta2"):
        if not 0 <= getattr(train, name) <= 1:
            raise ValueError(f"{name}: expected between 0 and 1, got {getattr(train, name)}")
    if train.seq_len < 2:
        raise ValueError(f"seq_len: expected >= 2 (a token and its target), got {train.seq_len}")
    if train.seq_len > config.model.max_seq_len:
        raise ValueError(
            f"seq_len: expected at most max_seq_len={config.model.max_seq_len}, got {train.seq_len}"
        )
    if train.val_tokens < train.seq_len:
        raise ValueError(f"val_tokens: expected >= seq_len={train.seq_len}, got {train.val_tokens}")
    if not 0 <= config.model.dropout < 1:
        raise ValueError(f"dropout: expected in [0, 1), got {config.model.dropout}")
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' or 'auto' (PyTorch sees no GPU), got 'cuda'")
    if not config.mechanisms or len(set(config.mechanisms)) < len(config.mechanisms):
        raise ValueError(f"variants: expected distinct mechanisms, got {config.mechanisms}")
    with torch.device("meta"):
        for mechanism in config.mechanisms:
            build_model(mechanism, config.model, vocab_size)
