"""Where nothing is seen, nothing is there, or numbers are large, in every implementation."""

import dataclasses

import pytest
import torch
from cases import DecodeCase, GeneticCase
from test_attention import DEVICE, EACH_IMPL, _outputs_start_as_nan, random  # noqa: F401 (autouse)
from test_decode import decode, rows_of_query

import kernels

DECODES = [
    DecodeCase("empty-rows", lengths=(0, 3, 40)),
    DecodeCase("window", lengths=(50, 64, 9), window_size=20),
    DecodeCase("ring", lengths=(70, 129, 30), window_size=20),
    DecodeCase("splits", lengths=(700, 37), rows=1024, window_size=300),
    DecodeCase("tokens", lengths=(50, 3, 70), q_tokens=4, window_size=20),
    DecodeCase("latent", lengths=(50, 70, 3), rope=16, window_size=20, latent=True),
]


@EACH_IMPL
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("case", DECODES, ids=lambda case: case.name)
def test_cache_rows_that_no_query_sees_may_hold_anything(case, poison, impl):
    case = dataclasses.replace(case, width=16)
    inputs = case.inputs(torch.float32, DEVICE)
    seen = torch.stack([rows_of_query(case, i) for i in range(case.q_tokens or 1)]).any(0)
    poisoned = {
        name: x.masked_fill(~seen.view(*seen.shape, *[1] * (x.dim() - 2)), poison)
        for name, x in inputs.items()
        if name.endswith("_cache")
    }
    expected = decode(case, inputs, impl)
    assert expected.isfinite().all()
    assert torch.equal(decode(case, inputs | poisoned, impl), expected)


@EACH_IMPL
def test_keys_that_no_query_sees_may_hold_nan(impl):
    """The first of a window's keys, where there are fewer queries; they get no gradient."""
    q, k, v = random(1, 30, 2, 16), random(1, 100, 2, 16), random(1, 100, 2, 16)
    unseen, window = 100 - 30 - 7, 8
    results = []
    for value in (0.0, torch.nan):
        k[:, :unseen] = v[:, :unseen] = value
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o, lse = kernels.attention(*leaves, window_size=window, return_lse=True, impl=impl)
        gradients = torch.autograd.grad(o.square().sum() + lse.sum(), leaves)
        assert all(dx[:, :unseen].eq(0).all() for dx in gradients[1:])
        results.append((o, lse, *gradients))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@EACH_IMPL
@pytest.mark.parametrize("bias", [None, 0.0, -torch.inf], ids=["plain", "biased", "hiding"])
@pytest.mark.parametrize("tokens", [5, 130])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_that_is_seen_is_not_hidden(name, tokens, bias, impl):
    """A bias hides the first key alone."""
    inputs = {each: random(1, tokens, 2, 16) for each in "qkv"}
    inputs[name][0, 3] = torch.nan
    key_bias = None
    if bias is not None:
        key_bias = torch.zeros(1, tokens, 2, device=DEVICE)
        key_bias[0, 0] = bias
    o = kernels.attention(**inputs, key_bias=key_bias, impl=impl)
    rows = slice(3, 4 if name == "q" else None)
    assert o[0, rows].isnan().all()


@EACH_IMPL
@pytest.mark.parametrize("q_tokens", [None, 3])
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_nan_that_is_seen_in_decoding_is_not_hidden(name, q_tokens, impl):
    case = DecodeCase("", lengths=(20, 50), width=16, q_tokens=q_tokens)
    inputs = case.inputs(torch.float32, DEVICE)
    place = inputs[name][..., 0, :] if name == "q" else inputs[name][:, 3]
    place.fill_(torch.nan)
    assert decode(case, inputs, impl)[..., 0, :].isnan().all()


@EACH_IMPL
@pytest.mark.parametrize("q_tokens", [0, 3], ids=["no-queries", "queries"])
@pytest.mark.parametrize("sink", [None, 0.5, -torch.inf], ids=["none", "sink", "-inf"])
def test_no_keys_at_all(sink, q_tokens, impl):
    """A sink alone is the lse, and owns its gradient."""
    leaves = [random(2, t, 3, 16, grad=True) for t in (q_tokens, 0, 0)]
    if sink is not None:
        leaves.append(torch.full((3,), sink, device=DEVICE, requires_grad=True))
    sinks = leaves[3] if sink is not None else None
    o, lse = kernels.attention(*leaves[:3], sinks=sinks, return_lse=True, impl=impl)
    assert o.shape == leaves[0].shape and o.eq(0).all()
    assert lse.shape == o.shape[:3] and lse.eq(-torch.inf if sink is None else sink).all()
    upstream = torch.ones_like(o), torch.full_like(lse, 2.0)
    gradients = torch.autograd.grad((o, lse), leaves, upstream)
    for x, dx in zip(leaves[:3], gradients, strict=False):
        assert dx.shape == x.shape and dx.eq(0).all()
    if sink is not None:
        assert gradients[3].eq(2.0 * 2 * q_tokens if sink == 0.5 else 0.0).all()


