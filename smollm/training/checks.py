"""What a configuration is refused for, before any work."""

from dataclasses import replace
from typing import NamedTuple

import torch

from smollm.model.config import build_model
from smollm.training.config import Config

INF = float("inf")
LARGEST = 10**9  # below the kernels' bound on positions and windows, 2**30
WIDEST = 10**6  # a weight of WIDEST x WIDEST can be described, if not allocated


class Range(NamedTuple):
    """An interval; each end belongs to it ("[", "]") or not ("(", ")")."""

    low: float
    high: float
    ends: str = "[]"

    def holds(self, value: float) -> bool:
        """Whether the value lies inside; nan never does."""
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return above and below

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


RANGES = {  # of every field that is a number; None, where a field may be None, is outside of it
    "seq_len": Range(2, LARGEST),  # a token and its target
    "batch_size": Range(1, LARGEST),
    "grad_accum": Range(1, LARGEST),
    "steps": Range(1, LARGEST),
    "lr": Range(0, INF, "()"),
    "warmup_steps": Range(0, LARGEST),
    "decay_fraction": Range(0, 1),
    "beta1": Range(0, 1, "[)"),
    "beta2": Range(0, 1, "[)"),
    "eps": Range(1e-30, 1e30),  # AdamW keeps it in fp32, where less than that may be 0
    "weight_decay": Range(0, INF, "[)"),
    "clip": Range(0, INF, "(]"),
    "seed": Range(0, 2**63 - 1),
    "log_every": Range(1, LARGEST),
    "val_every": Range(1, LARGEST),
    "val_tokens": Range(1, LARGEST),
    "generate_tokens": Range(0, LARGEST),
    "embed_dim": Range(1, WIDEST),
    "num_heads": Range(1, WIDEST),
    "window_size": Range(1, LARGEST),
    "rope_theta": Range(1, 1e30),
    "dropout": Range(0, 1, "[)"),
    "num_layers": Range(1, WIDEST),
    "ffn_hidden_dim": Range(1, WIDEST),
    "max_seq_len": Range(2, LARGEST),
    "num_kv_heads": Range(1, WIDEST),
    "latent_dim": Range(1, WIDEST),
    "rope_dim": Range(0, WIDEST),
    "q_latent_dim": Range(1, WIDEST),
    "num_value_heads": Range(1, WIDEST),
    "selection_pressure": Range(1e-6, 1e6),
    "genetic_window_size": Range(1, LARGEST),
}


def check_config(config: Config, vocab_size: int) -> None:
    """Refuse what could only fail later: values out of range, shapes that no model can have.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    train, model = config.train, config.model
    for name, value in (vars(train) | model.flags).items():
        if name in RANGES and value is not None and not RANGES[name].holds(value):
            raise ValueError(f"{name}: expected in {RANGES[name]}, got {value}")
    if train.seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len: expected at most max_seq_len={model.max_seq_len}, got {train.seq_len}"
        )
    if train.batch_size * train.seq_len > LARGEST:
        raise ValueError(
            f"batch_size: expected at most {LARGEST // train.seq_len} with seq_len="
            f"{train.seq_len}, got {train.batch_size}"
        )
    if train.warmup_steps > train.steps:
        raise ValueError(
            f"warmup_steps: expected at most steps={train.steps}, got {train.warmup_steps}"
        )
    if train.val_tokens < train.seq_len:
        raise ValueError(f"val_tokens: expected >= seq_len={train.seq_len}, got {train.val_tokens}")
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' or 'auto' (PyTorch sees no GPU), got 'cuda'")
    if config.only_mga and config.variants not in (Config.variants, ("mga",)):
        raise ValueError(
            f"only_mga: expected no other variants beside it, got {' '.join(config.variants)}"
        )
    if not config.mechanisms or len(set(config.mechanisms)) < len(config.mechanisms):
        raise ValueError(f"variants: expected distinct mechanisms, got {config.mechanisms}")
    shape = replace(model, num_layers=1)
    with torch.device("meta"):
        for mechanism in config.mechanisms:
            build_model(mechanism, shape, vocab_size)
