"""Exclusive self-attention (XSA)."""

import torch
from torch import Tensor


def exclude_own_value(o: Tensor, v: Tensor) -> Tensor:
    """o - v <o, v> / <v, v>: a head's output less its part along the token's own value.

    What a token says of itself reaches the next layer by the residual alone; the first token, which
    sees no other, has an output of exactly 0.

    Args:
        o: [B, T, H, D].
        v: [B, T, HV, D], HV a divisor of H; value head h // (H / HV) is head h's.

    Returns:
        [B, T, H, D] in o's type, computed in fp32 or o's if that is wider.

    Source: arXiv 2603.09078.
    """
    wide = torch.promote_types(o.dtype, torch.float32)
    groups = o.to(wide).view(*v.shape[:3], -1, v.shape[3])
    own = v.to(wide)[:, :, :, None]
    square = own.square().sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    part = (groups * own).sum(-1, keepdim=True) / square
    return (groups - part * own).view(o.shape).to(o.dtype)
