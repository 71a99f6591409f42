"""Decoding against its oracles: on a GPU, or under Triton's interpreter without one."""

import dataclasses

import pytest
import torch
from cases import DECODE_CASES, DecodeCase
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_truth
from test_attention import DEVICE, EACH_FUSED, _outputs_start_as_nan  # noqa: F401 (autouse)

import kernels

BY_NAME = {case.name: case for case in DECODE_CASES}
ALL_CASES = pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
BOTH_OPS = pytest.mark.parametrize("latent", [False, True], ids=["attention", "latent"])


def cases(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda case: case.name)


def decode(case, inputs, impl="triton"):
    op = kernels.latent_decode if case.latent else kernels.attention_decode
    return op(**inputs, **case.arguments, impl=impl)


def assert_case_parity(case, dtype, impl="triton"):
    inputs = case.inputs(dtype, DEVICE)
    exact = {
        name: x.double() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    o = decode(case, inputs, impl)
    assert o.dtype == dtype
    assert_close_to_truth(o, decode(case, inputs, "eager"), decode(case, exact, "eager"), "o")


def caches(inputs):
    return {name: x for name, x in inputs.items() if name.endswith("_cache") and x is not None}


def with_rows(cache, rows, value):
    """A copy of the cache [B, S, ...] with a value in the rows marked in [B, S]."""
    return cache.masked_fill(rows.view(*rows.shape, *[1] * (cache.dim() - 2)), value)


def rows_of_query(case, token):
    """Which rows a query sees, boolean [B, S]."""
    seen = torch.zeros(len(case.lengths), case.rows, dtype=torch.bool, device=DEVICE)
    for sequence, row in enumerate(seen):
        row[list(case.seen_rows(sequence, token))] = True
    return seen


@EACH_FUSED
@ALL_CASES
def test_parity(case, impl):
    assert_case_parity(case, torch.float32, impl)


@pytest.mark.usefixtures("_overflow_checked")
@cases("ring-late")
def test_late_positions_stay_within_32_bits(case):
    assert_case_parity(case, torch.float32)


@EACH_FUSED
@cases("smollm", "ragged", "splits", "width-40", "value-heads-8-4-2", "ring-window",
       "tokens-window", "tokens-ring-window", "sinks-window", "strided-tokens",
       "latent-288-32", "latent-ring-window", "latent-tokens-5")  # fmt: skip
def test_parity_in_bfloat16(case, impl):
    assert_case_parity(case, torch.bfloat16, impl)


@EACH_FUSED
@cases("tokens-5", "latent-144-32")
def test_parity_in_float16(case, impl):
    assert_case_parity(case, torch.float16, impl)


@EACH_FUSED
@ALL_CASES
def test_identity_values_show_exactly_the_mask(case, impl):
    """Where v is the identity the output is the attention matrix."""
    rows = min(case.rows, 200)
    width = {"width": rows} if case.latent else {"width": 16, "v_width": rows}
    heads = {"q_heads": 1, "k_heads": 1, "v_heads": None}
    case = dataclasses.replace(case, rows=rows, **heads, **width)
    inputs = case.inputs(torch.float32, DEVICE)
    identity = torch.eye(rows, device=DEVICE).expand(len(case.lengths), -1, -1)
    if case.latent:
        inputs["latent_cache"] = identity
    else:
        inputs["v_cache"] = identity[:, :, None]
    o = decode(case, inputs, impl).reshape(len(case.lengths), -1, rows)
    for token in range(o.shape[1]):
        assert torch.equal(o[:, token] != 0, rows_of_query(case, token))


@EACH_FUSED
@cases("ragged", "window-across-blocks", "ring-window", "sinks-window", "tokens-window",
       "tokens-ring-window", "latent-window", "latent-ring-window",
       "latent-tokens-ring-window")  # fmt: skip
def test_poison_out_of_sight_changes_no_bit(case, impl):
    case = dataclasses.replace(case, width=16)
    inputs = case.inputs(torch.float32, DEVICE)
    clean = decode(case, inputs, impl)
    for token in range(case.q_tokens or 1):
        unseen = ~rows_of_query(case, token)
        poison = {name: with_rows(x, unseen, 1e4) for name, x in caches(inputs).items()}
        o = decode(case, inputs | poison, impl)
        this = () if case.q_tokens is None else (slice(None), token)
        assert torch.equal(o[this], clean[this])


@EACH_FUSED
@cases("ragged", "splits", "window-in-block", "tokens-before-the-first", "latent-ragged",
       "latent-splits")  # fmt: skip
def test_rows_that_hold_no_token_may_be_nan(case, impl):
    """Nor does the memory behind the last row reach the output."""
    inputs = case.inputs(torch.float32, DEVICE)
    clean = decode(case, inputs, impl)
    empty = torch.arange(case.rows, device=DEVICE) >= inputs["cache_lengths"][:, None]
    for name, x in caches(inputs).items():
        memory = x.new_full((x.shape[0], case.rows + 70, *x.shape[2:]), torch.nan)
        memory[:, : case.rows] = with_rows(x, empty, torch.nan)
        inputs[name] = memory[:, : case.rows]
    assert torch.equal(decode(case, inputs, impl), clean)


@EACH_FUSED
@cases("tokens-before-the-first", "sinks", "sinks-ring-tokens", "latent-ragged")
def test_a_query_that_sees_nothing_gives_zero(case, impl):
    o = decode(case, case.inputs(torch.float32, DEVICE), impl)
    o = o.reshape(len(case.lengths), case.q_tokens or 1, -1)
    nothing = torch.stack([~rows_of_query(case, i).any(1) for i in range(o.shape[1])], 1)
    assert nothing.any() and torch.equal(o.eq(0).all(-1), nothing)


@EACH_FUSED
@cases("splits", "tokens-40", "latent-splits")
def test_the_output_is_the_same_bits_every_time(case, impl):
    inputs = case.inputs(torch.bfloat16, DEVICE)
    assert torch.equal(decode(case, inputs, impl), decode(case, inputs, impl))


@BOTH_OPS
@pytest.mark.parametrize(
    ("q_tokens", "window_size"),
    [(None, None), (None, 50), (5, 60)],
    ids=["all", "window", "tokens"],
)
@EACH_FUSED
def test_a_ring_equals_the_whole_cache(q_tokens, window_size, latent, impl):
    """While it holds all that the queries see: window_size + Tq - 1 rows."""
    whole = DecodeCase(
        "", (170, 64, 30), 170, q_tokens, width=32, rope=8, window_size=window_size, latent=latent
    )
    ring = dataclasses.replace(whole, rows=64)
    inputs = whole.inputs(torch.float32, DEVICE)
    rings = {name: torch.full_like(x[:, :64], torch.nan) for name, x in caches(inputs).items()}
    for name, x in rings.items():
        for sequence, length in enumerate(whole.lengths):
            for position in range(length):
                x[sequence, position % 64] = inputs[name][sequence, position]
    if window_size is None:
        whole = dataclasses.replace(whole, window_size=64)
    expected = decode(whole, inputs)
    torch.testing.assert_close(decode(ring, inputs | rings), expected, atol=1e-5, rtol=1e-5)


@EACH_FUSED
@pytest.mark.parametrize("q_tokens", [None, 3])
def test_the_latent_is_a_key_and_a_value_that_all_heads_share(q_tokens, impl):
    case = DecodeCase(
        "", (90, 40), q_tokens=q_tokens, q_heads=5, rope=16, window_size=50, latent=True
    )
    inputs = case.inputs(torch.float32, DEVICE)
    expanded = kernels.attention_decode(
        torch.cat((inputs["q_latent"], inputs["q_rope"]), -1),
        torch.cat((inputs["latent_cache"], inputs["rope_cache"]), -1)[:, :, None],
        inputs["latent_cache"][:, :, None],
        inputs["cache_lengths"],
        **case.arguments,
        impl=impl,
    )
    torch.testing.assert_close(decode(case, inputs, impl), expanded, atol=1e-5, rtol=1e-5)


@EACH_FUSED
@BOTH_OPS
def test_tokens_at_once_equal_one_at_a_time(latent, impl):
    case = DecodeCase(
        "", (64, 4, 50), q_tokens=6, q_heads=6, k_heads=2, rope=16, window_size=30, latent=latent
    )
    inputs = case.inputs(torch.float32, DEVICE)
    at_once = decode(case, inputs, impl)
    for token in range(6):
        one = {name: x[:, token] for name, x in inputs.items() if name.startswith("q")}
        one["cache_lengths"] = (inputs["cache_lengths"] - (5 - token)).clamp(min=0)
        alone = decode(case, inputs | one, impl)
        torch.testing.assert_close(at_once[:, token], alone, atol=1e-5, rtol=1e-5)


@EACH_FUSED
@BOTH_OPS
def test_a_backward_is_refused(latent, impl):
    case = DecodeCase("", width=16, latent=latent)
    inputs = case.inputs(torch.float32, DEVICE)
    o = decode(
        case, inputs | {name: x.requires_grad_() for name, x in caches(inputs).items()}, impl
    )
    with pytest.raises(NotImplementedError, match="decoding: expected no backward"):
        o.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 6, 16), (2, 3, 6, 16)], ids=["token", "tokens"])
