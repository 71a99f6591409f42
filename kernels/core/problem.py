"""The arguments of the attention core and of gene fitness, and what launches derive from them.

An op's schema names them once, these tuples once, and a kernel's signature once; between those they
travel whole.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNLIMITED = 2**30  # tokens; sums with a position stay inside int32
LOG2_E = math.log2(math.e)
LARGEST_BIAS = 2.0**24  # of a key that is not hidden; less it, others would have no digits left


class Problem(NamedTuple):
    """What the attention core computes; the tensors come first, as they are saved for the backward.

    Shapes as in `kernels.attention` and, of the rotary parts, `kernels.latent_attention`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rope: Tensor | None = None
    k_rope: Tensor | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None  # of all batches
    cu_seqlens: Tensor | None = None
    scale: float = 1.0
    causal: bool = True
    window_size: int | None = None

    @property
    def even(self) -> "Problem":
        """The same with `even_rows`, the rotary parts' too; results have their columns."""
        rows = [x if x is None else even_rows(x) for x in self[:5]]
        return Problem(*rows, *self[5:])  # type: ignore[arg-type,call-arg]

    @property
    def own_bias(self) -> Tensor | None:
        """The bias of each query's own key, which the lse of kernels is less, [B, Tq, HQ]."""
        if self.key_bias is None:
            return None
        q_tokens, k_tokens = self.q.shape[1], self.k.shape[1]
        own = torch.arange(k_tokens - q_tokens, k_tokens, device=self.q.device)
        return bias_of(self.key_bias, own[None])

    def sink_weights(self, lse_log2: Tensor) -> Tensor | None:
        """What the sinks take of each query's softmax, [B, HQ, Tq]."""
        if self.sinks is None:
            return None
        sinks, own = self.sinks.float()[:, None], self.own_bias
        if own is not None:
            sinks = (sinks - own.transpose(1, 2)).float()
        finite = lse_log2[:, :, 0].clamp(min=torch.finfo(torch.float32).min)  # as sinks may not be
        return torch.exp2(sinks * LOG2_E - finite)

    @property
    def kernel_arguments(self) -> dict[str, Any]:
        """The keyword arguments that the forward, dq and dk/dv kernels have in common."""
        batches, q_tokens, q_heads, d_qk = self.q.shape
        k_tokens, k_heads = self.k.shape[1:3]
        v_heads, d_v = self.v.shape[2:]
        packed, bias = self.cu_seqlens, self.key_bias
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "q_rope_ptr": self.q_rope,
            "k_rope_ptr": self.k_rope,
            "bias_ptr": None if bias is None else bias_parts(bias),
            "bounds_ptr": None if packed is None else sequence_bounds(packed, k_tokens),
            "batches": batches,
            "q_heads": q_heads,
            "k_heads": k_heads,
            "v_heads": v_heads,
            "q_tokens": q_tokens,
            "k_tokens": k_tokens,
            "shift": k_tokens - q_tokens,  # both sequences end together
            "behind": reach_behind(self.window_size),
            "ahead": 0 if self.causal else UNLIMITED,
            "scale_log2": log2_scale(self.scale),
            "D_QK": d_qk,
            "D_V": d_v,
            "D_ROPE": 0 if self.q_rope is None else self.q_rope.shape[-1],
            "IS_VARLEN": packed is not None,
            "BIAS_PARTS": 0 if bias is None else number_of_parts(bias),
            "LSE_PARTS": lse_parts(self.q),
            "PRECISION": dot_precision(self.q),
        }


class Genes(NamedTuple):
    """What gene fitness is computed of; the tensors come first.

    Shapes as in `kernels.genetic_attention`, (cos, sin) its rope. With a pressure, fitness becomes
    the queries and genes the keys of a selection.
    """

    g: Tensor
    e: Tensor | None
    pressure: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor | None
    window_size: int
    environment: str


