"""What stands behind the last hidden state: the tied head, and the loss of the next token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smollm.attention.layers import linear

IGNORED = -100
LOGITS_AT_ONCE = 2**25  # 128 MiB of fp32


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
        return linear(x, self.weight)

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
    following = _following(targets)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), following, ignore_index=IGNORED, reduction="sum"
    )
    return total / _count(following)


def linear_next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`next_token_loss` of the logits hidden W^T, which never exist all at once.

    Args:
        hidden: [B, T, D]. Its gradient and the weight's are computed with the loss.
        weight: W [V, D].
        targets: [B, T], as there.
    """
    x, following, kind = hidden.flatten(0, 1), _following(targets), hidden.device.type
    parts = _parts(targets, weight.shape[0])
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return _linear_loss(x, weight, following, parts)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _linear_loss(x.to(dtype), weight.to(dtype), following, parts)


def _parts(targets: Tensor, vocab_size: int) -> int:
    """How many parts the rows have: as many for all T up to a power of two, to share a graph."""
    (batch, tokens), bound = targets.shape, 1
    while bound < tokens:
        bound *= 2
    return -(-batch * bound // max(1, LOGITS_AT_ONCE // vocab_size))


def _following(targets: Tensor) -> Tensor:
    """The next token's target in each place, [B * T]: to leave out the last logits is a copy."""
    return F.pad(targets, (0, 1), value=IGNORED)[:, 1:].flatten()


def _count(following: Tensor) -> Tensor:
    return (following != IGNORED).sum().clamp(min=1)


class _LinearLoss(torch.autograd.Function):
    """Mean cross-entropy of x [N, D] W^T, its logits held a few rows at a time.

    Source: gradients beside the loss as in Liger Kernel, arXiv 2410.10989.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, following: Tensor, parts: int) -> Tensor:
        loss, *gradients = _loss_and_gradients(x, weight, following, parts, ctx.needs_input_grad)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (None if y is None else y * d.to(y.dtype) for y in ctx.saved_tensors)
        return dx, dweight, None, None


def _linear_loss(x: Tensor, weight: Tensor, following: Tensor, parts: int) -> Tensor:
    if not torch.is_grad_enabled():
        return _loss_and_gradients(x, weight, following, parts, (False, False))[0]
    loss: Tensor = _LinearLoss.apply(x, weight, following, parts)  # type: ignore[no-untyped-call]
    return loss


def _loss_and_gradients(
    x: Tensor, weight: Tensor, following: Tensor, parts: int, needed: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    count, total = _count(following), x.new_zeros((), dtype=torch.float32)
    dx = torch.empty_like(x) if needed[0] else None
    dweight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    for part in range(parts):
        rows = slice(x.shape[0] * part // parts, x.shape[0] * (part + 1) // parts)
        some, target = x[rows], following[rows, None]
        ignored = target == IGNORED
        target = target.masked_fill(ignored, 0)
        logits = (some @ weight.t()).float()
        logits -= logits.amax(dim=-1, keepdim=True)
        chosen = logits.gather(1, target)
        sums = logits.exp_().sum(dim=-1, keepdim=True)
        total += (sums.log() - chosen).masked_fill(ignored, 0.0).sum()
        if dx is None and dweight is None:
            continue
        share = (~ignored) / count  # of each row in the mean
        logits.mul_(share / sums).scatter_add_(1, target, -share)
        dlogits = logits.to(x.dtype)
        if dx is not None:
            dx[rows] = dlogits @ weight
        if dweight is not None:
            dweight += dlogits.t() @ some
    return total / count, dx, None if dweight is None else dweight.to(weight.dtype)
