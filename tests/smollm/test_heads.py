"""What decay, exclusive heads and output gates mean, against their formulas."""

import dataclasses
import math
import re

import pytest
import torch
from test_model import VOCAB, build
from test_modules import WIDTH, WINDOW
from test_shape import SHAPE, built

from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)
from smollm.attention.decay import KeyDecay, alibi_slopes
from smollm.attention.exclusive import exclude_own_value
from smollm.hf import save_hf
from smollm.training.config import TrainConfig
from smollm.training.optim import Optimizers

KINDS = ("alibi", "learned", "forget")


def gqa(**options):
    """Without rotation, so that position acts through what is tested alone."""
    module = GroupedQueryAttention(
        WIDTH, 6, 2, bias=False, rotary=False, is_causal=True, **options
    ).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def scores(module, x):
    """<q, k> / sqrt(D) of [B, H, T, T], and the values of each head [B, H, T, D]."""
    q, k, v = (
        proj(x).unflatten(-1, (heads, 4)).repeat_interleave(6 // heads, dim=2).transpose(1, 2)
        for proj, heads in ((module.q_proj, 6), (module.k_proj, 2), (module.v_proj, 2))
    )
    return q @ k.mT / 2, v


def selected(module, x, penalty):
    """Each head's output [B, T, H, D] where a penalty [B, H, T, T] is taken off the scores."""
    plain, v = scores(module, x)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = (plain - penalty).masked_fill(future, -math.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def test_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    both = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor(both))


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_falls_by_the_rates_of_the_tokens_between(kind):
    module = gqa(decay=kind)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    decay = module.decay
    if kind == "alibi":
        rates = alibi_slopes(6).double().expand(2, 9, -1)
    elif kind == "learned":
        rates = -decay.level.sigmoid().log().expand(2, 9, -1)
    else:
        rates = -(x @ decay.gate_proj.weight.T + decay.level).sigmoid().log()
    penalty = torch.zeros(2, 6, 9, 9, dtype=torch.float64)
    for i in range(9):
        for j in range(i):
            penalty[:, :, i, j] = rates[:, j + 1 : i + 1].sum(dim=1)
    expected = module.out_proj(selected(module, x, penalty).flatten(2))
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-6)  # rates are of fp32


@pytest.mark.parametrize("kind", ["learned", "forget"])
def test_learned_rates_start_from_alibis(kind):
    decay = KeyDecay(kind, WIDTH, 6)
    decay.reset_constants()
    nothing = torch.zeros(1, 3, WIDTH)
    if kind == "forget":
        torch.nn.init.normal_(decay.gate_proj.weight)
    torch.testing.assert_close(decay.rates(nothing), alibi_slopes(6).expand(1, 3, 6))
    alibi = KeyDecay("alibi", WIDTH, 6)
    assert not list(alibi.parameters())
    torch.testing.assert_close(decay(nothing), alibi(nothing))


