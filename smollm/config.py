"""The configuration of a study, its presets, and the models that it describes.

Every field is a flag of train.py; its docstring is the flag's help.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from smollm.attention import (
    Attention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)
from smollm.layers import NormStrategy
from smollm.model import SmolLM, create_smollm_with_attention

Mechanism = Literal["mha", "gqa", "mla", "mga"]
Preset = Literal["cpu", "ablation", "smollm2-135m"]
QKNormChoice = Literal["none", "layer", "rms"]
MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the models; each mechanism reads the fields that concern it."""

    embed_dim: int = 576
    """Model width."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 9
    """(Query) heads of every mechanism."""
    num_kv_heads: int = 3
    """GQA: key and value heads."""
    latent_dim: int = 288
    """MLA: width of the latent that the cache holds."""
    rope_dim: int = 32
    """MLA: width of the rotary part; 0 for none."""
    q_latent_dim: int | None = None
    """MLA: width of a latent that queries are expanded from; none by default."""
    num_value_heads: int | None = None
    """MGA: value heads; as many as heads by default."""
    environment: Literal["query", "kin", "none"] = "query"
    """MGA: what re-weighs the fitness of genes."""
    selection_pressure: float = 4.0
    """MGA: initial selection pressure of every head."""
    genetic_window_size: int = 128
    """MGA: tokens in the window, which it always has."""
    window_size: int | None = None
    """MHA, GQA and MLA: tokens in the sliding window; full attention by default."""
    qk_norm: QKNormChoice = "none"
    """MHA, GQA and MLA: normalise queries and keys per head ("layer" or "rms")."""
    norm_strategy: NormStrategy = "pre"
    """Where a block's norms stand: before a branch, after it, or both."""
    ffn_hidden_dim: int = 1536
    """Inner width of the SwiGLU."""
    max_seq_len: int = 2048
    """Longest sequence that the model accepts."""
    rope_theta: float = 100_000.0
    """Base of the rotary embedding."""
    bias: bool = False
    """Biases in attention and MLP."""
    dropout: float = 0.0
    """Dropout on embeddings and branch outputs."""
    tie_embeddings: bool = True
    """The output head shares the embedding's weights."""


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
    variants: tuple[Mechanism, ...] = MECHANISMS
    """Mechanisms to train, in this order."""
    only_mga: bool = False
    """Short for --variants mga."""
    output_dir: Path = Path("ablation_results")
    """Folder of the results; an earlier study's files there are overwritten."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """The mechanisms to train."""
        return ("mga",) if self.only_mga else self.variants


PRESETS: dict[Preset, Config] = {
    "cpu": Config(
        preset="cpu",
        model=ModelConfig(
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
        model=ModelConfig(num_layers=30, genetic_window_size=256),
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


def build_attention(mechanism: Mechanism, config: ModelConfig) -> Attention:
    """A prototype of the mechanism.

    Raises:
        ValueError: the fields do not fit together.
    """
    shape = (config.embed_dim, config.num_heads)
    common: dict[str, Any] = {
        "dropout": config.dropout,
        "bias": config.bias,
        "rope_theta": config.rope_theta,
    }
    if mechanism == "mga":
        if config.qk_norm != "none":
            raise ValueError(
                f"qk_norm: expected 'none' with mga, whose genes have no such norm, got "
                f"{config.qk_norm!r}; choose the others with --variants"
            )
        return MultiHeadGeneticAttention(
            *shape,
            config.genetic_window_size,
            config.num_value_heads,
            environment=config.environment,
            selection_pressure=config.selection_pressure,
            **common,
        )
    common |= {
        "use_sliding_window": config.window_size is not None,
        "window_size": config.window_size,
        "qk_norm": {"none": False, "layer": True, "rms": "rms"}[config.qk_norm],
        "is_causal": True,
    }
    if mechanism == "mha":
        return MultiHeadAttention(*shape, **common)
    if mechanism == "gqa":
        return GroupedQueryAttention(*shape, config.num_kv_heads, **common)
    if mechanism == "mla":
        return MultiHeadLatentAttention(
            *shape, config.latent_dim, config.rope_dim, config.q_latent_dim, **common
        )
    raise ValueError(f"mechanism: expected one of {MECHANISMS}, got {mechanism!r}")


def build_model(mechanism: Mechanism, config: ModelConfig, vocab_size: int) -> SmolLM:
    """A freshly initialised SmolLM with the mechanism.

    Raises:
        ValueError: the fields do not fit together.
    """
    return create_smollm_with_attention(
        build_attention(mechanism, config),
        vocab_size=vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        ffn_hidden_dim=config.ffn_hidden_dim,
        max_seq_len=config.max_seq_len,
        dropout=config.dropout,
        use_bias=config.bias,
        tie_embeddings=config.tie_embeddings,
        norm_strategy=config.norm_strategy,
    )


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
