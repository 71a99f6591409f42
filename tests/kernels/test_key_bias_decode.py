"""A bias of the rows of a cache, through each implementation alike."""

import pytest
import torch
from cases import DecodeCase
from numerics import assert_close_to_truth
from test_attention import (  # noqa: F401 (an autouse fixture)
    DEVICE,
    EACH_FUSED,
    EACH_IMPL,
    _outputs_start_as_nan,
    random,
)
from test_decode import rows_of_query
from test_key_bias import SMALL, biased, decode, exactly, gates

import kernels

DECODE_CASES = [
    DecodeCase("ragged", (0, 1, 20, 40), 40, **SMALL),
    DecodeCase("ring-window", (70, 64, 30), 50, window_size=20, **SMALL),
    DecodeCase("value-heads", (50, 70), 40, 3, q_heads=8, k_heads=4, v_heads=2, width=16),
    DecodeCase("tokens-before-the-first", (3, 0, 6), 20, 5, **SMALL),
    DecodeCase("splits", (700, 37), 520, window_size=500, sinks=True, **SMALL),
    DecodeCase("sinks-tokens", (70, 2), 40, 3, window_size=20, sinks=True, **SMALL),
    DecodeCase("latent", (70, 3), 40, q_heads=4, width=16, rope=8, latent=True),
    DecodeCase("latent-tokens", (70, 3), 40, 3, 4, width=16, window_size=9, latent=True),
]
EACH_DECODE = pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)


@EACH_FUSED
@EACH_DECODE
@pytest.mark.parametrize(("batch", "dtype"), [(None, torch.float32), (1, torch.float64)])
def test_decode_parity(case, batch, dtype, impl):
    inputs = biased(case, dtype, batch)
    exact = exactly(inputs)
    o, twin, truth = (
        decode(case, x, kind) for x, kind in ((inputs, impl), (inputs, "eager"), (exact, "eager"))
    )
    assert o.dtype == torch.float32
    assert_close_to_truth(o, twin, truth, "o")


@EACH_IMPL
@pytest.mark.parametrize("case", [x for x in DECODE_CASES if "value" not in x.name],
                         ids=lambda case: case.name)  # fmt: skip
def test_rows_that_no_query_sees_may_have_any_bias(case, impl):
    inputs = biased(case)
    clean = decode(case, inputs, impl)
    seen = torch.stack([rows_of_query(case, i) for i in range(case.q_tokens or 1)]).any(0)
    assert not seen.all()
    poisoned = inputs["key_bias"].masked_fill(~seen[..., None], torch.nan)
    assert torch.equal(decode(case, inputs | {"key_bias": poisoned}, impl), clean)


def in_a_ring(x, rows, length):
    """What a cache of so many rows holds of the first tokens of x [B, T, ...], nan elsewhere."""
    ring = torch.full_like(x[:, :1].expand(-1, rows, *x.shape[2:]), torch.nan)
    for position in range(length):
        ring[:, position % rows] = x[:, position]
    return ring


@EACH_IMPL
@pytest.mark.parametrize("latent", [False, True], ids=["attention", "latent"])
@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize(("q_tokens", "window_size", "rows"), [
    (1, None, 31), (3, None, 40), (1, 9, 9), (3, 9, 11), (4, 5, 20)
])  # fmt: skip
def test_decoding_is_the_last_rows_of_attention(q_tokens, window_size, rows, offset, latent, impl):
    """Of a whole cache, or of a ring that has just all that they see, which has turned around."""
    tokens, heads = 31, 4
    q, bias = random(2, tokens, heads, 16), gates(2, tokens, heads) + offset
    k, v = (random(2, tokens, 1 if latent else 2, 16) for _ in range(2))
    sinks = None if latent else random(heads) + offset
    v = k if latent else v
    arguments = {"window_size": window_size, "scale": 0.3}
    expected = kernels.attention(
        q.double(), k.double(), v.double(), key_bias=bias, sinks=sinks, **arguments, impl="eager"
    )[:, -q_tokens:].float()
    ring = {
        name: in_a_ring(x, rows, tokens) for name, x in (("k", k), ("v", v), ("key_bias", bias))
    }
    lengths = torch.full((2,), tokens, dtype=torch.int32, device=DEVICE)
    arguments |= {"key_bias": ring["key_bias"], "impl": impl}
    if latent:
        o = kernels.latent_decode(
            q[:, -q_tokens:, :, :], None, ring["k"][:, :, 0], None, lengths, **arguments
        )
    else:
        o = kernels.attention_decode(
            q[:, -q_tokens:], ring["k"], ring["v"], lengths, sinks=sinks, **arguments
        )
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)


@EACH_IMPL
def test_generating_token_by_token_is_attention(impl):
    tokens, rows, window = 7, 4, 3
    q, k, v = (random(2, tokens, heads, 16) for heads in (4, 2, 1))
    bias = gates(2, tokens, 4)
    expected = kernels.attention(q, k, v, window_size=window, key_bias=bias, impl="eager")
    for length in range(1, tokens + 1):
        k_ring, v_ring, bias_ring = (in_a_ring(x, rows, length) for x in (k, v, bias))
        lengths = torch.full((2,), length, dtype=torch.int32, device=DEVICE)
        for places in (length - 1, slice(max(0, length - 2), length)):
            o = kernels.attention_decode(
                q[:, places],
                k_ring,
                v_ring,
                lengths,
                window_size=window,
                key_bias=bias_ring,
                impl=impl,
            )
            torch.testing.assert_close(o, expected[:, places], atol=1e-5, rtol=1e-5)


@EACH_IMPL
@pytest.mark.parametrize("q_tokens", [None, 3])
def test_minus_infinity_hides_a_row_of_the_cache(q_tokens, impl):
    case = DecodeCase("", (70, 1, 30), 40, q_tokens, **SMALL)
    inputs = biased(case)
    hidden = torch.rand_like(inputs["key_bias"]) < 0.5
    hidden[1] = True
    hidden[2, 29] = True  # the newest one's own
    inputs["key_bias"] = inputs["key_bias"].masked_fill(hidden, -torch.inf)
    o = decode(case, inputs, impl)
    assert o[1].eq(0).all()
    truth = decode(case, exactly(inputs), "eager")
    assert_close_to_truth(o, decode(case, inputs, "eager"), truth, "o")
    inputs["v_cache"] = torch.eye(40, device=DEVICE)[None, :, None].expand(3, 40, 2, 40)
    weights = decode(case, inputs, impl).reshape(3, -1, 4, 40)
    for token in range(weights.shape[1]):
        seen = rows_of_query(case, token)[..., None] & ~hidden
        assert torch.equal(weights[:, token] != 0, seen.mT)


@EACH_IMPL
@pytest.mark.parametrize("shape", [((), 9, None), ((0,), 0, None), ((9,), 9, 0)],
                         ids=["B", "S", "Tq"])  # fmt: skip
def test_decoding_of_empty_tensors(shape, impl):
    case = DecodeCase("", *shape, **SMALL)
    for batch in (None, 1):
        inputs = biased(case, torch.float64, batch)
        o = decode(case, inputs, impl)
        assert o.shape == inputs["q"].shape and o.eq(0).all()


@EACH_FUSED
@pytest.mark.parametrize("latent", [False, True], ids=["attention", "latent"])
def test_decoding_has_no_gradient_of_a_bias(latent, impl):
    case = DecodeCase("", width=16, latent=latent)
    inputs = biased(case)
    inputs["key_bias"].requires_grad_()
    with pytest.raises(NotImplementedError, match="decoding: expected no backward"):
        decode(case, inputs, impl).sum().backward()
