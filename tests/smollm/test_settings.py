"""What modules and models can be told beside their widths: norms, rotation, sinks, biases."""

import re

import pytest
import torch
from test_model import build
from test_modules import WIDTH

from smollm import GroupedQueryAttention, MultiHeadAttention, MultiHeadLatentAttention

X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("qk_norm", [True, "rms"])
def test_every_norm_of_a_model_has_its_eps(qk_norm):
    """But the norms of latents, which have DeepSeek's."""
    for make in (
        lambda: GroupedQueryAttention(WIDTH, 6, 2, qk_norm=qk_norm, norm_eps=0.25),
        lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 4, 14, qk_norm=qk_norm, norm_eps=0.25),
    ):
        model = build(make(), norm_strategy="sandwich", norm_eps=0.5)
        for name, module in model.named_modules():
            if name.endswith("norm"):
                inner = 1e-6 if "latent_norm" in name else 0.25
                outer = "_pre_norm" in name or "_post_norm" in name or name == "norm"
                assert module.eps == (0.5 if outer else inner), name


REFUSALS = [
    (lambda: MultiHeadAttention(WIDTH, 6, norm_eps=0.0), "norm_eps: expected > 0, got 0.0"),
    (lambda: build(MultiHeadAttention(WIDTH, 6), norm_eps=-1), "norm_eps: expected > 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), REFUSALS, ids=[text[:45] for _, text in REFUSALS])
def test_refusal(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
