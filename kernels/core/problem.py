"""What every launch of the attention core derives from the op's arguments."""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.core.primitives import padded_width

UNLIMITED = 2**30  # tokens; sums with a position stay inside int32


def attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rope: Tensor | None,
    k_rope: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window_size: int | None,
    scale: float,
) -> dict[str, Any]:
    """The keyword arguments that the forward, dq and dk/dv kernels have in common."""
    batches, q_tokens, q_heads, d_qk = q.shape
    k_tokens, k_heads = k.shape[1:3]
    v_heads, d_v = v.shape[2:]
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "q_strides": q.stride(),
        "k_strides": k.stride(),
        "v_strides": v.stride(),
        **rope_arguments(q, k, q_rope, k_rope),
        "bounds_ptr": None if cu_seqlens is None else sequence_bounds(cu_seqlens, k_tokens),
        "batches": batches,
        "q_heads": q_heads,
        "k_heads": k_heads,
        "v_heads": v_heads,
        "q_tokens": q_tokens,
        "k_tokens": k_tokens,
        "shift": k_tokens - q_tokens,  # both sequences end together
        "behind": UNLIMITED if window_size is None else min(window_size, UNLIMITED) - 1,
        "ahead": 0 if causal else UNLIMITED,
        "scale_log2": log2_scale(scale),
        "D_QK": d_qk,
        "D_V": d_v,
        "IS_VARLEN": cu_seqlens is not None,
        "PRECISION": dot_precision(q),
    }


def log2_scale(scale: float) -> float:
    """The scale of scores whose softmax is taken to base 2."""
    return scale * math.log2(math.e)


def rope_arguments(
    q: Tensor, k: Tensor, q_rope: Tensor | None, k_rope: Tensor | None
) -> dict[str, Any]:
    """The rotary parts, queries [B, T, H, D_ROPE] and keys [B, T, D_ROPE], as kernels take them."""
    if q_rope is None or k_rope is None:
        q_rope, shared, width = q, k, 0  # of no width, so never read
    else:
        shared, width = k_rope[:, :, None], q_rope.shape[-1]
    return {
        "q_rope_ptr": q_rope,
        "k_rope_ptr": shared,
        "q_rope_strides": q_rope.stride(),
        "k_rope_strides": shared.stride(),
        "D_ROPE": width,
    }


def tile_width(arguments: dict[str, Any]) -> int:
    """Columns of the wider of the rows that are scored and of those that are summed."""
    scored = [arguments["D_QK"], arguments["D_ROPE"]]
    return max(sum(padded_width(d) for d in scored if d), padded_width(arguments["D_V"]))


def sequence_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """First and end of the packed sequence of each token, int32 [2, T]."""
    position = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    index = torch.searchsorted(cu_seqlens, position, right=True)
    return torch.stack((cu_seqlens[index - 1], cu_seqlens[index]))


def dot_precision(x: Tensor) -> str:
    """fp32 products are IEEE unless PyTorch's matmul setting allows tf32."""
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"
