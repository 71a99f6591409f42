"""What a configuration is refused for, before any work."""

from dataclasses import replace

from smollm.attention.options import LARGEST, check_range
from smollm.training.config import Config, TrainConfig
from smollm.training.torchrun import world_size
from smollm.training.trackers import check_tracker


def check_config(config: Config, vocab_size: int) -> None:
    """Refuse what could only fail later: values out of range, shapes that no model can have.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    check_ranges(config)
    train, model = config.train, config.model
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
    check_val_tokens(train)
    processes = world_size()
    if train.batch_size % processes and train.grad_accum % processes:
        raise ValueError(
            f"batch_size: expected a multiple of the {processes} processes, or grad_accum one, got "
            f"{train.batch_size} and {train.grad_accum}"
        )
    if train.fsdp and train.optimizer == "muon":
        raise ValueError(
            "fsdp: expected optimizer 'adamw', since Muon needs whole matrices, got 'muon'"
        )
    check_tracker(train.log)
    _check_with_torch(config, vocab_size)


def check_ranges(config: Config) -> None:
    """Refuse values that lie outside their field's range.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    for options in (config, config.train, config.model, *config.model.mechanisms.values()):
        check_range(options)


def check_val_tokens(train: TrainConfig) -> None:
    """Refuse to validate on less than one window.

    Raises:
        ValueError: it is less.
    """
    if train.val_tokens < train.seq_len:
        raise ValueError(f"val_tokens: expected >= seq_len={train.seq_len}, got {train.val_tokens}")


def _check_with_torch(config: Config, vocab_size: int) -> None:
    import torch  # which takes seconds, and nothing above needs it

    from smollm.model.build import build_model
    from smollm.training.parallel import find_device

    find_device(config.train.device)
    with torch.device("meta"):
        for variant in config.chosen:
            layers = len(config.model.layer_arguments(variant))
            build_model(variant, replace(config.model, num_layers=layers), vocab_size)
