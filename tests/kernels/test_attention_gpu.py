"""The fused attention on a GPU: every case, every tile of the table, and sizes that fill it."""

import dataclasses

import pytest
import torch
from cases import ATTENTION_CASES, AttentionCase
from numerics import assert_parity

import kernels
from kernels import reference
from kernels.core import tiles

pytestmark = pytest.mark.gpu
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
WIDTHS = 16, 32, 64, 96, 128, 160, 192, 256
SHAPES = [
    AttentionCase("causal", q_tokens=500, q_heads=9, k_heads=3),
    AttentionCase("window", q_tokens=500, window_size=200, sinks=True, q_heads=32, k_heads=8),
    AttentionCase("packed", q_tokens=500, lengths=(100, 1, 399), window_size=90),
    AttentionCase("values", q_tokens=300, q_heads=8, k_heads=4, v_heads=2),
    AttentionCase("bias", q_tokens=500, q_heads=9, k_heads=3, bias=4096.0),
]


def assert_case_parity(case, dtype):
    def attend(impl):
        def run(**inputs):
            o, lse = kernels.attention(**inputs, **case.arguments, return_lse=True, impl=impl)
            return {"o": o, "lse": lse}

        return run

    assert_parity(attend("triton"), attend("eager"), case.inputs(dtype, "cuda"))


@HALVES
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_parity(case, dtype):
    assert_case_parity(case, dtype)


@HALVES
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_parity_at_every_tile(case, width, dtype):
    assert_case_parity(dataclasses.replace(case, width=width), dtype)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_is_tf32_only_where_pytorch_allows_it(precision):
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_case_parity(SHAPES[0], torch.float32)
    finally:
        torch.set_float32_matmul_precision(previous)


@HALVES
def test_long_sequences(dtype):
    """The last queries of 128k tokens, which bottom-right alignment lets the oracle do alone."""
    tokens, last, window = 131_072, 64, 1000
    q, k, v = (torch.randn(1, tokens, h, 64, device="cuda", dtype=dtype) for h in (9, 3, 3))
    for window_size in (None, window):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o = kernels.attention(q, k, v, window_size=window_size)
        assert torch.cuda.max_memory_allocated() - before < 2 * q.nbytes
        twin, truth = (
            reference.attention(*(x.to(t) for x in (q[:, -last:], k, v)), window_size=window_size)[
                0
            ]
            for t in (dtype, torch.float64)
        )
        error, twin_error = ((x.double() - truth).abs().max() for x in (o[:, -last:], twin))
        assert error <= 2 * twin_error + 1e-5


@HALVES
def test_gradients_are_the_same_bits_every_time(dtype):
    leaves = [
        torch.randn(4, 2048, h, 64, device="cuda", dtype=dtype, requires_grad=True)
        for h in (9, 3, 3)
    ]
    o = kernels.attention(*leaves, window_size=700)
    do = torch.randn_like(o)
    first = torch.autograd.grad(o, leaves, do, retain_graph=True)
    for _ in range(5):
        for one, other in zip(
            first, torch.autograd.grad(o, leaves, do, retain_graph=True), strict=True
        ):
            assert torch.equal(one, other)


def test_strides_beyond_32_bits():
    """Heads that lie more than 2^31 elements apart."""
    far = torch.zeros(2, 2**31 + 64 * 64, dtype=torch.float16, device="cuda")
    q = far[:, : 64 * 64].view(1, 2, 64, 64).transpose(1, 2)
    q.copy_(torch.randn(1, 64, 2, 64))
    expected = kernels.attention(q.contiguous(), q.contiguous(), q.contiguous(), impl="eager")
    torch.testing.assert_close(kernels.attention(q, q, q), expected, atol=1e-2, rtol=1e-2)


def test_every_tile_of_this_gpu_is_met():
    table = tiles.HALF_PRECISION[tiles.architecture(torch.device("cuda"))]
    for direction in ("forward", "short_forward", "biased_forward", "dq", "biased_dq", "dkdv"):
        assert set(table.get(direction, ())) <= set(WIDTHS)