def test_decay_keeps_its_digits_far_from_the_start():
    """What the last of 131,072 tokens sees of those just before it, against them alone."""
    decay = KeyDecay("learned", WIDTH, 6)
    decay.reset_constants()
    far = decay(torch.zeros(1, 131_072, WIDTH))[:, -8:]
    near = decay(torch.zeros(1, 8, WIDTH))
    torch.testing.assert_close(far - far[:, -1:], near - near[:, -1:], atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_poison_in_a_sequence_reaches_no_other_one_behind_it(poison):
    module = MultiHeadAttention(WIDTH, 6, decay="forget", is_causal=True)
    x = torch.randn(1, 9, WIDTH)
    poisoned = x.clone()
    poisoned[:, 2:4] = poison
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    clean, out = (module(each, cu_seqlens=ends)[:, 4:] for each in (x, poisoned))
    torch.testing.assert_close(out, clean)


def test_learned_rates_have_no_weight_decay_and_their_gradient():
    model = build(MultiHeadAttention(WIDTH, 6, decay="forget"))
    ids = torch.randint(VOCAB, (2, 9))
    model(ids, labels=ids)["loss"].backward()
    level = model.layers[0].attention.decay.level
    assert level.grad.ne(0).all()
    decayed, others = Optimizers(model, TrainConfig()).param_groups
    assert any(p is level for p in others["params"])
    gate = model.layers[0].attention.decay.gate_proj.weight
    assert any(p is gate for p in decayed["params"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exclusive_head_says_nothing_along_the_tokens_own_value(dtype):
    o, v = torch.randn(2, 5, 6, 8, dtype=dtype), torch.randn(2, 5, 2, 8, dtype=dtype)
    own = v.repeat_interleave(3, dim=2)
    out = exclude_own_value(o, v)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    length = own.float().norm(dim=-1) * out.float().norm(dim=-1)
    assert ((out.float() * own.float()).sum(-1).abs() <= 8 * eps * length).all()
    along = out.double() - o.double()  # what was taken off lies along the value
    cosine = torch.nn.functional.cosine_similarity(along, own.double(), dim=-1).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=30 * eps, rtol=0)


@pytest.mark.parametrize("make", [
    lambda: GroupedQueryAttention(WIDTH, 6, 2, exclusive=True, decay="forget", is_causal=True),
    lambda: MultiHeadLatentAttention(WIDTH, 6, 10, 4, exclusive=True, **WINDOW),
    lambda: MultiHeadGeneticAttention(WIDTH, 6, 3, exclusive=True, bias=True),
], ids=["gqa", "mla", "mga"])  # fmt: skip
def test_the_first_token_of_exclusive_attention_hears_nothing(make):
    """Exactly, as nothing but its own value is in its output; its sequence's first when packed."""
    module = make()
    if module.out_proj.bias is not None:
        torch.nn.init.normal_(module.out_proj.bias)
    silent = module.out_proj(torch.zeros(module.out_proj.in_features))
    out = module(torch.randn(2, 5, WIDTH))
    assert torch.equal(out[:, 0], silent.expand(2, -1)) and not torch.equal(out[:, 1], out[:, 0])
    packed = module(torch.randn(1, 5, WIDTH), cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32))
    assert torch.equal(packed[0, [0, 3]], silent.expand(2, -1))


def test_a_value_of_zero_has_no_part():
    o = torch.randn(1, 3, 2, 4, requires_grad=True)
    v = torch.zeros(1, 3, 2, 4, requires_grad=True)
    out = exclude_own_value(o, v)
    assert torch.equal(out, o)
    do, dv = torch.autograd.grad(out.sum(), (o, v))
    assert do.eq(1).all() and dv.isfinite().all()


@pytest.mark.parametrize("kind", ["head", "element"])
def test_a_gate_scales_what_heads_give(kind):
    module = gqa(output_gate=kind, exclusive=True)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    o = selected(module, x, 0.0)
    _, v = scores(module, x)
    v = v.transpose(1, 2)
    o = o - v * (o * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
    gates = (x @ module.gate.proj.weight.T).sigmoid()
    assert gates.shape[-1] == {"head": 6, "element": 24}[kind]
    o = o.flatten(2) * (gates.repeat_interleave(4, dim=-1) if kind == "head" else gates)
    torch.testing.assert_close(module(x), module.out_proj(o))


def test_each_is_a_flag_of_every_mechanism_that_has_it():
    for mechanism in ("mha", "gqa", "mla", "mga"):
        model = built(mechanism, exclusive=True, output_gate="element", value_dim=3)
        for attention in model.attentions:
            assert attention.exclusive and attention.decay is None
            assert attention.gate.proj.out_features == (18 if mechanism == "mla" else 24)
        if mechanism != "mga":
            kinds = [built(mechanism, decay=kind).attentions[0].decay.kind for kind in KINDS]
            assert tuple(kinds) == KINDS


REFUSALS = [
    (lambda: MultiHeadAttention(WIDTH, 6, decay="linear"),
     "decay: expected one of ('none', 'alibi', 'learned', 'forget'), got 'linear'"),
    (lambda: MultiHeadLatentAttention(WIDTH, 6, 8, output_gate="heads"),
     "output_gate: expected one of ('none', 'head', 'element'), got 'heads'"),
    (lambda: MultiHeadAttention(WIDTH, 6, decay="alibi")(torch.randn(1, 3, WIDTH)),
     "decay: expected 'none' in a module that sees both ways, got 'alibi' without is_causal"),
    (lambda: MultiHeadAttention(WIDTH, 6, decay="learned", sinks=True),
     "decay: expected 'none' with sinks, which have no distance, got 'learned'"),
    (lambda: built("mga", decay="alibi"),
     "decay: expected 'none' with mga, whose attention takes no bias of keys, got 'alibi'; choose "
     "the others with --variants"),
    (lambda: save_hf(built("mha", decay="alibi"), "nowhere"),
     "decay=none instead of alibi"),
    (lambda: save_hf(built("gqa", exclusive=True), "nowhere"),
     "exclusive=False instead of True"),
    (lambda: save_hf(built("mla", output_gate="head"), "nowhere"),
     "output_gate=none instead of head"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), REFUSALS, ids=[text[:45] for _, text in REFUSALS])
def test_refusals(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_options_are_in_the_shape_that_a_checkpoint_keeps():
    changed = dataclasses.replace(SHAPE, decay="learned", exclusive=True, output_gate="head")
    assert type(SHAPE).of(**changed.flags) == changed