@EACH_FUSED
@BOTH_OPS
def test_opcheck(latent, impl, shape):
    q, k = (torch.randn(n, device=DEVICE) for n in (shape, (2, 40, 2, 16)))
    lengths = torch.tensor([40, 7], dtype=torch.int32, device=DEVICE)
    given = (q, k, k + 1, None, None, lengths, torch.randn(6, device=DEVICE), None, None, 0.25)
    if latent:
        given = (q, k[:, :, 0], None, q[..., :8], k[:, :, 1, :8], lengths, None, None, 9, 0.25)
    ops = torch.ops.smollm_attention
    op = ops.decode if impl == "triton" else ops.sdpa_decode
    torch.library.opcheck(op.default, given)


@pytest.mark.slow
@EACH_FUSED
@BOTH_OPS
@pytest.mark.parametrize("q_tokens", [None, 2])
def test_compiles_as_one_graph(q_tokens, latent, impl):
    torch.compiler.reset()
    case = DecodeCase("", (70, 3), q_tokens=q_tokens, width=16, rope=8, latent=latent)

    def step(inputs):
        return decode(case, inputs, impl) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = case.inputs(torch.float32, DEVICE)
    for _ in range(2):
        torch.testing.assert_close(compiled(inputs), step(inputs))
        inputs["cache_lengths"] = inputs["cache_lengths"] + 1


