"""A bias of keys in attention, through each implementation alike; decoding refuses as it does."""

import dataclasses

import pytest
import torch
from cases import AttentionCase, DecodeCase, LatentCase
from numerics import assert_parity, outputs_and_gradients
from test_attention import (  # noqa: F401 (an autouse fixture)
    DEVICE,
    EACH_FUSED,
    EACH_IMPL,
    Ops,
    _outputs_start_as_nan,
    random,
)

import kernels
from kernels import reference

FAR = 131072  # a position whose running sums outgrow the digits of fp32
SMALL = {"q_heads": 4, "k_heads": 2, "width": 16}
CASES = [
    AttentionCase("window", q_tokens=80, q_heads=2, width=16, window_size=45),
    AttentionCase("batch", batch=2, q_tokens=20, **SMALL),
    AttentionCase("value-heads", q_tokens=33, q_heads=8, k_heads=4, v_heads=2, width=16),
    AttentionCase("packed", q_tokens=75, window_size=20, lengths=(45, 1, 0, 29), **SMALL),
    AttentionCase("packed-bidirectional", q_tokens=40, causal=False, lengths=(7, 33), **SMALL),
    AttentionCase("fewer-queries", batch=2, q_tokens=20, k_tokens=90, **SMALL),
    AttentionCase("fewer-queries-window", q_tokens=20, k_tokens=90, window_size=30, **SMALL),
    AttentionCase("rows-without-keys", q_tokens=80, k_tokens=20, window_size=4, **SMALL),
    AttentionCase("bidirectional", q_tokens=20, k_tokens=70, causal=False, **SMALL),
    AttentionCase("sinks", q_tokens=20, q_heads=32, k_heads=8, width=16, sinks=True),
    AttentionCase("strided", batch=2, q_tokens=20, scale=0.3, contiguous=False, **SMALL),
]
BY_NAME = {case.name: case for case in CASES}
LATENT_CASES = [
    LatentCase("rope", batch=2, tokens=20, nope=16, rope=8, v_width=16),
    LatentCase("rope-free", tokens=80, nope=16, rope=0, v_width=24, window_size=20),
    LatentCase("packed", tokens=40, nope=16, rope=8, v_width=16, lengths=(16, 1, 23)),
    LatentCase("bidirectional", tokens=20, nope=16, rope=8, v_width=16, causal=False),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EACH_LATENT = pytest.mark.parametrize("case", LATENT_CASES, ids=lambda case: case.name)
EACH_TYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def cases(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda case: case.name)


def attend(case, impl):
    """The case as a function of its tensors that returns its outputs by name."""
    if isinstance(case, LatentCase):
        return lambda **given: {"o": kernels.latent_attention(**given, **case.arguments, impl=impl)}

    def run(**given):
        o, lse = kernels.attention(**given, **case.arguments, return_lse=True, impl=impl)
        return {"o": o, "lse": lse}

    return run


def decode(case, inputs, impl):
    op = kernels.latent_decode if case.latent else kernels.attention_decode
    return op(**inputs, **case.arguments, impl=impl)


def biased(case, dtype=torch.float32, batch=None):
    """Inputs with a random bias that is as large as scores, of all batches unless one for all."""
    inputs = case.inputs(torch.float32, DEVICE)
    k, q = (inputs.get(x, inputs.get(f"{x}_nope", inputs.get(f"{x}_latent"))) for x in "kq")
    if isinstance(case, DecodeCase):
        k = inputs["latent_cache" if case.latent else "k_cache"]
    batch = k.shape[0] if batch is None else batch
    bias = 3 * torch.randn(batch, k.shape[1], q.shape[-2], dtype=dtype, device=DEVICE)
    return inputs | {"key_bias": bias}


def gates(*shape):
    """The running sum of what gates forget, [B, T, HQ], less at far positions than at late ones."""
    forget = torch.nn.functional.logsigmoid(torch.randn(shape, dtype=torch.float64) + 2)
    return -forget.cumsum(1).to(DEVICE)


def exactly(inputs):
    """The inputs in fp64."""
    return {
        name: x.double() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def results(op, inputs, upstream=None):
    """Outputs, and gradients of floating inputs, by name, for fixed upstream gradients."""
    if upstream is None:
        with torch.no_grad():
            upstream = {x: torch.ones_like(y).cumsum(1).sin() for x, y in op(**inputs).items()}
    return outputs_and_gradients(op, inputs, upstream)


def assert_all_close(found, expected, **tolerance):
    tolerance = tolerance or {"atol": 1e-5, "rtol": 1e-5}
    assert found.keys() == expected.keys()
    for name, x in found.items():
        y = expected[name].to(x.dtype)
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def textbook(case):
    """The case by its formula as it is written; nothing is seen where all is hidden."""

    def run(q, k, v, cu_seqlens, sinks, key_bias):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        (q_tokens, k_tokens), scale = (x.shape[1] for x in (q, k)), case.scale or case.width**-0.5
        k_pos = torch.arange(k_tokens, device=q.device)
        sequence = None if cu_seqlens is None else reference.sequence_index(cu_seqlens, k_tokens)
        seen = reference.visible(
            k_pos[0] + torch.arange(k_tokens - q_tokens, k_tokens, device=q.device),
            k_pos,
            causal=case.causal,
            window_size=case.window_size,
            q_sequence=sequence,
            k_sequence=sequence,
        )
        scores = scale * torch.einsum("bihd,bjhd->bhij", q, k) + key_bias.mT[:, :, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), dim=-1)
        sees_any = scores.isfinite().any(-1, keepdim=True)
        finite = torch.where(sees_any, scores, 0.0)
        weights = torch.where(sees_any, finite.softmax(-1), 0.0)[..., :k_tokens]
        lse = torch.where(sees_any[..., 0], finite.logsumexp(-1), -torch.inf).mT
        return {"o": torch.einsum("bhij,bjhd->bihd", weights, v), "lse": lse}

    return run


@EACH_CASE
def test_the_oracle_is_the_formula(case):
    inputs = exactly(biased(case))
    found, expected = (results(op, inputs) for op in (attend(case, "eager"), textbook(case)))
    assert_all_close(found, expected, atol=1e-10, rtol=1e-10)


@EACH_FUSED
@EACH_CASE
def test_parity_of_a_bias_in_fp64(case, impl):
    assert_parity(attend(case, impl), attend(case, "eager"), biased(case, torch.float64))


@EACH_FUSED
@EACH_LATENT
def test_latent_parity(case, impl):
    dtype = torch.float32 if case.rope else torch.float64
    assert_parity(attend(case, impl), attend(case, "eager"), biased(case, dtype))


@EACH_FUSED
@EACH_TYPE
@cases("value-heads", "sinks")
def test_parity_in_bfloat16(case, dtype, impl):
    bias = biased(case, dtype)["key_bias"] / 3  # sharper ones cost dS more digits than the twin's
    inputs = case.inputs(torch.bfloat16, DEVICE) | {"key_bias": bias}
    assert_parity(attend(case, impl), attend(case, "eager"), inputs)


@EACH_IMPL
@EACH_TYPE
@pytest.mark.parametrize("case", [BY_NAME["batch"], LATENT_CASES[0]], ids=["plain", "latent"])
def test_one_bias_for_all_batches_gets_the_sum_of_their_gradients(case, dtype, impl):
    one = biased(case, dtype, batch=1)
    all_of_them = one | {"key_bias": one["key_bias"].expand(case.batch, -1, -1).contiguous()}
    found, expected = (results(attend(case, impl), x) for x in (one, all_of_them))
    dbias = found["dkey_bias"]
    assert dbias.dtype == dtype and dbias.shape == one["key_bias"].shape
    expected["dkey_bias"] = expected["dkey_bias"].sum(0, keepdim=True)
    assert_all_close(found, expected, atol=1e-6, rtol=1e-6)


@EACH_IMPL
def test_the_bias_alone_may_ask_for_its_gradient(impl):
    case, dtype = BY_NAME["value-heads"], torch.float64
    inputs = biased(case, dtype)
    expected = results(attend(case, impl), inputs)["dkey_bias"]
    bias = inputs["key_bias"].requires_grad_()
    outputs = attend(case, impl)(**inputs)
    upstream = [torch.ones_like(x).cumsum(1).sin() for x in outputs.values()]
    outputs = list(outputs.values())
    first, again = (
        torch.autograd.grad(outputs, bias, upstream, retain_graph=True)[0] for _ in range(2)
    )
    assert first.dtype == dtype and torch.equal(first, expected) and torch.equal(first, again)
    (of_o,) = torch.autograd.grad(outputs[0], bias, upstream[0])  # whose weights sum to 1
    torch.testing.assert_close(of_o.sum(1), torch.zeros_like(of_o[:, 0]), atol=1e-5, rtol=0)


@EACH_IMPL
@pytest.mark.parametrize("view", [
    lambda x: x.mT.contiguous().mT,
    lambda x: x.repeat_interleave(2, 1)[:, ::2],
    lambda x: x[:1, :1, :1].expand_as(x),
    lambda x: x[:, :1].expand_as(x),
    lambda x: x.as_strided(x.shape, (1, 1, 1)),
], ids=["tokens-last", "gapped", "one-number", "one-token", "overlapping"])  # fmt: skip
def test_a_view_counts_as_its_copy(view, impl):
    case, inputs = BY_NAME["batch"], biased(BY_NAME["batch"], torch.float64)
    bias = view(inputs["key_bias"])
    found, expected = (
        results(attend(case, impl), inputs | {"key_bias": x}) for x in (bias, bias.contiguous())
    )
    assert_same_bits(found, expected)


@EACH_IMPL
@EACH_TYPE
@cases("bidirectional")
def test_only_differences_matter(case, dtype, impl):
    """All numbers are exact, so that no digit is lost by what they have in common."""
    inputs = biased(case, dtype)
    bias = (8 * inputs["key_bias"]).round() / 8
    shift = torch.tensor([2.0**17, -512.0])[:, None].expand(2, bias.shape[2] // 2).flatten()
    before, after = (
        results(attend(case, impl), inputs | {"key_bias": x}) for x in (bias, bias + shift.to(bias))
    )
    lse, expected = after.pop("lse"), before.pop("lse")
    torch.testing.assert_close(lse, expected + shift.to(lse), atol=1e-5, rtol=1e-6)
    assert_all_close(after, before, atol=2e-6, rtol=2e-6)


@EACH_IMPL
@pytest.mark.parametrize("first", [0, FAR], ids=["early", "late"])
def test_a_slope_is_the_bias_of_distances(first, impl):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0], device=DEVICE)
    position = torch.arange(first, first + 40, device=DEVICE)
    bias = (slopes * position[:, None])[None]
    inputs = {name: random(2, 40, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}

    def by_distance(q, k, v):
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        distance = position[None, :] - position[:, None]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4 + slopes[:, None, None] * distance
        weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
        return {"o": torch.einsum("bhij,bjhd->bihd", weights, v)}

    def by_position(**given):
        return {"o": kernels.attention(**given, key_bias=bias, impl=impl)}

    assert_all_close(results(by_position, inputs), results(by_distance, exactly(inputs)))


@EACH_IMPL
@pytest.mark.parametrize("case", [
    BY_NAME["window"], BY_NAME["value-heads"], LATENT_CASES[0]
], ids=lambda case: case.name)  # fmt: skip
def test_gates_forget_as_precisely_late_as_early(case, impl):
    inputs = biased(case)
    inputs["key_bias"] = gates(*inputs["key_bias"].shape)
    late = inputs | {"key_bias": inputs["key_bias"] + 1e5}
    expected = results(attend(case, "eager"), exactly(inputs))
    found = results(attend(case, impl), late)
    if "lse" in expected:
        expected["lse"] = expected["lse"] + 1e5
    assert found["dkey_bias"].dtype == torch.float64
    assert_all_close(found, expected, atol=1e-5, rtol=1e-5)


@EACH_IMPL
@cases("batch", "packed", "fewer-queries", "sinks")
def test_minus_infinity_hides_a_key(case, impl):
    """As if it were not there: it weighs nothing, and gets no gradient."""
    inputs = biased(case, torch.float64)
    hidden = torch.rand_like(inputs["key_bias"]) < 0.4
    inputs["key_bias"] = inputs["key_bias"].masked_fill(hidden, -torch.inf)
    found, expected = results(attend(case, impl), inputs), results(textbook(case), exactly(inputs))
    assert_all_close(found, expected)
    assert found["dkey_bias"][hidden].eq(0).all()
    assert found["dk"].isfinite().all() and found["dv"].isfinite().all()


@EACH_IMPL
@EACH_TYPE
def test_the_lowest_number_hides_a_key(dtype, impl):
    """From queries that see others, be it their own."""
    case = BY_NAME["bidirectional"]
    inputs = biased(case, dtype)
    expected = inputs | {"key_bias": inputs["key_bias"].clone()}
    inputs["key_bias"][:, 60:] = torch.finfo(dtype).min
    expected["key_bias"][:, 60:] = -torch.inf
    found, expected = (results(attend(case, impl), x) for x in (inputs, expected))
    assert_all_close(found, expected)


@EACH_IMPL
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_queries_whose_keys_are_all_hidden_give_zero(sinks, impl):
    case = AttentionCase("", q_tokens=70, window_size=5, sinks=sinks, **SMALL)
    inputs = biased(case)
    inputs["key_bias"][:, 10:20, 1:] = -torch.inf
    found = results(attend(case, impl), inputs)
    nothing = torch.zeros(1, 70, 4, dtype=torch.bool, device=DEVICE)
    nothing[:, 14:20, 1:] = True
    assert torch.equal(found["o"].eq(0).all(-1), nothing)
    alone = inputs["sinks"].expand_as(nothing) if sinks else found["lse"].new_tensor(-torch.inf)
    torch.testing.assert_close(found["lse"][nothing], alone.expand_as(nothing)[nothing])
    assert all(x.isfinite().all() for name, x in found.items() if name != "lse")
    assert found["dq"][nothing].eq(0).all() and found["dkey_bias"][:, 10:20, 1:].eq(0).all()
    assert found["dkey_bias"][:, 10:20, 0].ne(0).all()


@EACH_IMPL
def test_a_query_may_have_its_own_key_hidden(impl):
    case = AttentionCase("", q_tokens=20, **SMALL)
    inputs = biased(case, torch.float64)
    inputs["key_bias"] = gates(1, 20, 4)
    inputs["key_bias"][:, 5::3] = -torch.inf
    expected = results(textbook(case), exactly(inputs))
    assert_all_close(results(attend(case, impl), inputs), expected)


@EACH_IMPL
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("k_tokens", "dtype"), [(30, torch.float32), (100, torch.float64)])
def test_the_bias_of_keys_that_no_query_sees_may_be_anything(k_tokens, poison, dtype, impl):
    case = AttentionCase("", q_tokens=10, k_tokens=k_tokens, window_size=8, **SMALL)
    inputs, unseen = biased(case, dtype), k_tokens - 10 - 7
    clean = results(attend(case, impl), inputs)
    inputs["key_bias"][:, :unseen] = inputs["v"][:, :unseen] = poison
    found = results(attend(case, impl), inputs)
    assert found["dkey_bias"][:, :unseen].eq(0).all() and found["dkey_bias"].isfinite().all()
    assert_same_bits(found, clean)