@EACH_IMPL
def test_no_heads_no_batches_no_queries_and_no_rows(impl):
    for shape in ((0, 5, 4), (2, 5, 0), (2, 0, 4)):
        batch, tokens, heads = shape
        leaves = [random(batch, tokens, h, 16, grad=True) for h in (heads, 2, 1)]
        sinks = random(heads, grad=True)
        o, lse = kernels.attention(*leaves, sinks=sinks, return_lse=True, impl=impl)
        gradients = torch.autograd.grad(o.sum() + lse.sum(), (*leaves, sinks))
        assert o.shape == leaves[0].shape and all(dx.eq(0).all() for dx in gradients)
        g, e = (random(batch, tokens, heads, 16, grad=True) for _ in range(2))
        o = kernels.genetic_attention(g, e, leaves[2], sinks, window_size=3, impl=impl)
        o = o + kernels.gene_fitness(g, e, window_size=3, impl=impl)
        gradients = torch.autograd.grad(o.sum(), (g, e, leaves[2], sinks))
        assert o.shape == g.shape and all(dx.eq(0).all() for dx in gradients)
        nope = random(batch, tokens, heads, 16, grad=True)
        k_rope = random(batch, tokens, 16, grad=True)
        o = kernels.latent_attention(nope, nope, nope, k_rope, nope, impl=impl)
        gradients = torch.autograd.grad(o.sum(), (nope, k_rope))
        assert o.shape == nope.shape and all(dx.eq(0).all() for dx in gradients)
    nothing = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    q, cache = random(2, 4, 16), random(2, 0, 2, 16)
    o = kernels.attention_decode(q, cache, cache, nothing, sinks=random(4), impl=impl)
    assert torch.equal(o, torch.zeros_like(q))
    o = kernels.latent_decode(q, None, cache[:, :, 0], None, nothing, scale=1.0, impl=impl)
    assert torch.equal(o, torch.zeros_like(q))


@EACH_IMPL
def test_a_sink_of_minus_infinity_is_none(impl):
    """Nor has it a gradient, on rows that see nothing either."""
    leaves = [random(1, t, 2, 16, grad=True) for t in (9, 5, 5)]
    sinks = torch.full((2,), -torch.inf, device=DEVICE, requires_grad=True)
    o, lse = kernels.attention(*leaves, sinks=sinks, return_lse=True, impl=impl)
    plain, plain_lse = kernels.attention(*leaves, return_lse=True, impl=impl)
    assert torch.equal(o, plain) and torch.equal(lse, plain_lse)
    upstream = torch.randn_like(o), torch.randn_like(lse)
    *gradients, dsinks = torch.autograd.grad((o, lse), (*leaves, sinks), upstream)
    assert dsinks.eq(0).all()
    expected = torch.autograd.grad((plain, plain_lse), leaves, upstream)
    for x, y in zip(gradients, expected, strict=True):
        assert x.isfinite().all() and torch.equal(x, y)
    lengths = torch.tensor([0], dtype=torch.int32, device=DEVICE)
    q, cache = random(1, 2, 16), random(1, 5, 2, 16)
    o = kernels.attention_decode(q, cache, cache, lengths, sinks=sinks.detach(), impl=impl)
    assert torch.equal(o, torch.zeros_like(q))


@EACH_IMPL
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_the_range_of_fp16(sign, impl):
    """<q, k> = 147456, and times the scale 18432."""
    q = torch.full((1, 5, 2, 64), 48.0, dtype=torch.float16, device=DEVICE)
    v = random(1, 5, 2, 64).half()
    o, lse = kernels.attention(q, sign * q, v, return_lse=True, impl=impl)
    count = torch.arange(1, 6, device=DEVICE)
    mean = v.float().cumsum(1) / count[:, None, None]
    torch.testing.assert_close(o.float(), mean, atol=2e-3, rtol=1e-3)
    expected = sign * 18432 + count.float().log()[None, :, None].expand_as(lse)
    torch.testing.assert_close(lse, expected, atol=0.01, rtol=0)
    lengths = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    o = kernels.attention_decode(q[:, 0], sign * q, v, lengths, impl=impl)
    torch.testing.assert_close(o.float(), mean[:, -1], atol=2e-3, rtol=1e-3)
    o = kernels.latent_attention(q, q[..., :8], sign * q, sign * q[:, :, 0, :8], v, impl=impl)
    torch.testing.assert_close(o.float(), mean, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_eager_errs_no_more_than_pytorch(dtype):
    q, k, v = (torch.randn(2, 64, 4, 32).to(dtype) * 2 for _ in range(3))
    truth = kernels.attention(q.double(), k.double(), v.double(), impl="eager")
    o = kernels.attention(q, k, v, impl="eager")
    heads = (x.transpose(1, 2) for x in (q, k, v))
    peer = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    error, peer_error = ((x - truth).square().mean().sqrt() for x in (o, peer))
    assert error <= 1.1 * peer_error


@pytest.mark.usefixtures("_overflow_checked")
@EACH_IMPL
def test_a_window_of_any_size_sees_all_there_is(impl):
    case = GeneticCase("", tokens=20, heads=1, width=16)
    inputs = case.inputs(torch.float32, DEVICE)
    q, lengths = random(1, 20, 2, 16), torch.tensor([20], dtype=torch.int32, device=DEVICE)
    calls = [
        lambda w: kernels.attention(q, q, q, window_size=w, impl=impl),
        lambda w: kernels.latent_attention(q, None, q, None, q, window_size=w, impl=impl),
        lambda w: kernels.attention_decode(q[:, -1], q, q, lengths, window_size=w, impl=impl),
        lambda w: kernels.genetic_attention(**inputs, window_size=w, impl=impl),
        lambda w: kernels.gene_fitness(inputs["g"], inputs["e"], window_size=w, impl=impl),
    ]
    for call in calls:
        for window_size in (2**31, 10**30):
            assert torch.equal(call(window_size), call(20))


@EACH_IMPL
def test_no_gradient_reaches_the_rotary_tables(impl):
    g, cos, sin = random(1, 5, 1, 8, grad=True), random(5, 4, grad=True), random(5, 4, grad=True)
    options = {"window_size": 3, "environment": "none", "rope": (cos, sin), "impl": impl}
    o = kernels.genetic_attention(g, None, g, torch.ones(1, device=DEVICE), **options)
    assert torch.autograd.grad(o.sum(), (cos, sin), allow_unused=True) == (None, None)
