"""What the implementation for CPUs keeps beyond the parity that it shares with the kernels."""

from unittest import mock

import pytest
import torch
from cases import AttentionCase, GeneticCase
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import outputs_and_gradients
from test_attention import assert_case_parity, cases
from test_latent import measured

import kernels
from bench.timing import peak_bytes
from kernels import blocks as blocks_of_keys
from kernels import checks, reference, sums
from kernels.blocks import blocks

MANY = settings(max_examples=200, deadline=None, derandomize=True)
EPS = torch.finfo(torch.float32).eps


@MANY
@given(
    st.integers(0, 700),
    st.integers(0, 700),
    st.booleans(),
    st.none() | st.integers(1, 800),
    st.none() | st.integers(1, 100),
    st.sampled_from([blocks_of_keys._MOST_MASKED, 100]),
)
def test_blocks_hold_exactly_what_is_visible(q_tokens, k_tokens, causal, window, most, masked):
    """Each pair that is seen is in one block, and no pair that is not."""
    window = window if causal else None
    k_pos = torch.arange(k_tokens)
    q_pos = torch.arange(q_tokens) + k_tokens - q_tokens
    met = torch.zeros(q_tokens, k_tokens, dtype=torch.int)
    with mock.patch.object(blocks_of_keys, "_MOST_MASKED", masked):
        found = blocks(q_tokens, k_tokens, causal=causal, window_size=window, most=most)
    for block in found:
        part = met[block.queries, block.keys]
        assert 0 not in part.shape and part.eq(0).all()
        assert most is None or len(part) <= most
        seen = torch.ones_like(part, dtype=torch.bool)
        if block.is_causal:
            assert block.mask is None
            seen = seen.tril()
        elif block.mask is not None:
            assert block.mask.shape == part.shape
            seen = block.mask == 0
            assert (seen | (block.mask == -torch.inf)).all()
        assert seen.any(0).all() and seen.any(1).all()
        met[block.queries, block.keys] += seen.int()
    expected = reference.visible(q_pos, k_pos, causal=causal, window_size=window)
    assert torch.equal(met, expected.int())


@cases("smollm", "tokens-129", "window-over-T", "packed", "fewer-queries", "value-heads-8-4-2",
       "sinks", "bias")  # fmt: skip
def test_long_sequences_take_no_mask(case, monkeypatch):
    monkeypatch.setattr(blocks_of_keys, "_MOST_MASKED", 30)
    assert_case_parity(case, torch.float32, "sdpa")


@MANY
@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.none() | st.integers(1, 120))
def test_blocks_of_packed_sequences(lengths, window):
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    tokens = int(offsets[-1])
    met = torch.zeros(tokens, tokens, dtype=torch.bool)
    for block in blocks(tokens, tokens, causal=True, window_size=window, cu_seqlens=offsets):
        met[block.queries, block.keys] = True
    position, sequence = torch.arange(tokens), reference.sequence_index(offsets, tokens)
    seen = reference.visible(
        position, position, window_size=window, q_sequence=sequence, k_sequence=sequence
    )
    assert (met | ~seen).all()
    assert not met[sequence[:, None] != sequence].any()


def training(tokens, window, genetic=False, bias=None):
    """Forward and backward of one call."""
    if genetic:
        case = GeneticCase("", tokens=tokens, heads=2, width=32, window_size=window)
        rope = case.rope("cpu")
    else:
        case = AttentionCase(
            "", q_tokens=tokens, q_heads=2, width=32, window_size=window, bias=bias
        )
    inputs = case.inputs(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]

    def run():
        if genetic:
            o = kernels.genetic_attention(**inputs, **case.arguments, rope=rope, impl="sdpa")
        else:
            o = kernels.attention(**inputs, **case.arguments, impl="sdpa")
        torch.autograd.grad(o.sum(), leaves)

    return run


@pytest.mark.parametrize("genetic", [False, True], ids=["attention", "genetic"])
@pytest.mark.parametrize("window", [64, 256])
def test_memory_is_linear_under_a_window(window, genetic):
    """Twice the tokens take twice the memory, and no allocation is of T x T elements."""
    few, many = 2048, 4096
    peaks = {tokens: peak_bytes(training(tokens, window, genetic)) for tokens in (few, many)}
    assert 1.7 * peaks[few] < peaks[many] < 2.1 * peaks[few]
    _, _, sizes = measured(training(many, window, genetic))
    assert max(sizes) < many**2 / 4


@pytest.mark.parametrize("window", [None, 256])
def test_memory_is_linear_with_a_bias_of_keys(window):
    few, many = 1024, 2048
    peaks = {tokens: peak_bytes(training(tokens, window, bias=0.0)) for tokens in (few, many)}
    assert 1.7 * peaks[few] < peaks[many] < 2.3 * peaks[few]
    _, _, sizes = measured(training(many, window, bias=0.0))
    assert max(sizes) < 2 * many**2  # bytes; two heads' masks of all pairs take four times that


