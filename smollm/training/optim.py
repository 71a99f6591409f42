"""A step of optimisation: its rate, its gradients, its optimizer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smollm.model import SmolLM
from smollm.training.config import TrainConfig
from smollm.training.loader import Batch
from smollm.training.metrics import autocast
from smollm.training.parallel import World, accumulating

MUON_MOMENTUM = 0.95  # of its paper


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step, from 0: linear up to lr, then by the schedule.

    - "wsd": flat, then linear towards 0 at the last step; where that overlaps the warm-up, the
      lower of the two holds.
    - "cosine": lr (1 + cos(pi p)) / 2, with p the part of the steps after the warm-up that is over.
    - "constant": flat.
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = 1.0
    if config.schedule == "wsd":
        decay_steps = round(config.decay_fraction * config.steps)
        fall = min(1.0, (config.steps - step) / max(1, decay_steps))
    elif config.schedule == "cosine" and step >= config.warmup_steps:
        over = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        fall = (1 + math.cos(math.pi * over)) / 2
    return config.lr * min(warmup, fall)


class Optimizers:
    """AdamW, or Muon for the blocks' matrices beside AdamW for the rest, used as one.

    Weight decay is on projections alone, not on embeddings, norms, biases, sinks, pressures. Muon
    (Jordan et al., 2024) orthogonalises each update and scales it to the size of AdamW's
    (Liu et al., 2025), so that both take one learning rate.
    """

    def __init__(self, model: SmolLM, config: TrainConfig) -> None:
        embedding = model.embed_tokens.weight
        parameters = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.ndim >= 2 and p is not embedding]
        others = [p for p in parameters if p.ndim < 2 or p is embedding]
        self.parts: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon":
            matrices = [p for p in decayed if p is not model.lm_head.weight]
            decayed = [p for p in decayed if p is model.lm_head.weight]
            self.parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    momentum=MUON_MOMENTUM,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.parts.append(
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=True,
            )
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, rate: float) -> None:
        """Take a step at a learning rate, and drop the gradients."""
        for group in self.param_groups:
            group["lr"] = rate
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each part, for `load_state_dict`."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take up what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def accumulate_gradients(
    network: nn.Module,
    batches: Sequence[Batch],
    config: TrainConfig,
    world: World,
    targets: float,
) -> Tensor:
    """Add the gradients of a step's loss: the nats of all its targets over their number.

    Args:
        network: the model, or what compiles or distributes it.
        batches: this process's micro-batches of the step.
        config: of the run.
        world: the processes that share the step.
        targets: the number of targets in the whole step.

    Returns:
        This process's part of the loss, fp32 in nats per target, on its device; the sum over the
        processes and the gradients are the same however batches and processes divide the step.
    """
    loss = torch.zeros((), device=world.device)
    for index, batch in enumerate(batches):
        ids, cu_seqlens = batch.to(world.device)
        with accumulating(network, last=index == len(batches) - 1):
            with autocast(config, world.device):
                mean = network(ids, labels=ids, cu_seqlens=cu_seqlens, with_logits=False)["loss"]
            part = mean * (batch.num_targets / max(1, targets))
            (part * world.size).backward()  # whose mean over the processes is taken
        loss += part.detach()
    return loss
