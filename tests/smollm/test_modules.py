"""The four modules alone: causality, padding, packing, norms, refusals."""

import re
from dataclasses import fields

import pytest
import torch

from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)
from smollm.attention import MECHANISMS, SharedOptions
from smollm.model.config import ModelConfig

WIDTH = 24
WINDOW = {"use_sliding_window": True, "window_size": 3}
MODULES = {
    "mha": lambda: MultiHeadAttention(WIDTH, 6, is_causal=True),
    "mha-window": lambda: MultiHeadAttention(WIDTH, 6, **WINDOW),
    "mha-qk-norm": lambda: MultiHeadAttention(WIDTH, 6, qk_norm=True, is_causal=True),
    "gqa": lambda: GroupedQueryAttention(WIDTH, 6, 2, is_causal=True),
    "gqa-rms": lambda: GroupedQueryAttention(WIDTH, 6, 2, qk_norm="rms", is_causal=True),
    "gqa-settings": lambda: GroupedQueryAttention(
        WIDTH,
        5,
        1,
        bias="qkv",
        qk_norm="rms-full",
        is_causal=True,
        head_dim=6,
        rope_dim=2,
        sinks=True,
    ),
    "gqa-no-rotary": lambda: GroupedQueryAttention(WIDTH, 6, 1, rotary=False, is_causal=True),
    "mha-alibi": lambda: MultiHeadAttention(WIDTH, 6, decay="alibi", **WINDOW),
    "mha-exclusive": lambda: MultiHeadAttention(WIDTH, 6, exclusive=True, is_causal=True),
    "gqa-forget": lambda: GroupedQueryAttention(
        WIDTH, 6, 2, decay="forget", output_gate="head", is_causal=True
    ),
    "gqa-exclusive-window": lambda: GroupedQueryAttention(
        WIDTH, 6, 2, exclusive=True, output_gate="element", decay="learned", **WINDOW
    ),
    "mla": lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 4, is_causal=True),
    "mla-window": lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 4, **WINDOW),
    "mla-qk-norm": lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 4, qk_norm=True, is_causal=True),
    "mla-no-rope": lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 0, is_causal=True),
    "mla-q-latent": lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 4, 14, is_causal=True),
    "mla-widths": lambda: MultiHeadLatentAttention(
        WIDTH, 5, 10, 4, is_causal=True, head_dim=6, value_dim=3
    ),
    "mla-forget": lambda: MultiHeadLatentAttention(
        WIDTH, 6, 10, 4, decay="forget", output_gate="element", is_causal=True
    ),
    "mla-exclusive": lambda: MultiHeadLatentAttention(
        WIDTH, 6, 10, 0, exclusive=True, decay="alibi", value_dim=3, **WINDOW
    ),
    "mga": lambda: MultiHeadGeneticAttention(WIDTH, 6, 3),
    "mga-kin": lambda: MultiHeadGeneticAttention(WIDTH, 6, 3, 2, environment="kin"),
    "mga-exclusive": lambda: MultiHeadGeneticAttention(
        WIDTH, 6, 3, 2, exclusive=True, output_gate="head"
    ),
    "mga-none": lambda: MultiHeadGeneticAttention(WIDTH, 6, 5, 1, environment="none", rotary=False),
    "mga-no-fitness": lambda: MultiHeadGeneticAttention(WIDTH, 6, 3, 2, gene_fitness=False),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def reach(module, tokens=9):
    """[T, T]: whether output i depends on input j."""
    x = torch.randn(1, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    out = module.double()(x)
    rows = [torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0] for i in range(tokens)]
    return torch.stack(rows).abs().sum(-1) > 0


@every_module
def test_a_token_sees_its_window_exactly(make):
    module = make()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    window = module.window_size or 9
    expected = (distance >= 0) & (distance < window)
    reached = reach(module)
    if module.exclusive:  # the first token's own value is all that it sees, and is taken off
        reached[0, 0] = expected[0, 0]
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("make", [
    lambda: MultiHeadAttention(WIDTH, 6),
    lambda: GroupedQueryAttention(WIDTH, 6, 2),
    lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 4),
], ids=["mha", "gqa", "mla"])  # fmt: skip
def test_alone_a_module_is_bidirectional_unless_told(make):
    assert reach(make()).all()