def test_time_under_a_window_is_not_that_of_all_pairs():
    """Of so many keys few are seen; the operations are counted, which no other work disturbs."""
    pairs = {
        tokens: sum(
            (x.queries.stop - x.queries.start) * (x.keys.stop - x.keys.start)
            for x in blocks(tokens, tokens, causal=True, window_size=256)
        )
        for tokens in (4096, 8192)
    }
    assert pairs[8192] < 2.1 * pairs[4096] < 0.1 * 8192**2


@pytest.mark.parametrize("window", [1, 7, 64, 1000, 4000])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_sums_over_windows_err_little(window, packed):
    """By 1.5 eps of themselves at most, of numbers over many magnitudes."""
    tokens = 3000
    x = torch.rand(2 - packed, tokens, 2, 8) * 10.0 ** torch.randint(-6, 6, (tokens, 1, 8))
    offsets = torch.tensor([0, 900, 901, 901, tokens], dtype=torch.int32) if packed else None
    total = sums.window_sums(x, offsets, window)
    position = torch.arange(tokens)
    sequence = reference.sequence_index(offsets, tokens) if packed else None
    seen = reference.visible(
        position, position, window_size=window, q_sequence=sequence, k_sequence=sequence
    )
    exact = torch.einsum("ij,bjhd->bihd", seen.double(), x.double())
    assert ((total - exact).abs() <= 1.5 * EPS * exact).all()


@pytest.mark.parametrize("scale", [3.0, 20.0])
def test_large_scores_cost_gradients_no_more_than_the_rounding_of_their_lse(scale):
    case = AttentionCase("", q_tokens=65, q_heads=2, scale=scale, width=16)
    inputs = case.inputs(torch.float32)

    def attend(impl):
        def run(**inputs):
            o, lse = kernels.attention(**inputs, **case.arguments, return_lse=True, impl=impl)
            return {"o": o, "lse": lse}

        return run

    upstream = {"o": torch.randn(1, 65, 2, 16), "lse": torch.zeros(1, 65, 2)}
    actual = outputs_and_gradients(attend("sdpa"), inputs, upstream)
    truth = outputs_and_gradients(attend("eager"), inputs, upstream, torch.float64)
    largest = truth["lse"].abs().max()
    for name in ("dq", "dk", "dv"):
        error, most = (actual[name] - truth[name]).abs().max(), truth[name].abs().max()
        assert error <= 4 * EPS * largest * most


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_opcheck(biased, packed, window):
    q, k = torch.randn(1, 90, 4, 8, requires_grad=True), torch.randn(1, 90, 2, 8)
    offsets = torch.tensor([0, 20, 90], dtype=torch.int32) if packed else None
    bias = torch.randn(1, 90, 4, dtype=torch.float64).cumsum(1) if biased else None
    call = (q.detach(), k, k, bias, offsets, 0.3, True, window)
    torch.library.opcheck(torch.ops.smollm_attention.sdpa.default, call)
    o, lse = torch.ops.smollm_attention.sdpa(*call)
    torch.library.opcheck(torch.ops.smollm_attention.sdpa_backward.default, (*call, o, lse, o))
    torch.library.opcheck(
        torch.ops.smollm_attention.window_sums.default, (k, offsets, window or 90, True)
    )


def test_packed_sequences_of_any_lengths_share_one_graph():
    """Their number and lengths are data, not shapes."""
    q = torch.randn(1, 60, 2, 8)
    compiled = torch.compile(kernels.attention, fullgraph=True, backend="aot_eager")
    for lengths in ([0, 20, 60], [0, 1, 60]):
        offsets = torch.tensor(lengths, dtype=torch.int32)
        o = compiled(q, q, q, cu_seqlens=offsets, window_size=5)
        expected = kernels.attention(q, q, q, cu_seqlens=offsets, window_size=5, impl="eager")
        torch.testing.assert_close(o, expected)


def test_auto_is_the_fast_path_where_it_serves():
    x, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    for given_, others, expected in (
        (x, None, "sdpa"),
        (leaf, None, "sdpa"),
        (x, (), "sdpa"),
        (leaf, (), "eager"),
        (x, (None, leaf), "eager"),
        (x.to("meta"), None, "eager"),
    ):
        assert checks.implementation("auto", {"x": given_}, others=others) == expected
    with torch.no_grad():
        assert checks.implementation("auto", {"x": leaf}, others=(leaf,)) == "sdpa"


def test_tensors_elsewhere_are_refused():
    x = torch.empty(1, 5, 2, 8, device="meta")
    with pytest.raises(ValueError, match=r"expected CPU tensors for 'sdpa', got tensors on meta"):
        kernels.attention(x, x, x, impl="sdpa")
