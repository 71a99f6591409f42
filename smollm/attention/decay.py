"""Scores that fall with distance: ALiBi, a learned rate for each head, gates that forget."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smollm.attention.cache import LayerCache
from smollm.attention.layers import Linear
from smollm.attention.options import Decay

ROW = "decay"  # of the cache
FORGOTTEN = 104.0  # nats, by which an fp32 weight is 0


class KeyDecay(nn.Module):
    """b_j, which a query's score of key j has added: the sum of the rates r up to j.

    Differences alone count, b_j - b_i = -(r_{j+1} + ... + r_i), so that a score falls by the rates
    of the tokens between. They are summed in fp64 and keep the digits of fp32 at any length. A rate
    counts for 104 at the most, which leaves no weight in fp32; those of a row may sum up to 2**24.

    Args:
        kind: whose rates, per token and head in nats: "alibi", 2^(-8 h / H) of head h = 1 ... H
            where H is a power of two; "learned", one for each head; "forget", -log sigmoid(x W + c)
            of the token itself. All three start from ALiBi's, the last where x W = 0.
        embed_dim: width of x.
        num_heads: H.

    Source: ALiBi, arXiv 2108.12409; FoX, arXiv 2503.02130, whose c starts at 0.
    """

    def __init__(self, kind: Decay, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.kind = kind
        self.num_heads = num_heads
        self.gate_proj = Linear(embed_dim, num_heads, bias=False) if kind == "forget" else None
        self.level = nn.Parameter(torch.empty(num_heads)) if kind != "alibi" else None

    def reset_constants(self) -> None:
        """Learned rates start as ALiBi's."""
        if self.level is not None:
            with torch.no_grad():
                slopes = alibi_slopes(self.num_heads, self.level.device)
                self.level.copy_(-slopes.expm1().log())  # r = softplus(-level)

    def rates(self, x: Tensor) -> Tensor:
        """r of each token, fp32 [B, T, H]."""
        if self.level is None:
            rates = alibi_slopes(self.num_heads, x.device)
        else:
            level = self.level.float()
            rates = F.softplus(-(level if self.gate_proj is None else self.gate_proj(x) + level))
        return rates.expand(*x.shape[:2], -1)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """b of the tokens x [B, T, embed_dim], after those of the sequences that a cache holds.

        Returns:
            fp64 [B, T, H].
        """
        # What is no number poisons those that see it, not all that comes behind it in the row.
        rates = self.rates(x).nan_to_num(nan=0.0).clamp(max=FORGOTTEN)
        bias = rates.double().cumsum(dim=1)
        if cache is not None and cache.decoding:
            bias = bias + cache.newest(ROW)[:, None]
        return bias


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """ALiBi's, fp32 [heads]: 2^(-8 h / n), h = 1 ... n, where n heads are a power of two.

    Of other numbers the largest such n below it gives the first n, and every other one of 2n the
    rest, as its authors have it.
    """
    whole = 1 << (heads.bit_length() - 1)
    first = torch.arange(1, whole + 1, device=device)
    between = torch.arange(heads - whole, device=device) + 0.5
    return torch.exp2(-8 / whole * torch.cat((first, between)))
