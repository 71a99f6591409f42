"""What stands behind the last hidden state: the tied head, and the loss of the next token."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


class TiedHead(nn.Module):
    """Logits by the embedding's own weight, [..., embed_dim] -> [..., vocab_size].

    It holds no parameter, so nothing that replaces parameters can take the two apart.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple hides it from the module tree

    @property
    def weight(self) -> Tensor:
        """The embedding's, [vocab_size, embed_dim]."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.linear(x, self.weight)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """A file may hold the weight twice, as long as it equals the embedding's, loaded before."""
        given, errors = state_dict.get(f"{prefix}weight"), rest[-1]
        if given is not None and not given.is_meta and not torch.equal(given, self.weight):
            errors.append(f"{prefix}weight: expected the embedding's, which it is tied to")


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets of -log softmax(logits[:, t])[targets[:, t + 1]], fp32, in nats.

    Args:
        logits: [B, T, V].
        targets: [B, T]; -100 is no target. With no target at all the loss is 0.
    """
    shifted = F.pad(targets[:, 1:], (0, 1), value=IGNORED).flatten()  # fewer logits are a copy
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), shifted, ignore_index=IGNORED, reduction="sum"
    )
    return total / (shifted != IGNORED).sum().clamp(min=1)