@every_module
def test_padding_left_right_and_both(make):
    module = make().double()
    lengths = [(0, 7), (3, 4), (0, 5), (2, 3)]
    x = torch.randn(4, 7, WIDTH, dtype=torch.float64)
    mask = torch.zeros(4, 7, dtype=torch.bool)
    for row, (start, length) in enumerate(lengths):
        mask[row, start : start + length] = True
    out = module(x, mask)
    assert torch.equal(module(torch.where(mask[..., None], x, 1e4), mask), out)
    assert out[~mask].eq(0).all()
    for row, (start, length) in enumerate(lengths):
        alone = module(x[row : row + 1, start : start + length])
        torch.testing.assert_close(out[row, start : start + length], alone[0])
    torch.testing.assert_close(module(x, mask.long()), out)


@every_module
def test_packed_sequences_are_strangers(make):
    module = make().double()
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    packed = module(x, cu_seqlens=torch.tensor([0, 4, 5, 9], dtype=torch.int32))
    parts = [module(x[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


@every_module
def test_half_types(make):
    module = make().to(torch.bfloat16)
    x = torch.randn(2, 9, WIDTH)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = make()(x)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_rotary_positions_survive_bfloat16_weights():
    """A cast of the whole module must not round positions: 2047 and 2048 stay apart."""
    module = MultiHeadAttention(WIDTH, 6).to(torch.bfloat16)
    cos, _ = module.rotation.tables(torch.tensor([2047, 2048]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.rotation.tables(torch.tensor([2047, 2048]))[0], cos)
    expected = torch.tensor([2047.0, 2048.0], dtype=torch.float64).cos()
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[:, 0].double(), expected, atol=1e-3, rtol=0)


def test_query_key_norm_comes_before_rotation():
    module = GroupedQueryAttention(WIDTH, 6, 2, qk_norm=True)
    assert isinstance(module.q_norm, torch.nn.LayerNorm) and module.q_norm.normalized_shape == (4,)
    x = torch.randn(1, 5, WIDTH)
    before = module(x)
    with torch.no_grad():
        module.q_proj.weight.mul_(7.0)
        module.q_proj.bias.mul_(7.0)
    torch.testing.assert_close(module(x), before, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        module.q_norm.weight[0] = 9.0  # features turn with positions only after the norm
    assert not torch.allclose(module(x), before, atol=1e-3)


def test_dropout_acts_in_training_only():
    module = MultiHeadAttention(WIDTH, 6, dropout=0.5)
    x = torch.randn(1, 5, WIDTH)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_mga_starts_as_documented():
    module = MultiHeadGeneticAttention(576, 9, 32)
    torch.testing.assert_close(module.log_selection_pressure.exp(), torch.full((9,), 4.0))
    assert abs(module.w_g.weight.std().item() * 24 - 1) < 0.02
    assert MultiHeadGeneticAttention(WIDTH, 6, 3, environment="kin").w_e is None


X = torch.zeros(2, 5, WIDTH)
REFUSALS = [
    (lambda: MultiHeadAttention(WIDTH, 7), "num_heads: expected a divisor of embed_dim=24, got 7"),
    (lambda: MultiHeadAttention(WIDTH, 0), "num_heads: expected a divisor of embed_dim=24, got 0"),
    (lambda: MultiHeadAttention(WIDTH, 8), "rotary width: expected an even number, got 3"),
    (lambda: GroupedQueryAttention(WIDTH, 6, 4), "num_kv_heads: expected a divisor of num_heads=6"),
    (lambda: MultiHeadAttention(WIDTH, 6, use_sliding_window=True),
     "window_size: expected an integer with use_sliding_window, got None"),
    (lambda: MultiHeadAttention(WIDTH, 6, window_size=3),
     "window_size: expected None without use_sliding_window, got 3"),
    (lambda: MultiHeadAttention(WIDTH, 6, use_sliding_window=True, window_size=0),
     "window_size: expected >= 1 (it counts itself), got 0"),
    (lambda: MultiHeadAttention(WIDTH, 6, qk_norm="batch"),
     "qk_norm: expected False, True, 'rms' or 'rms-full', got 'batch'"),
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 0), "latent_dim: expected >= 1, got 0"),
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 8, 0, qk_norm="rms"),
     "qk_norm: expected False with rope_dim=0, where every key is expanded from the latent and "
     "must stay linear in it, got 'rms'"),
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 8, q_latent_dim=0),
     "q_latent_dim: expected >= 1 or None, got 0"),
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 8, -2), "rope_dim: expected >= 0, got -2"),
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 8, 3), "rotary width: expected an even number"),
    (lambda: MultiHeadGeneticAttention(WIDTH, 6, None),
     "window_size: expected an integer >= 1 (the population), got None"),
    (lambda: MultiHeadGeneticAttention(WIDTH, 6, 3, 4), "num_value_heads: expected a divisor of"),
    (lambda: MultiHeadGeneticAttention(WIDTH, 6, 3, environment="kith"),
     "environment: expected 'query', 'kin' or 'none', got 'kith'"),
    (lambda: MultiHeadGeneticAttention(WIDTH, 6, 3, selection_pressure=0.0),
     "selection_pressure: expected > 0, got 0.0"),
    (lambda: MultiHeadAttention(WIDTH, 6)(X[..., :5]),
     "x: expected [B, T, embed_dim=24], got [2, 5, 5]"),
    (lambda: MultiHeadAttention(WIDTH, 6)(X, torch.ones(2, 1, 5, 5)),
     "attention_mask: expected [B=2, T=5]"),
    (lambda: MultiHeadAttention(WIDTH, 6)(X, torch.tensor([[1, 0, 1, 1, 1]] * 2)),
     "attention_mask: expected padding at the ends only, got a gap inside row 0"),
    (lambda: MultiHeadAttention(WIDTH, 6)(X, torch.zeros(2, 5).bool()),
     "attention_mask: expected a real token, got padding only"),
    (lambda: MultiHeadAttention(WIDTH, 6)(X, torch.full((2, 5), 3)),
     "attention_mask: expected 0 or 1, got values up to 3"),
    (lambda: MultiHeadAttention(WIDTH, 6)(
        X[:1], torch.ones(1, 5).bool(), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)),
     "attention_mask: expected None beside rope, cu_seqlens or cache"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), REFUSALS, ids=[text[:45] for _, text in REFUSALS])
