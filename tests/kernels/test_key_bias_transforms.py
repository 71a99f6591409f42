"""A bias of keys under torch.func, torch.compile and the checks of PyTorch."""

import dataclasses

import pytest
import torch
from cases import AttentionCase, DecodeCase
from test_attention import (  # noqa: F401 (an autouse fixture)
    DEVICE,
    EACH_FUSED,
    EACH_IMPL,
    _outputs_start_as_nan,
    random,
)
from test_key_bias import SMALL, assert_all_close, attend, biased, decode
from test_key_bias_decode import DECODE_CASES
from torch.func import grad, vmap

import kernels
from kernels.core.problem import Problem


@EACH_IMPL
@pytest.mark.parametrize(("packed", "shared"), [
    (False, ()), (False, ("key_bias",)), (True, ("q", "k", "v"))
], ids=["all", "one-bias", "biases"])  # fmt: skip
def test_each_example_has_its_gradients(packed, shared, impl):
    case = AttentionCase("", batch=1 if packed else 2, q_tokens=20, **SMALL)
    if packed:
        case = dataclasses.replace(case, lengths=(7, 13))
    inputs = biased(case, torch.float64, batch=1)
    fixed = {name: x for name, x in inputs.items() if name in ("cu_seqlens", "sinks")}
    one = {name: x for name, x in inputs.items() if name not in fixed}
    axes = {name: None if name in shared else 0 for name in one}
    given = {n: x if n in shared else torch.stack((x, x.flip(1))) for n, x in one.items()}

    def loss(given, impl=impl):
        return sum(x.double().square().sum() for x in attend(case, impl)(**given, **fixed).values())

    each = [{n: x if n in shared else x[i] for n, x in given.items()} for i in range(2)]
    expected = [grad(lambda x: loss(x, "eager"))(x) for x in each]
    found = vmap(grad(loss), in_dims=(axes,))(given)
    stacked = {n: torch.stack([x[n] for x in expected]) for n in given}
    assert_all_close(found, stacked, atol=1e-4, rtol=1e-4)
    total = grad(lambda given: vmap(loss, in_dims=(axes,))(given).sum())(given)
    summed = {n: x.sum(0) if n in shared else x for n, x in stacked.items()}
    assert_all_close(total, summed, atol=1e-4, rtol=1e-4)


@EACH_IMPL
@pytest.mark.parametrize("case", [DECODE_CASES[1], DECODE_CASES[-1]], ids=lambda case: case.name)
def test_each_example_decodes_with_its_bias(case, impl):
    inputs = biased(case)
    biases = torch.stack([inputs["key_bias"], inputs["key_bias"].flip(1)])
    found = vmap(lambda bias: decode(case, inputs | {"key_bias": bias}, impl))(biases)
    expected = torch.stack([decode(case, inputs | {"key_bias": x}, impl) for x in biases])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@EACH_FUSED
def test_compiles_as_one_graph(impl):
    torch.compiler.reset()
    case = AttentionCase("", batch=2, q_tokens=20, window_size=7, **SMALL)

    def loss(q, k, v, bias):
        outputs = attend(case, impl)(q=q, k=k, v=v, key_bias=bias)
        return sum(x.double().square().sum() for x in outputs.values())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = biased(case, torch.float64, batch=1)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "key_bias")]
    found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@EACH_FUSED
def test_decoding_compiles_as_one_graph(impl):
    torch.compiler.reset()
    case = DecodeCase("", (70, 3), 40, **SMALL)
    compiled = torch.compile(
        lambda inputs: decode(case, inputs, impl) * 2, fullgraph=True, backend="aot_eager"
    )
    inputs = biased(case, batch=1)
    torch.testing.assert_close(compiled(inputs), decode(case, inputs, impl) * 2)


@pytest.mark.slow
def test_opcheck():
    """Schemas and fakes; what is traced is compiled above."""
    q, k, v = random(2, 20, 6, 16), random(2, 20, 2, 16), random(2, 20, 2, 24)
    bias = random(2, 20, 6).double()
    problem = Problem(q, k, v, sinks=random(6), key_bias=bias, scale=0.25, window_size=5)
    ops, tests = torch.ops.smollm_attention, ("test_schema", "test_faketensor")
    o, lse, rest = ops.forward(*problem, True)
    gradients = torch.randn_like(o), torch.randn_like(lse)
    lengths = torch.tensor([25, 7], dtype=torch.int32, device=DEVICE)
    decoded = (q[:, :3], k, v, None, None, lengths, None, bias, 9, 0.25)
    calls = [
        (ops.forward, (*problem, True)),
        (ops.backward, (*problem, o, lse, rest, *gradients, True)),
        (ops.decode, decoded),
        (ops.sdpa_decode, decoded),
    ]
    for op, arguments in calls[: 4 if DEVICE == "cpu" else 3]:
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_gradcheck_of_the_oracle():
    leaves = [random(1, t, h, 3).double().requires_grad_() for t, h in ((4, 2), (6, 2), (6, 1))]
    bias, sinks = (random(*shape).double().requires_grad_() for shape in ((1, 6, 2), (2,)))

    def op(q, k, v, bias, sinks):
        return kernels.attention(
            q, k, v, key_bias=bias, sinks=sinks, window_size=3, return_lse=True, impl="eager"
        )

    assert torch.autograd.gradcheck(op, (*leaves, bias, sinks))
