"""What every mechanism shares: padding, positions, the output projection, initialisation."""

import hashlib
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from kernels import check_cu_seqlens
from smollm.attention.cache import LayerCache
from smollm.attention.padding import packing
from smollm.attention.rope import Rope, Rotation, token_positions
from smollm.attention.scaling import Llama3Scaling

QKNorm = bool | Literal["rms", "rms-full"]
Bias = bool | Literal["qkv"]
Layer = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """What every mechanism shares: padding, positions, the output projection, initialisation.

    A mechanism implements `heads`. A SmolLM calls `forward` with the tables of the module's
    `rotation`, made once for all layers that share it; alone, a module makes its own.
    """

    out_proj: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None,
        dropout: float,
        window_size: int | None,
        is_causal: bool,
        rope_dim: int | None,
        rope_theta: float,
        rope_scaling: Llama3Scaling | None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            check_divides("num_heads", num_heads, "embed_dim", embed_dim)
            head_dim = embed_dim // num_heads
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected >= 1, got {size}")
        if window_size is not None and (
            isinstance(window_size, bool) or not isinstance(window_size, int)
        ):
            raise TypeError(f"window_size: expected an integer or None, got {window_size!r}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size: expected >= 1 (it counts itself), got {window_size}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        width = head_dim if rope_dim is None else rope_dim
        self.rotation = Rotation(width, rope_theta, rope_scaling)
        self.window_size = window_size
        self.is_causal = is_causal
        self.dropout = dropout_layer(dropout)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rope: Rope | None = None,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, T, embed_dim].
            attention_mask: [B, T], True at real tokens, padding at the ends. Default none.
            rope: `rotation`'s tables of the tokens' positions. Default: counted from each start.
            cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1.
            cache: this layer's cache; with it x continues the sequences that it holds.

        Returns:
            [B, T, embed_dim]; zeros at padding.

        Raises:
            ValueError, TypeError: wrong shapes, or a mask that is not padding at the ends.
            RuntimeError: such a mask in a compiled graph, as it runs.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected [B, T, embed_dim={self.embed_dim}], got {list(x.shape)}")
        if attention_mask is not None:
            if rope is not None or cu_seqlens is not None or cache is not None:
                raise ValueError("attention_mask: expected None beside rope, cu_seqlens or cache")
            packed = packing(attention_mask, x.shape[0], x.shape[1])
            if packed is not None:
                return packed.unpack(self(packed.pack(x), cu_seqlens=packed.cu_seqlens))
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x.device)
        if rope is None:
            if cache is not None:
                raise ValueError("rope: expected the tables of the tokens' positions, got None")
            positions = token_positions(x.shape[1], cu_seqlens, device=x.device)
            rope = self.rotation.tables(positions)
        heads = self.heads(x, rope, cu_seqlens, cache)
        return self.dropout(self.out_proj(heads.flatten(-2)))

    def heads(
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """Each head's output, [B, T, H, D_V]."""
        raise NotImplementedError

    def score_and_value_width(self) -> int:
        """Multiply-adds per query-key pair: H (D_QK + D_V)."""
        return 2 * self.num_heads * self.head_dim

    def reset_parameters(self, seed: int | None = None) -> None:
        """See `initialise`."""
        initialise(self, self.embed_dim, seed)

    def reset_constants(self) -> None:
        """Give parameters that are neither projections nor norms their start; there are none."""


class Linear(nn.Linear):
    """A projection that leaves its initialisation, and torch's generator, to `initialise`."""

    def reset_parameters(self) -> None:
        """Nothing."""


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
        elif isinstance(part, Attention):
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
    norm = nn.LayerNorm if qk_norm is True else nn.RMSNorm
    return norm(width, eps=eps)


def check_norm_eps(eps: float) -> None:
    """Refuse what no norm can add to a variance."""
    if not 0 < eps < math.inf:
        raise ValueError(f"norm_eps: expected > 0, got {eps}")


def checked_window(use_sliding_window: bool, window_size: int | None) -> int | None:
    """window_size, which must be given with use_sliding_window and only then."""
    if use_sliding_window and window_size is None:
        raise ValueError("window_size: expected an integer with use_sliding_window, got None")
    if not use_sliding_window and window_size is not None:
        raise ValueError(
            f"window_size: expected None without use_sliding_window, got {window_size}"
        )
    return window_size


def checked_bias(bias: Bias) -> tuple[bool, bool]:
    """Whether the projections to heads have biases, and whether the output projection has."""
    if bias not in (False, True, "qkv"):
        raise ValueError(f"bias: expected False, True or 'qkv', got {bias!r}")
    return bool(bias), bias is True


def check_divides(name: str, part: int, whole_name: str, whole: int) -> None:
    """Refuse a part that does not divide the whole."""
    if part < 1 or whole % part:
        raise ValueError(f"{name}: expected a divisor of {whole_name}={whole}, got {part}")
