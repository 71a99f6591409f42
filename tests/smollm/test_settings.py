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
from smollm.attention import Llama3Scaling, Rotation
from smollm.training.config import TrainConfig
from smollm.training.optim import Optimizers

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


SCALING = Llama3Scaling(8.0, 1.0, 4.0, 64)


def rotated(x, positions, width, theta, scaling=None):
    """Feature i and i + width / 2 as a complex number that turns; the others as they are."""
    frequencies = theta ** -(torch.arange(0, width, 2) / width)
    angles = positions[:, None] * (frequencies if scaling is None else scaling(frequencies))
    first, second = x[..., :width].chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, x[..., width:]), dim=-1)


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("width", [0, 2, 4, 6])
def test_the_first_features_of_a_head_rotate(width, scaling):
    module = GroupedQueryAttention(
        WIDTH, 4, 2, bias=False, is_causal=True, head_dim=6,
        rope_dim=width, rope_theta=100.0, rope_scaling=scaling,
    ).double()  # fmt: skip
    q, k, v = (
        heads_of(X, getattr(module, name).weight, heads)
        for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2))
    )
    q, k = (rotated(x, torch.arange(7), width, 100.0, scaling) for x in (q, k))
    torch.testing.assert_close(module(X), merged(module, q, k, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [
    lambda **given: MultiHeadAttention(WIDTH, 6, **given),
    lambda **given: MultiHeadLatentAttention(WIDTH, 6, 10, 4, **given),
    lambda **given: MultiHeadGeneticAttention(WIDTH, 6, 3, **given),
], ids=["mha", "mla", "mga"])  # fmt: skip
def test_every_mechanism_takes_a_scaling(make):
    module = make(rope_theta=7.0, rope_scaling=SCALING)
    assert module.rotation == Rotation(4, 7.0, SCALING)
    other = make(rope_theta=7.0)
    other.load_state_dict(module.state_dict())
    x = X.float()
    assert not torch.allclose(module(x), other(x))


def test_scaled_frequencies_are_transformers():
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    for theta, *given in ((500_000.0, 8.0, 1.0, 4.0, 8192), (1e4, 32.0, 2.0, 3.0, 256)):
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        parameters = {"rope_type": "llama3", "rope_theta": theta} | dict(
            zip(names, given, strict=True)
        )
        config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=parameters)
        expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        _, sin = Rotation(128, theta, Llama3Scaling(*given)).tables(torch.tensor([1]))
        torch.testing.assert_close(sin[0], expected.sin(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_is_a_key_of_a_learned_score_without_a_value(window):
    module = MultiHeadAttention(
        WIDTH, 6, 0.0, False, window is not None, window, is_causal=True, rotary=False, sinks=True
    ).double()
    assert module.sinks.eq(0).all() and module.sinks.shape == (6,)
    torch.nn.init.normal_(module.sinks)
    q, k, v = (heads_of(X, getattr(module, f"{name}_proj").weight, 6) for name in "qkv")
    ages = torch.arange(7)[:, None] - torch.arange(7)
    hidden = (ages < 0) | (ages >= (window or 7))
    scores = (q @ k.mT / 2).masked_fill(hidden, -torch.inf)
    sinks = module.sinks[:, None, None].expand(2, 6, 7, 1)
    o = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1] @ v
    expected = o.transpose(1, 2).flatten(-2) @ module.out_proj.weight.T
    torch.testing.assert_close(module(X), expected)
    given, wanted = (
        torch.autograd.grad(x.square().sum(), module.sinks) for x in (module(X), expected)
    )
    torch.testing.assert_close(given, wanted)


def test_sinks_are_parameters_of_attention_without_weight_decay():
    plain, model = (build(MultiHeadAttention(WIDTH, 6, sinks=sinks)) for sinks in (False, True))
    parts = model.parameters_by_part()
    assert parts["attention"] == plain.parameters_by_part()["attention"] + 2 * 6
    torch.nn.init.normal_(model.layers[0].attention.sinks)
    model.reset_parameters(seed=1)
    assert model.layers[0].attention.sinks.eq(0).all()
    decayed, others = Optimizers(model, TrainConfig()).param_groups
    for block in model.layers:
        assert any(block.attention.sinks is p for p in others["params"])
    assert others["weight_decay"] == 0 < decayed["weight_decay"]


@pytest.mark.parametrize(("bias", "inner", "outer"), [
    (False, False, False), (True, True, True), ("qkv", True, False),
])  # fmt: skip
def test_which_projections_have_biases(bias, inner, outer):
    for module in (
        GroupedQueryAttention(WIDTH, 6, 2, bias=bias),
        MultiHeadLatentAttention(WIDTH, 6, 10, 4, 14, bias=bias),
        MultiHeadGeneticAttention(WIDTH, 6, 3, bias=bias),
    ):
        for name, part in module.named_modules():
            if isinstance(part, torch.nn.Linear) and "up_proj" not in name:
                assert (part.bias is not None) is (outer if name == "out_proj" else inner), name


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
    (lambda: MultiHeadAttention(WIDTH, 6, bias="out"),
     "bias: expected False, True or 'qkv', got 'out'"),
    (lambda: MultiHeadAttention(WIDTH, 6, rope_dim=6),
     "rope_dim: expected at most head_dim=4, got 6"),
    (lambda: MultiHeadAttention(WIDTH, 6, rope_dim=3),
     "rotary width: expected an even number, got 3"),
    (lambda: MultiHeadAttention(WIDTH, 6, rope_dim=2, rotary=False),
     "rope_dim: expected None or 0 with rotary=False, got 2"),
    (lambda: MultiHeadAttention(WIDTH, 6, rope_theta=0.0), "rope_theta: expected > 0, got 0.0"),
    (lambda: Llama3Scaling(0.0, 1.0, 4.0, 8192), "rope_scaling: expected factor > 0, got 0.0"),
    (lambda: Llama3Scaling(8.0, 4.0, 4.0, 8192),
     "rope_scaling: expected low_freq_factor < high_freq_factor, got 4.0 and 4.0"),
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