@EACH_IMPL
@pytest.mark.parametrize("packed", [False, True], ids=["window", "packed"])
def test_a_bias_out_of_sight_changes_no_bit(packed, impl):
    row, first = 50, 31
    case = AttentionCase("", q_tokens=70, window_size=20, q_heads=2, width=16)
    if packed:
        first = 40
        case = dataclasses.replace(case, window_size=None, lengths=(40, 30))
    inputs, do = biased(case), random(1, 2, 16)

    def of_row(bias):
        leaves = {n: x for n, x in inputs.items() if x is not None and x.is_floating_point()}
        leaves = {n: x.clone().requires_grad_() for n, x in (leaves | {"key_bias": bias}).items()}
        outputs = attend(case, impl)(**inputs | leaves)
        o, lse = (x[:, row] for x in outputs.values())
        gradients = torch.autograd.grad((o, lse), list(leaves.values()), (do, torch.ones_like(lse)))
        named = dict(zip(leaves, gradients, strict=True))
        seen = {n: named[n][:, first : row + 1] for n in ("k", "v", "key_bias")}
        return {"o": o, "lse": lse, "q": named["q"][:, row]} | seen

    clean = of_row(inputs["key_bias"])
    for unseen in (slice(0, first), slice(row + 1, None)):
        poisoned = inputs["key_bias"].clone()
        poisoned[:, unseen] = 1e4
        assert_same_bits(of_row(poisoned), clean)