def is_ragged(rows: Tensor) -> bool:
    """Whether any begins or ends beside a multiple of 16: Triton reads elements one by one then.

    So are those of 16 columns, half of a tile.
    """
    width = rows.shape[-1]
    return width < 32 or math.gcd(16, width, *rows.stride()[:-1], rows.data_ptr()) != 16


def even_rows(x: Tensor) -> Tensor:
    """x, or where it is ragged a copy with columns of zeros behind its own."""
    if not is_ragged(x):
        return x
    width = x.shape[-1]
    return F.pad(x, (0, max(32, -(-width // 16) * 16) - width)).contiguous()


def without_padding(x: Tensor, width: int) -> Tensor:
    """The first columns of contiguous even rows, contiguous."""
    return x if x.shape[-1] <= width else x[..., :width].contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(least: int) -> int:
    """The first power of two from `least` >= 1 up."""
    return 1 << (least - 1).bit_length()


def padded_width(d: int) -> int:
    """Columns that rows of d elements take in tiles of power-of-two widths, from 32 up."""
    main = max(32, 1 << d.bit_length() - 1)
    return main + (max(32, 1 << (d - main - 1).bit_length()) if d > main else 0)


def reach_behind(window_size: int | None) -> int:
    """How far before its own place a token sees."""
    return UNLIMITED if window_size is None else min(window_size, UNLIMITED) - 1


def lse_parts(q: Tensor) -> int:
    """How many fp32 numbers the lse of a query has: fp32 gradients need what rounding takes off."""
    return 2 if q.dtype == torch.float32 else 1


def number_of_parts(key_bias: Tensor) -> int:
    """How many fp32 numbers a key's bias is to kernels."""
    return 2 if key_bias.dtype == torch.float64 else 1


def bias_parts(key_bias: Tensor) -> Tensor:
    """A bias [B, Tk, HQ] in fp32, [B, HQ, parts, Tk]; a second part has what the first leaves."""
    bias = key_bias.transpose(1, 2)
    parts = [bias.float()]
    if number_of_parts(key_bias) == 2:
        rest = bias - parts[0]
        parts.append(torch.where(rest.isfinite(), rest, 0.0).float())
    return torch.stack(parts, dim=2)


def bias_of(key_bias: Tensor, keys: Tensor) -> Tensor:
    """The bias of some keys, 0 where it hides them; a constant that a softmax is free of.

    Args:
        key_bias: [B or 1, Tk, HQ].
        keys: [B or 1, Tq] places among the keys; the nearest one where there is none.

    Returns:
        [B or 1, Tq, HQ], without a gradient.
    """
    bias, tokens = key_bias.detach(), key_bias.shape[1]
    if tokens == 0:
        return bias.new_zeros(bias.shape[0], keys.shape[1], bias.shape[2])
    batch = torch.arange(bias.shape[0], device=bias.device)[:, None]
    own = bias[batch, keys.clamp(0, tokens - 1)]
    return torch.where(own.abs() < LARGEST_BIAS, own, 0.0)


def new_lse(q: Tensor) -> Tensor:
    """An empty base-2 lse for queries q, [B, HQ, parts, Tq]."""
    batches, tokens, heads, _ = q.shape
    return q.new_empty(batches, heads, lse_parts(q), tokens, dtype=torch.float32)


def new_rest(o: Tensor, with_rest: bool) -> Tensor:
    """An empty tensor for what rounding takes off o; of no elements in fp32, or if not wanted."""
    return o.new_empty(o.shape if with_rest and o.dtype != torch.float32 else (0,) * 4)


def log2_scale(scale: float) -> float:
    """The scale of scores whose softmax is taken to base 2."""
    return scale * LOG2_E


def sequence_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """First and end of the packed sequence of each token, int32 [2, T]."""
    position = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    index = torch.searchsorted(cu_seqlens.contiguous(), position, right=True)
    return torch.stack((cu_seqlens[index - 1], cu_seqlens[index]))


def dot_precision(x: Tensor) -> str:
    """fp32 products are IEEE unless PyTorch's matmul setting allows tf32."""
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"