@EACH_FUSED
@BOTH_OPS
@pytest.mark.parametrize("shape", [((), 64, None), ((0,), 0, None), ((9,), 64, 0)],
                         ids=["B", "S", "Tq"])  # fmt: skip
def test_empty_tensors(shape, latent, impl):
    lengths, rows, q_tokens = shape
    case = DecodeCase("", lengths, rows, q_tokens, width=16, rope=8, latent=latent)
    inputs = case.inputs(torch.float32, DEVICE)
    o = decode(case, inputs, impl)
    assert o.shape == inputs["q_latent" if latent else "q"].shape and o.eq(0).all()


@st.composite
def decode_cases(draw):
    v_heads = draw(st.integers(1, 2))
    k_heads = v_heads * draw(st.integers(1, 2))
    rows = draw(st.integers(1, 150))
    return DecodeCase(
        "drawn",
        lengths=tuple(draw(st.lists(st.integers(0, 2 * rows), min_size=1, max_size=3))),
        rows=rows,
        q_tokens=draw(st.none() | st.integers(1, 9)),
        q_heads=k_heads * draw(st.integers(1, 5)),
        k_heads=k_heads,
        v_heads=v_heads,
        width=draw(st.integers(8, 48)),
        v_width=draw(st.integers(8, 48)),
        window_size=draw(st.none() | st.integers(1, 170)),
        scale=draw(st.none() | st.floats(0.01, 0.5)),
        sinks=draw(st.booleans()),
        contiguous=draw(st.booleans()),
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(decode_cases(), st.integers(0, 2**31))
def test_parity_beyond_the_named_cases(case, seed):
    torch.manual_seed(seed)
    assert_case_parity(case, torch.float32)
