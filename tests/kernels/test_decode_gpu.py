"""Latent attention and decoding on a GPU: every case, caches that fill it, and CUDA graphs."""

import dataclasses

import pytest
import torch
from cases import DECODE_CASES, LATENT_CASES, DecodeCase, LatentCase
from numerics import assert_close_to_truth
from test_decode import assert_case_parity as assert_decode_parity
from test_decode import caches, decode
from test_latent import assert_case_parity as assert_latent_parity

pytestmark = pytest.mark.gpu
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
LONGER = [
    LatentCase("smollm-long", batch=2, tokens=700, heads=9, window_size=300),
    LatentCase("deepseek-long", tokens=700, heads=4, nope=128, rope=64, v_width=128),
    LatentCase("packed-long", tokens=700, heads=4, lengths=(100, 1, 599)),
]
SMOLLM = DecodeCase("smollm", q_heads=9, k_heads=3)
LATENT = DecodeCase("latent", q_heads=9, width=288, rope=32, latent=True)
BOTH_OPS = pytest.mark.parametrize("case", [SMOLLM, LATENT], ids=lambda case: case.name)


@HALVES
@pytest.mark.parametrize("case", [*LATENT_CASES, *LONGER], ids=lambda case: case.name)
def test_latent_parity(case, dtype):
    assert_latent_parity(case, dtype)


@HALVES
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_decode_parity(case, dtype):
    assert_decode_parity(case, dtype)


@HALVES
@BOTH_OPS
@pytest.mark.parametrize("q_tokens", [None, 4], ids=["one", "four"])
@pytest.mark.parametrize("window_size", [None, 3000], ids=["all", "window"])
def test_large_caches(case, window_size, q_tokens, dtype):
    """Each sequence by itself: the errors of the short ones would hide those of the long."""
    rows = 16_384
    special = [0, 1, rows, rows + 1, 5 * rows // 2]
    case = dataclasses.replace(
        case,
        lengths=(*special, *torch.randint(rows, (64 - len(special),)).tolist()),
        rows=rows,
        q_tokens=q_tokens,
        window_size=window_size,
    )
    inputs = {n: x for n, x in case.inputs(dtype, "cuda").items() if x is not None}
    o = decode(case, inputs)
    assert torch.equal(decode(case, inputs), o)
    for sequence in (*range(len(special)), 40, 63):
        own = {name: x[sequence, None] for name, x in inputs.items()}
        exact = {n: x.double() if x.is_floating_point() else x for n, x in own.items()}
        twin, truth = (decode(case, x, "eager") for x in (own, exact))
        name = f"o of {case.lengths[sequence]} tokens"
        assert_close_to_truth(o[sequence, None], twin, truth, name)


@BOTH_OPS
@pytest.mark.parametrize("q_tokens", [None, 3], ids=["one", "three"])
def test_a_graph_follows_the_lengths(case, q_tokens):
    """Captured once, replayed as the sequences grow: the lengths are read on the GPU alone."""
    case = dataclasses.replace(
        case, lengths=(900,) * 6, rows=1000, q_tokens=q_tokens, window_size=700
    )
    inputs = case.inputs(torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture must not
        decode(case, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode(case, inputs)
    for lengths in ([900] * 6, [1, 0, 5, 64, 999, 1000], [1001, 1300, 2000, 12_345, 3, 500]):
        inputs["cache_lengths"].copy_(torch.tensor(lengths))
        o.fill_(torch.nan)
        graph.replay()
        assert torch.equal(o, decode(case, inputs))
        torch.testing.assert_close(o, decode(case, inputs, "eager"), atol=1e-2, rtol=1e-2)


@BOTH_OPS
def test_strides_beyond_32_bits(case):
    """Caches whose sequences lie more than 2^31 elements apart."""
    case = dataclasses.replace(case, lengths=(64, 50), width=64, rope=0)
    inputs = case.inputs(torch.float16, "cuda")
    expected = decode(case, inputs)
    for name, cache in caches(inputs).items():
        row = cache[0].numel()
        far = torch.zeros(2, 2**31 + row, dtype=torch.float16, device="cuda")
        inputs[name] = far[:, :row].view(cache.shape).copy_(cache)
    assert torch.equal(decode(case, inputs), expected)
