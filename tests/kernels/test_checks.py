"""Every refusal of the public ops, by its text."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import tensors


def z(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


Q, K = z(2, 5, 9, 64), z(2, 5, 3, 64)
ONE = z(1, 5, 3, 64)
G, PRESSURE = z(1, 5, 4, 6), z(4)
RING = z(1, 7, 4, 6)
ROPE = (z(5, 3), z(5, 3))
LATENT = z(2, 5, 8)


def genetic_decode(e=G, pressure=PRESSURE, ring=RING, v=RING, **options):
    options = {"window_size": 2, **options}
    return kernels.genetic_decode(G, e, pressure, ring, ring, v, ints(3), **options)


def latent_decode(q_latent, q_rope, latent_cache=LATENT, **options):
    return kernels.latent_decode(
        q_latent, q_rope, latent_cache, z(2, 5, 4), ints(1, 1), scale=1.0, **options
    )


REFUSALS = [
    (lambda: kernels.attention(Q, z(2, 5, 3, 63), K), ValueError,
     "k: expected [B=2, Tk, HK, D_QK=64], got [2, 5, 3, 63]"),
    (lambda: kernels.attention(Q, K, z(2, 4, 3, 64)), ValueError,
     "v: expected [B=2, Tk=5, HV, D_V], got [2, 4, 3, 64]"),
    (lambda: kernels.attention(Q[0], K, K), ValueError,
     "q: expected [B, Tq, HQ, D_QK], got [5, 9, 64]"),
    (lambda: kernels.attention(Q, z(2, 5, 2, 64), z(2, 5, 2, 64)), ValueError,
     "heads: expected HQ a multiple of HK, got HQ=9, HK=2"),
    (lambda: kernels.attention(Q, K, z(2, 5, 2, 64)), ValueError,
     "heads: expected HK a multiple of HV, got HK=3, HV=2"),
    (lambda: kernels.attention(Q, z(2, 5, 0, 64), z(2, 5, 0, 64)), ValueError,
     "heads: expected HQ a multiple of HK, got HQ=9, HK=0"),
    (lambda: kernels.attention(Q, K.half(), K), TypeError,
     "k: expected q's type torch.float32, got torch.float16"),
    (lambda: kernels.attention(Q.int(), K.int(), K.int()), TypeError,
     "q: expected a floating type"),
    (lambda: kernels.attention(Q, K, K.to("meta")), ValueError,
     "v: expected q's device cpu, got meta"),
    (lambda: kernels.attention(Q, K, K, window_size=0), ValueError,
     "window_size: expected >= 1 (it counts the token itself), got 0"),
    (lambda: kernels.attention(Q, K, K, window_size=2.5), TypeError,
     "window_size: expected an integer or None, got 2.5"),
    (lambda: kernels.attention(Q, K, K, window_size=True), TypeError,
     "window_size: expected an integer or None, got True"),
    (lambda: kernels.attention(Q, K, K, window_size=torch.tensor(3)), TypeError,
     "window_size: expected an integer or None, got tensor(3)"),
    (lambda: kernels.attention(Q, K, K, window_size=-(10**30)), ValueError,
     "window_size: expected >= 1 (it counts the token itself), got -1000000000000000"),
    (lambda: kernels.attention(Q, K, K, causal=None), TypeError,
     "causal: expected a bool, got None"),
    (lambda: kernels.attention(Q, K, K, scale=torch.tensor(0.5)), TypeError,
     "scale: expected a float or None, got tensor(0.5000)"),
    (lambda: kernels.attention(Q, K, K, scale=True), TypeError,
     "scale: expected a float or None, got True"),
    (lambda: kernels.attention(Q, K, K, scale=float("inf")), ValueError,
     "scale: expected a finite number > 0, at most 2**127, got inf"),
    (lambda: kernels.attention(Q, K, K, scale=10**400), ValueError,
     "scale: expected a finite number > 0, at most 2**127, got 1000000000000000000"),
    (lambda: kernels.attention(Q, K, K, scale=-0.5), ValueError,
     "scale: expected a finite number > 0, at most 2**127, got -0.5"),
    (lambda: kernels.attention([1.0], K, K), TypeError,
     "q: expected a tensor, got list"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=[0, 5]), TypeError,
     "cu_seqlens: expected a tensor, got list"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(0, 5)[None]), ValueError,
     "cu_seqlens: expected [N+1] with N >= 1, got [1, 2]"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints()), ValueError,
     "cu_seqlens: expected [N+1] with N >= 1, got [0]"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(1, 5)), ValueError,
     "cu_seqlens: expected non-decreasing offsets from 0 to T=5, got [1, 5]"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(0, 5, 6)), ValueError,
     "cu_seqlens: expected non-decreasing offsets from 0 to T=5, got [0, 5, 6]"),
    (lambda: kernels.attention(Q, K, K, window_size=3, causal=False), ValueError,
     "window_size: expected None when causal=False, got 3"),
    (lambda: kernels.attention(Q, K, K, scale=float("nan")), ValueError,
     "scale: expected a finite number > 0, at most 2**127, got nan"),
    (lambda: kernels.attention(Q, K, K, scale="1"), TypeError,
     "scale: expected a float or None, got '1'"),
    (lambda: kernels.attention(Q, K, K, sinks=z(3)), ValueError,
     "sinks: expected [HQ=9], got [3]"),
    (lambda: kernels.attention(Q, K, K, sinks=ints(*range(9))), TypeError,
     "sinks: expected a floating type"),
    (lambda: kernels.attention(Q, K, K, cu_seqlens=ints(0, 5)), ValueError,
     "cu_seqlens: expected B=1 (packed sequences), got B=2"),
    (lambda: kernels.attention(ONE[:, :2], ONE, ONE, cu_seqlens=ints(0, 5)), ValueError,
     "cu_seqlens: expected as many queries as keys, got Tq=2, Tk=5"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(0, 5, dtype=torch.int64)), TypeError,
     "cu_seqlens: expected torch.int32, got torch.int64"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(0)), ValueError,
     "cu_seqlens: expected [N+1] with N >= 1, got [1]"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(0, 4)), ValueError,
     "cu_seqlens: expected non-decreasing offsets from 0 to T=5, got [0, 4]"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(0, 3, 2, 5)), ValueError,
     "cu_seqlens: expected non-decreasing offsets from 0 to T=5, got [0, 3, 2, 5]"),
    (lambda: kernels.attention(ONE, ONE, ONE, cu_seqlens=ints(0, 5).to("meta")), ValueError,
     "cu_seqlens: expected device cpu, got meta"),
    (lambda: kernels.attention(Q, K, K, scale=0.0), ValueError,
     "scale: expected a finite number > 0, at most 2**127, got 0.0"),
    (lambda: kernels.attention(Q.double(), K.double(), K.double(), impl="triton"), TypeError,
     "q: expected one of (torch.float16, torch.bfloat16, torch.float32) for Triton, got "
     "torch.float64"),
    (lambda: kernels.attention(z(1, 5, 1, 257), z(1, 5, 1, 257), z(1, 5, 1, 8), impl="triton"),
     ValueError, "q: expected a width of 1 to 256 for Triton, got 257"),
    (lambda: kernels.attention(Q, K, z(2, 5, 64, 3).mT, impl="triton"), ValueError,
     "v: expected a last stride of 1 for Triton, got strides (960, 192, 1, 3)"),
    (lambda: kernels.attention(Q.to("meta"), K.to("meta"), K.to("meta"), impl="triton"), ValueError,
     "impl: expected CUDA tensors for 'triton'"),
    (lambda: kernels.attention(Q, K, K, impl="cuda"), ValueError,
     "impl: expected one of ('auto', 'eager', 'sdpa', 'triton'), got 'cuda'"),
    (lambda: kernels.latent_attention(ONE, None, ONE, z(1, 5, 8), ONE), ValueError,
     "q_rope: expected a tensor beside k_rope, got None"),
    (lambda: kernels.latent_attention(ONE, z(1, 5, 3, 8), ONE, None, ONE), ValueError,
     "k_rope: expected a tensor beside q_rope, got None"),
    (lambda: kernels.latent_attention(ONE, z(1, 5, 3, 8), ONE, z(1, 5, 3, 8), ONE), ValueError,
     "k_rope: expected [B=1, T=5, D_ROPE=8], got [1, 5, 3, 8]"),
    (lambda: kernels.gene_fitness(G, None, window_size=3), ValueError,
     "e: expected a tensor [B, T, H, D] for environment='query', got None"),
    (lambda: kernels.gene_fitness(G, G, window_size=3, environment="kin"), ValueError,
     "e: expected None for environment='kin', got a tensor [1, 5, 4, 6]"),
    (lambda: kernels.gene_fitness(G, window_size=3, environment="kith"), ValueError,
     "environment: expected one of ('query', 'kin', 'none'), got 'kith'"),
    (lambda: kernels.gene_fitness(G, G, window_size=None), ValueError,
     "window_size: expected an integer >= 1 (the population), got None"),
    (lambda: kernels.genetic_attention(G, G, z(1, 5, 3, 6), PRESSURE, window_size=2), ValueError,
     "heads: expected H a multiple of HV, got H=4, HV=3"),
    (lambda: kernels.genetic_attention(G, G, G, z(3), window_size=2), ValueError,
     "selection_pressure: expected [H=4], got [3]"),
    (lambda: kernels.genetic_attention(G, G, G, PRESSURE, window_size=2, rope=(z(5, 6), z(5, 6))),
     ValueError, "rope cos: expected [T=5, D/2=3], got [5, 6]"),
    (lambda: kernels.genetic_attention(
        G[..., :5], G[..., :5], G, PRESSURE, window_size=2, rope=ROPE), ValueError,
     "rope: expected an even width D to rotate, got D=5"),
    (lambda: kernels.genetic_attention(G, G, G, PRESSURE, window_size=2, rope=ROPE + ROPE),
     ValueError, "rope: expected a pair (cos, sin), got 4 tables"),
    (lambda: kernels.genetic_attention(
        G, G, G, PRESSURE, window_size=2, rope=(ROPE[0].int(), ROPE[1])), TypeError,
     "rope cos: expected a floating type"),
    (lambda: genetic_decode(None), ValueError,
     "e: expected a tensor [B, T, H, D] for environment='query', got None"),
    (lambda: genetic_decode(pressure=z(3)), ValueError, "selection_pressure: expected [H=4], got"),
    (lambda: genetic_decode(ring=z(1, 7, 2, 6)), ValueError,
     "g_cache: expected [B=1, S, H=4, D=6], got [1, 7, 2, 6]"),
    (lambda: genetic_decode(v=z(1, 5, 2, 3)), ValueError,
     "v_cache: expected [B=1, S=7, HV, D_V], got [1, 5, 2, 3]"),
    (lambda: genetic_decode(v=z(1, 7, 3, 3)), ValueError,
     "heads: expected H a multiple of HV, got H=4, HV=3"),
    (lambda: genetic_decode(ring=z(1, 7, 4, 6).half()), TypeError,
     "g_cache: expected g's type torch.float32, got torch.float16"),
    (lambda: genetic_decode(rope=ROPE), ValueError,
     "rope cos: expected [B=1, Tq=5, D/2=3], got [5, 3]"),
    (lambda: genetic_decode(window_size=None), ValueError,
     "window_size: expected an integer >= 1 (the population), got None"),
    (lambda: genetic_decode(v=z(1, 7, 3, 4).mT, impl="triton"), ValueError,
     "v_cache: expected a last stride of 1 for Triton, got strides (84, 12, 1, 4)"),
    (lambda: kernels.attention_decode(z(2, 9, 64), K, K, ints(3)), ValueError,
     "cache_lengths: expected [B=2], got [1]"),
    (lambda: kernels.attention_decode(z(2, 9, 64), K, K, ints(-1, 6)), ValueError,
     "cache_lengths: expected values >= 0, and 0 without rows, got -1 to 6 with S=5"),
    (lambda: kernels.attention_decode(z(2, 9, 64), K[:, :0], K[:, :0], ints(0, 1)), ValueError,
     "cache_lengths: expected values >= 0, and 0 without rows, got 0 to 1 with S=0"),
    (lambda: kernels.attention_decode(z(2, 9, 64), K, K, ints(3, 4, dtype=torch.int64)), TypeError,
     "cache_lengths: expected torch.int32, got torch.int64"),
    (lambda: kernels.attention_decode(z(9, 64), K, K, ints(3, 4)), ValueError,
     "q: expected [B, Tq, HQ, D_QK], got [9, 64]"),
    (lambda: kernels.attention_decode(z(2, 4, 9, 63), K, K, ints(3, 4)), ValueError,
     "k_cache: expected [B=2, S, HK, D_QK=63], got [2, 5, 3, 64]"),
    (lambda: kernels.attention_decode(z(2, 4, 9, 64), K, K[:, :4], ints(3, 4)), ValueError,
     "v_cache: expected [B=2, S=5, HV, D_V], got [2, 4, 3, 64]"),
    (lambda: kernels.attention_decode(z(2, 3, 8, 64), K, K, ints(3, 4)), ValueError,
     "heads: expected HQ a multiple of HK, got HQ=8, HK=3"),
    (lambda: kernels.attention_decode(z(2, 4, 9, 64), K, K, ints(3, 4), sinks=z(4)), ValueError,
     "sinks: expected [HQ=9], got [4]"),
    (lambda: kernels.attention_decode(z(2, 9, 64), K, K.half(), ints(3, 4)), TypeError,
     "v_cache: expected q's type torch.float32, got torch.float16"),
    (lambda: kernels.attention_decode(z(2, 9, 64), K, z(2, 5, 64, 3).mT, ints(3, 4), impl="triton"),
     ValueError, "v_cache: expected a last stride of 1 for Triton, got strides (960, 192, 1, 3)"),
    (lambda: kernels.latent_decode(
        z(2, 9, 8), z(2, 9, 4), z(2, 5, 8), z(2, 5, 3), ints(1, 1), scale=1.0), ValueError,
     "rope_cache: expected [B=2, S=5, D_ROPE=4], got [2, 5, 3]"),
    (lambda: kernels.latent_decode(
        z(2, 9, 8), None, z(2, 5, 8), z(2, 5, 3), ints(1, 1), scale=1.0), ValueError,
     "q_rope: expected a tensor beside rope_cache, got None"),
    (lambda: latent_decode(z(2, 4, 9, 8), z(2, 3, 9, 4)), ValueError,
     "q_rope: expected [B=2, Tq=4, H=9, D_ROPE], got [2, 3, 9, 4]"),
    (lambda: latent_decode(z(2, 4, 9, 8), z(2, 9, 4)), ValueError,
     "q_rope: expected [B=2, Tq=4, H=9, D_ROPE], got [2, 9, 4]"),
    (lambda: latent_decode(z(2, 9, 8), z(2, 1, 9, 4)), ValueError,
     "q_rope: expected [B=2, H=9, D_ROPE], got [2, 1, 9, 4]"),
    (lambda: latent_decode(z(9, 8), z(9, 4)), ValueError,
     "q_latent: expected [B, Tq, H, D_LATENT], got [9, 8]"),
    (lambda: latent_decode(z(2, 9, 8), z(2, 9, 4), z(2, 5, 9, 8)), ValueError,
     "latent_cache: expected [B=2, S, D_LATENT=8], got [2, 5, 9, 8]"),
    (lambda: latent_decode(z(2, 9, 513), z(2, 9, 4), z(2, 5, 513), impl="triton"), ValueError,
     "q_latent: expected a width of 1 to 512 for Triton, got 513"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSALS, ids=[r[2][:50] for r in REFUSALS])
def test_refusal(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_a_window_may_be_numpys():
    import numpy

    expected = kernels.attention(ONE, ONE, ONE + 1, window_size=2)
    for impl in ("eager", "triton"):
        o = kernels.attention(ONE, ONE, ONE + 1, window_size=numpy.int64(2), impl=impl)
        torch.testing.assert_close(o, expected)


def test_triton_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"impl: expected CUDA tensors .*, got tensors on cpu"):
        kernels.attention(Q, K, K, impl="triton")


def test_a_length_of_zero_gives_zero():
    o = kernels.attention_decode(torch.randn(2, 9, 64), K, K + 1, ints(0, 2))
    assert o[0].eq(0).all() and o[1].ne(0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_valid_call_is_served(data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, t_q, t_k, value_heads = number(1, 2), number(1, 9), number(1, 9), number(1, 2)
    key_heads = value_heads * number(1, 2)
    heads, width, v_width = key_heads * number(1, 3), number(1, 7), number(1, 7)
    causal = data.draw(st.booleans())
    window_size = data.draw(st.none() | st.integers(1, 12)) if causal else None
    sinks = torch.randn(heads) if data.draw(st.booleans()) else None
    o, lse = kernels.attention(
        torch.randn(batch, t_q, heads, width),
        torch.randn(batch, t_k, key_heads, width),
        torch.randn(batch, t_k, value_heads, v_width),
        causal=causal,
        window_size=window_size,
        sinks=sinks,
        return_lse=True,
    )
    assert o.shape == (batch, t_q, heads, v_width) and lse.shape == (batch, t_q, heads)
    assert o.isfinite().all() and not lse.isnan().any()


def test_what_passed_once_hides_nothing_that_must_be_refused():
    q = torch.randn(1, 4, 2, 8)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    lengths = torch.tensor([4], dtype=torch.int32)
    for _ in range(2):  # all of it is remembered the second time
        kernels.attention(q, q, q, window_size=1, cu_seqlens=offsets, scale=1.0)
        kernels.attention_decode(q, q, q, lengths)
        with pytest.raises(TypeError, match="window_size"):
            kernels.attention(q, q, q, window_size=True, cu_seqlens=offsets, scale=1.0)
        with pytest.raises(TypeError, match="scale"):
            kernels.attention(q, q, q, window_size=1, cu_seqlens=offsets, scale=True)
        with pytest.raises(TypeError, match="causal"):
            kernels.attention(q, q, q, causal=1, scale=1.0)
        with pytest.raises(ValueError, match="cu_seqlens"):
            kernels.attention(q, q, q, window_size=1, cu_seqlens=offsets + 1, scale=1.0)
        with pytest.raises(TypeError, match="cu_seqlens"):
            kernels.attention(q, q, q, window_size=1, cu_seqlens=offsets.long(), scale=1.0)
        with pytest.raises(TypeError, match="k:"):
            kernels.attention(q, q.double(), q, window_size=1, cu_seqlens=offsets, scale=1.0)
        with pytest.raises(ValueError, match="k:"):
            kernels.attention(q, q[..., :4], q, window_size=1, cu_seqlens=offsets, scale=1.0)
        with pytest.raises(ValueError, match="cache_lengths"):
            kernels.attention_decode(q, q, q, -lengths)
        with pytest.raises(TypeError, match="window_size"):
            kernels.attention(q, q, q, window_size=[1], cu_seqlens=offsets, scale=1.0)


def test_signatures_that_passed_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(tensors, "_MOST_SIGNATURES", 2)
    calls = []
    check = tensors.once_per_signature(lambda *numbers: calls.append(numbers))
    for number in (1, 2, 1, 3, 1, True, 1.0):
        check(number)
    assert calls == [(1,), (2,), (3,), (1,), (True,), (1.0,)]