def test_refusal(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_an_additive_mask_is_refused():
    with pytest.raises(TypeError, match="attention_mask: expected booleans or integers"):
        MultiHeadAttention(WIDTH, 6)(X, torch.zeros(2, 5))


def test_no_two_mechanisms_share_a_flag():
    own = [field.name for row in MECHANISMS.values() for field in fields(row.options)]
    shared = [field.name for field in fields(SharedOptions)]
    assert len(own + shared) == len({*own, *shared})


def test_a_config_goes_through_its_flags_and_back():
    config = ModelConfig.of(embed_dim=36, num_kv_heads=9, environment="kin", window_size=5)
    assert config.flags["num_kv_heads"] == 9 and ModelConfig.of(**config.flags) == config
    ((row, arguments),) = config.layer_arguments("gqa")
    assert row is MECHANISMS["gqa"] and row.module(**arguments).num_kv_heads == 9
    with pytest.raises(TypeError, match="num_genes"):
        ModelConfig.of(num_genes=3)


def test_multi_head_attention_takes_the_arguments_of_grouped():
    module = MultiHeadAttention(WIDTH, 6, 0.5, False, True, 3, "rms")
    assert (module.dropout.p, module.window_size, module.num_kv_heads) == (0.5, 3, 6)
    with pytest.raises(TypeError):
        MultiHeadAttention(WIDTH, 6, num_kv_heads=2)
