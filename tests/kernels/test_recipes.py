"""The README's table of calls in place of another's: each row run, both sides equal."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kernels import attention, attention_decode

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = re.search(r"<!-- recipes -->\n(.*?)<!-- end -->(.*?)\n### ", README, re.DOTALL)
ROWS = re.findall(r"^\| `(.*?)` \| `(.*?)` \|$", SECTION[1], re.MULTILINE)
B, T, W, HQ, HK, D = 2, 9, 3, 4, 2, 8


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False
):
    """As flash-attn 2.1 and later documents itself: query i of Tq sees keys j of Tk with
    i + Tk - Tq - left <= j <= i + Tk - Tq + right, -1 is unlimited, causal is right = 0."""
    shift = k.shape[1] - q.shape[1]
    i, j = torch.arange(q.shape[1])[:, None] + shift, torch.arange(k.shape[1])
    left, right = window_size
    right = 0 if causal else right
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    seen &= (j >= i - left) | (left < 0)
    seen &= (j <= i + right) | (right < 0)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
    return (o, scores.logsumexp(dim=-1), None) if return_attn_probs else o


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    """The same of each sequence of [tokens, H, D]."""
    spans = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return torch.cat(
        [
            flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0]
            for (a, b), (c, d) in spans
        ]
    )


def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size, enable_gqa):
    assert enable_gqa
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, window_size=window_size
    )


def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, **options):
    """The same of the first cache_seqlens rows of each cache."""
    rows = enumerate(cache_seqlens.tolist())
    return torch.cat(
        [
            flash_attn_func(q[b, None], k_cache[b, None, :n], v_cache[b, None, :n], **options)
            for b, n in rows
        ]
    )


def names():
    """What the rows speak of."""
    q, k, v = (torch.randn(B, T, heads, D) for heads in (HQ, HK, HK))
    cu = torch.tensor([0, 4, 5, T], dtype=torch.int32)
    real = torch.tensor([[0] * 2 + [1] * 7, [1] * 5 + [0] * 4], dtype=torch.bool)
    return {
        "attention": attention,
        "attention_decode": attention_decode,
        "flash_attn_func": flash_attn_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
        "varlen_attn": varlen_attn,
        "sdpa": scaled_dot_product_attention,
        "flex": flex_attention,
        "AuxRequest": AuxRequest,
        "mask": lambda f, rows: create_block_mask(f, None, None, rows, T, device="cpu"),
        "offsets": lambda real: torch.tensor([0, *real.sum(1).cumsum(0)], dtype=torch.int32),
        "q": q, "k": k, "v": v,
        "qt": q.transpose(1, 2), "kt": k.transpose(1, 2), "vt": v.transpose(1, 2),
        "cu": cu, "doc": torch.arange(3).repeat_interleave(cu.diff()), "real": real,
        "lengths": torch.tensor([T, 5], dtype=torch.int32), "T": T, "W": W,
        "torch": torch, "slopes": 0.5 ** torch.arange(1.0, HQ + 1),
    }  # fmt: skip


def test_every_row_is_read():
    assert len(ROWS) == SECTION[1].count("\n") - 2 > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=lambda side: side[:60])
def test_row(theirs, ours):
    known = names()
    expected, got = (eval(side, known) for side in (theirs, ours))
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_what_has_no_counterpart_is_refused():
    known = names()
    absent = re.search(r"times position\. (.*) have no counterpart", SECTION[2].replace("\n", " "))
    without = re.findall(r"`(\w+)`", absent[1])
    assert without == ["softcap", "dropout_p", "attn_mask", "score_mod"]
    for name in without:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            attention(known["q"], known["k"], known["v"], **{name: None})
