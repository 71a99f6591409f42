"""A step of optimisation: its rate, its gradients, its optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smollm.model import SmolLM
from smollm.training.config import TrainConfig
from smollm.training.loader import Batch
from smollm.training.metrics import autocast


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, stable, decay: linear up to lr, flat, then linear towards 0 at the last step.

    Where warm-up and decay overlap, the lower of the two holds.
    """
    decay_steps = round(config.decay_fraction * config.steps)
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = min(1.0, (config.steps - step) / max(1, decay_steps))
    return config.lr * min(warmup, decay)


def make_optimizer(model: SmolLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on projections alone, not on embeddings, norms, biases, pressures."""
    embedding = model.embed_tokens.weight
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim >= 2 and p is not embedding]
    others = [p for p in parameters if p.ndim < 2 or p is embedding]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def accumulate_gradients(
    network: Callable[..., dict[str, Any]],
    batches: Sequence[Batch],
    config: TrainConfig,
    device: torch.device,
) -> Tensor:
    """Add the gradients of a step's loss: the nats of all its targets over their number.

    Args:
        network: the model, or what torch.compile made of it.
        batches: the step's micro-batches.
        config: of the run.
        device: the network's.

    Returns:
        The loss, fp32 in nats per target, on device; the same however batches divide the step.
    """
    targets = sum(batch.num_targets for batch in batches)
    loss = torch.zeros((), device=device)
    for batch in batches:
        ids, cu_seqlens = batch.to(device)
        with autocast(config, device):
            mean = network(ids, labels=ids, cu_seqlens=cu_seqlens, with_logits=False)["loss"]
        part = mean * (batch.num_targets / max(1, targets))
        part.backward()
        loss += part.detach()
    return loss