@EACH_IMPL
def test_autocast_leaves_the_bias_in_fp32(impl):
    case = BY_NAME["batch"]
    inputs = biased(case)
    expected = results(attend(case, impl), inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = results(attend(case, impl), inputs)
    assert found["dkey_bias"].dtype == torch.float32
    assert_same_bits(found, expected)


@EACH_IMPL
@pytest.mark.parametrize("batch", [None, 1], ids=["each", "one-for-all"])
@pytest.mark.parametrize("shape", [(0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0)],
                         ids=["B", "Tq", "Tk", "HQ"])  # fmt: skip
def test_empty_tensors(shape, batch, impl):
    (n, q_tokens, k_tokens, heads), dtype = shape, torch.float64
    inputs = {"q": random(n, q_tokens, heads, 16), "k": random(n, k_tokens, 2, 16)}
    inputs["v"] = inputs["k"]
    bias = torch.ones(n if batch is None else batch, k_tokens, heads, dtype=dtype, device=DEVICE)
    found = results(attend(AttentionCase(""), impl), inputs | {"key_bias": bias})
    assert found["o"].shape == inputs["q"].shape and found["lse"].shape == found["o"].shape[:3]
    assert found["dkey_bias"].shape == bias.shape and found["dkey_bias"].dtype == dtype
    assert found["o"].eq(0).all() and found["lse"].eq(-torch.inf).all()
    assert all(x.eq(0).all() for name, x in found.items() if name.startswith("d"))


def test_nothing_is_quadratic():
    case = AttentionCase("", q_tokens=80, q_heads=2, width=16, window_size=30)
    with Ops() as ops:
        results(attend(case, "triton"), biased(case, torch.float64))
    assert ops.largest == 80 * 2 * 16


Q, K = torch.zeros(2, 5, 6, 8), torch.zeros(2, 7, 3, 8)
LENGTHS = torch.tensor([7, 7], dtype=torch.int32)


def latent_decode(key_bias):
    latent = K[:, :, 0]
    return kernels.latent_decode(Q, None, latent, None, LENGTHS, scale=1.0, key_bias=key_bias)


CALLS = {
    "attention": (lambda b: kernels.attention(Q, K, K, key_bias=b), "Tk=7, HQ=6"),
    "attention_decode": (
        lambda b: kernels.attention_decode(Q, K, K, LENGTHS, key_bias=b), "S=7, HQ=6"
    ),
    "latent_decode": (latent_decode, "S=7, H=6"),
    "latent_attention": (
        lambda b: kernels.latent_attention(*[torch.zeros(2, 7, 6, 8), None] * 2,
                                           torch.zeros(2, 7, 6, 8), key_bias=b), "T=7, H=6"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "rest"), CALLS.values(), ids=CALLS)
def test_refusals(call, rest):
    for shape, batch in (
        ((2, 7, 5), "B=2"), ((2, 6, 6), "B=2"), ((2, 6, 7), "B=2"), ((3, 7, 6), "B=2"),
        ((7, 6), "B=2"), ((6,), "B=2"), ((2, 7, 6, 1), "B=2"), ((1, 7, 3), "1"), ((1, 5, 6), "1"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as refusal:
            call(torch.zeros(shape))
        assert str(refusal.value) == f"key_bias: expected [{batch}, {rest}], got {list(shape)}"
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool):
        with pytest.raises(TypeError) as refusal:
            call(torch.zeros(2, 7, 6, dtype=dtype))
        expected = f"key_bias: expected torch.float32 or torch.float64, got {dtype}"
        assert str(refusal.value) == expected
    with pytest.raises(TypeError, match=r"^key_bias: expected a tensor, got list$"):
        call([0.0])
    with pytest.raises(ValueError, match=r"^key_bias: expected .*device cpu, got meta$"):
        call(torch.zeros(2, 7, 6, device="meta"))
