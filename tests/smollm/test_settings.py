"""What modules and models can be told beside their widths: norms, rotation, sinks, biases."""

import re

import pytest
import torch
import torch.nn.functional as F
from test_model import build
from test_modules import WIDTH

from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)

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


def heads_of(x, weight, heads):
    return (x @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(module, q, k, v):
    """What attention makes of queries, keys and values, [B, heads, T, D]."""
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.transpose(1, 2).flatten(-2) @ module.out_proj.weight.T


@pytest.mark.parametrize("head_dim", [2, 10])
def test_heads_of_any_width(head_dim):
    module = GroupedQueryAttention(
        WIDTH, 5, 1, bias=False, is_causal=True, rotary=False, head_dim=head_dim
    ).double()
    q, k, v = (
        heads_of(X, getattr(module, name).weight, heads)
        for name, heads in (("q_proj", 5), ("k_proj", 1), ("v_proj", 1))
    )
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == head_dim
    torch.testing.assert_close(module(X), merged(module, q, k, v))
    assert module.score_and_value_width() == 5 * 2 * head_dim


def test_a_norm_over_all_heads_together():
    """As OLMo 2's: the heads of a token share one mean square."""
    module = GroupedQueryAttention(
        WIDTH, 6, 2, bias=False, is_causal=True, rotary=False, qk_norm="rms-full", norm_eps=0.1
    ).double()

    def normed(name, heads):
        x, norm = X @ getattr(module, f"{name}_proj").weight.T, getattr(module, f"{name}_norm")
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        x = x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * norm.weight
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = normed("q", 6), normed("k", 2), heads_of(X, module.v_proj.weight, 2)
    torch.testing.assert_close(module(X), merged(module, q, k, v))


def test_latent_heads_of_any_widths():
    """Each head's rows of the up-projection are its keys' and then its values'."""
    module = MultiHeadLatentAttention(
        WIDTH, 5, 10, 0, bias=False, is_causal=True, head_dim=6, value_dim=3
    ).double()
    latent = module.latent_norm(X @ module.kv_down_proj.weight.T)
    q = heads_of(X, module.q_proj.weight, 5)
    k, v = heads_of(latent, module.kv_up_proj.weight, 5).split((6, 3), dim=-1)
    torch.testing.assert_close(module(X), merged(module, q, k, v))
    assert module.score_and_value_width() == 5 * (6 + 3)


def test_genes_of_any_number():
    """Beside heads that share the model's width, and from the cache."""
    same, wide = (MultiHeadGeneticAttention(WIDTH, 6, 3, head_dim=d).double() for d in (4, 6))
    same.load_state_dict(MultiHeadGeneticAttention(WIDTH, 6, 3).state_dict())
    assert wide.w_g.out_features == wide.out_proj.in_features == 36
    model = build(wide).double().eval()
    ids = torch.arange(9)[None]
    cache = model.new_cache(1, 9)
    steps = [model(part, cache=cache)["logits"] for part in ids.split((4, 1, 3, 1), dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids)["logits"])


REFUSALS = [
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 8, qk_norm="rms-full"),
     "qk_norm: expected False, True or 'rms' with MLA, whose heads share the only key that has a "
     "norm, got 'rms-full'"),
    (lambda: MultiHeadAttention(WIDTH, 6, head_dim=0), "head_dim: expected >= 1, got 0"),
    (lambda: MultiHeadAttention(WIDTH, -1, head_dim=4), "num_heads: expected >= 1, got -1"),
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 8, value_dim=0),
     "value_dim: expected >= 1 or None, got 0"),
    (lambda: MultiHeadAttention(WIDTH, 6, norm_eps=0.0), "norm_eps: expected > 0, got 0.0"),
    (lambda: build(MultiHeadAttention(WIDTH, 6), norm_eps=-1), "norm_eps: expected > 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), REFUSALS, ids=[text[:45] for _, text in REFUSALS])
def test_refusal(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
