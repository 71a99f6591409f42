"""MGA's decoding against its oracle: on a GPU, or under Triton's interpreter without one."""

import dataclasses

import pytest
import torch
from cases import GENETIC_DECODE_CASES, GeneticCase, GeneticDecodeCase
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_truth
from test_attention import DEVICE, EACH_FUSED, EACH_IMPL, _outputs_start_as_nan  # noqa: F401 (autouse)
from test_decode import caches, rows_of_query, with_rows

import kernels

BY_NAME = {case.name: case for case in GENETIC_DECODE_CASES}
ALL_CASES = pytest.mark.parametrize("case", GENETIC_DECODE_CASES, ids=lambda case: case.name)


def cases(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda case: case.name)


def decode(case, inputs, impl="triton"):
    return kernels.genetic_decode(**inputs, **case.arguments, rope=case.tables(DEVICE), impl=impl)


def assert_case_parity(case, dtype, impl="triton"):
    inputs = case.inputs(dtype, DEVICE)
    exact = {
        name: x.double() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    o = decode(case, inputs, impl)
    assert o.dtype == dtype
    assert_close_to_truth(o, decode(case, inputs, "eager"), decode(case, exact, "eager"), "o")


@EACH_FUSED
@ALL_CASES
def test_parity(case, impl):
    assert_case_parity(case, torch.float32, impl)


@pytest.mark.usefixtures("_overflow_checked")
@cases("ring-late")
def test_late_positions_stay_within_32_bits(case):
    assert_case_parity(case, torch.float32)


@EACH_FUSED
@cases("smollm", "window-in-ring", "tokens-5", "kin", "width-96", "strided")
def test_parity_in_bfloat16(case, impl):
    assert_case_parity(case, torch.bfloat16, impl)


@EACH_FUSED
@cases("window-over-tiles", "width-40")
def test_parity_in_float16(case, impl):
    assert_case_parity(case, torch.float16, impl)


@EACH_IMPL
@cases("window-in-ring", "window-over-S", "tokens-5", "tokens-ring-too-small")
def test_rows_out_of_sight_may_hold_anything(case, impl):
    """They change no bit; what another token of the call sees may be any number."""
    inputs = case.inputs(torch.float32, DEVICE)
    clean = decode(case, inputs, impl)
    assert clean.isfinite().all()
    seen = torch.stack([rows_of_query(case, i) for i in range(case.q_tokens or 1)])
    for token in range(0, len(seen), 4):
        poison = {
            name: with_rows(with_rows(x, ~seen[token], 1e4), ~seen.any(0), torch.nan)
            for name, x in caches(inputs).items()
        }
        assert torch.equal(decode(case, inputs | poison, impl)[:, token], clean[:, token])


@EACH_IMPL
@cases("smollm", "tokens-16")
def test_a_token_that_sees_nothing_gives_zero(case, impl):
    o = decode(case, case.inputs(torch.float32, DEVICE), impl)
    seen = torch.stack([rows_of_query(case, i).any(1) for i in range(o.shape[1])], 1)
    assert not seen.all() and torch.equal(o.ne(0).any(-1).any(-1), seen)


@EACH_IMPL
@pytest.mark.parametrize("environment", ["query", "kin", "none"])
@pytest.mark.parametrize(
    ("q_tokens", "window", "rows"), [(1, 9, 9), (4, 9, 12), (7, 9, 40), (3, 50, 40)]
)
def test_it_continues_the_whole_sequence(q_tokens, window, rows, environment, impl):
    """The newest tokens of a sequence, from the rings that the others have left."""
    case = GeneticCase("", 1, 33, 4, 2, 16, window_size=window, environment=environment)
    inputs, tables = case.inputs(torch.float32, DEVICE), case.rope(DEVICE)
    del inputs["cu_seqlens"]
    whole = kernels.genetic_attention(**inputs, **case.arguments, rope=tables, impl=impl)
    k = kernels.gene_keys(inputs["g"], tables)
    kept = torch.arange(max(0, case.tokens - rows), case.tokens, device=DEVICE)
    rings = {}
    for name, x in {"g": inputs["g"], "k": k, "v": inputs.pop("v")}.items():
        ring = x.new_full((1, rows, *x.shape[2:]), torch.nan)
        ring[:, kept % rows] = x[:, kept]
        rings[f"{name}_cache"] = ring
    for name in ("g", "e"):
        inputs[name] = None if inputs[name] is None else inputs[name][:, -q_tokens:]
    o = kernels.genetic_decode(
        **inputs,
        **rings,
        cache_lengths=torch.tensor([case.tokens], dtype=torch.int32, device=DEVICE),
        **case.arguments,
        rope=tuple(table[None, -q_tokens:] for table in tables),
        impl=impl,
    )
    torch.testing.assert_close(o, whole[:, -q_tokens:], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_opcheck():
    g, ring, pressure = (torch.randn(n, device=DEVICE) for n in ((2, 3, 4, 16), (2, 40, 4, 16), 4))
    cos, sin = torch.randn(2, 2, 3, 8, device=DEVICE)
    lengths = torch.tensor([70, 7], dtype=torch.int32, device=DEVICE)
    op, caches = torch.ops.smollm_attention.select_decode.default, (ring + 1, ring[:, :, :2, :8])
    for genes in ((g, g + 1, pressure.abs(), cos, sin), (g, None, pressure.abs(), None, None)):
        environment = "none" if genes[1] is None else "query"
        torch.library.opcheck(op, (*genes, ring, lengths, 9, environment, *caches))


@EACH_FUSED
def test_the_output_is_the_same_bits_every_time(impl):
    case = BY_NAME["window-over-tiles"]
    inputs = case.inputs(torch.bfloat16, DEVICE)
    assert torch.equal(decode(case, inputs, impl), decode(case, inputs, impl))


@pytest.mark.slow
@EACH_FUSED
def test_compiles_as_one_graph(impl):
    torch.compiler.reset()
    case = dataclasses.replace(BY_NAME["kin"], width=16)

    def step(inputs):
        return decode(case, inputs, impl) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = case.inputs(torch.float32, DEVICE)
    torch.testing.assert_close(compiled(inputs), step(inputs))


@EACH_IMPL
@pytest.mark.parametrize(
    ("lengths", "rows", "q_tokens"), [((), 64, 1), ((0,), 0, 1), ((9,), 64, 0)]
)
def test_empty_tensors(lengths, rows, q_tokens, impl):
    case = GeneticDecodeCase("", lengths, rows, width=16, window_size=3, rotary=False)
    inputs = case.inputs(torch.float32, DEVICE)
    inputs |= {name: inputs[name][:, :q_tokens] for name in ("g", "e")}
    o = decode(case, inputs, impl)
    assert o.shape == inputs["g"].shape and o.eq(0).all()


@st.composite
def genetic_decode_cases(draw):
    v_heads = draw(st.integers(1, 2))
    rows = draw(st.integers(1, 150))
    rotary = draw(st.booleans())
    return GeneticDecodeCase(
        "drawn",
        lengths=tuple(draw(st.lists(st.integers(0, 2 * rows), min_size=1, max_size=3))),
        rows=rows,
        q_tokens=draw(st.integers(1, 9)),
        q_heads=v_heads * draw(st.integers(1, 3)),
        v_heads=v_heads,
        width=2 * draw(st.integers(4, 24)) + (0 if rotary else draw(st.integers(0, 1))),
        v_width=draw(st.integers(8, 48)),
        window_size=draw(st.integers(1, 170)),
        environment=draw(st.sampled_from(("query", "kin", "none"))),
        rotary=rotary,
        contiguous=draw(st.booleans()),
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(genetic_decode_cases(), st.integers(0, 2**31))
def test_parity_beyond_the_named_cases(case, seed):
    torch.manual_seed(seed)
    assert_case_parity(case, torch.float32)
