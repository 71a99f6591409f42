"""Layers that leave their start to one function, and what else modules are made of."""

import hashlib
import math
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mkldnn

from kernels import readable

QKNorm = bool | Literal["rms", "rms-full"]
Layer = Callable[[Tensor], Tensor]
ONEDNN_PAYS = 2**16  # numbers in a weight; to call it takes longer, 12 us


@runtime_checkable
class HasConstants(Protocol):
    """A module with parameters that are neither projections nor norms."""

    def reset_constants(self) -> None:
        """Give them their start."""


class Linear(nn.Linear):
    """A projection that leaves its initialisation, and torch's generator, to `initialise`."""

    def reset_parameters(self) -> None:
        """Nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """With its weight in the input's type, so that half of autocast takes the fused norm, too."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, where no gradient is asked for by oneDNN on a CPU and not by MKL.

    In fp32 MKL multiplies a single row on one core, and leaves AVX-512 unused on AMD's CPUs.

    Args:
        x: [..., K].
        weight: W [N, K].
        bias: b [N].
    """
    if torch.is_grad_enabled() or not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether it pays, and both are what PyTorch's own call of oneDNN takes as it stands."""
    return (
        weight.numel() >= ONEDNN_PAYS
        and readable(x)
        and x.dtype is weight.dtype is torch.float32
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_cpu
        and weight.is_contiguous()
        and x.shape[-1:] == weight.shape[1:]  # else PyTorch's own words say what is wrong
        and not torch.is_autocast_enabled("cpu")
        and mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(mkldnn.enabled)
    )


def initialise(module: nn.Module, embed_dim: int, seed: int | None = None) -> None:
    """The one initialisation: embeddings and projections N(0, 1 / embed_dim), biases 0, norms 1.

    Each weight is drawn from a generator of its own, keyed by the seed and the weight's name, so
    that models that differ in one part start alike in all others. Without a seed, one is drawn from
    torch's global generator, and nothing else.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            _draw(part.weight, embed_dim**-0.5, f"{seed} {name}")
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
            part.reset_parameters()
        elif isinstance(part, HasConstants):
            part.reset_constants()


def _draw(weight: Tensor, std: float, key: str) -> None:
    if weight.is_meta:
        return
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
    nn.init.normal_(weight, std=std, generator=generator)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, T, heads, D]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def unchanged(x: Tensor) -> Tensor:
    """x itself; decoding a token calls so many layers that an nn.Identity can be felt."""
    return x


def dropout_layer(p: float) -> Layer:
    """Dropout, where there is any."""
    return nn.Dropout(p) if p else unchanged


def head_norm(qk_norm: QKNorm, width: int, eps: float) -> Layer:
    """The norm over a width that `qk_norm` names, which is none for False or no width."""
    if qk_norm not in (False, True, "rms", "rms-full"):
        raise ValueError(f"qk_norm: expected False, True, 'rms' or 'rms-full', got {qk_norm!r}")
    check_norm_eps(eps)
    if not qk_norm or width == 0:
        return unchanged
    norm = nn.LayerNorm if qk_norm is True else RMSNorm
    return norm(width, eps=eps)


def check_norm_eps(eps: float) -> None:
    """Refuse what no norm can add to a variance."""
    if not 0 < eps < math.inf:
        raise ValueError(f"norm_eps: expected > 0, got {eps}")
