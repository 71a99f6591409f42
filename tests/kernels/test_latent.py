"""MLA as trained against its oracle: on a GPU, or under Triton's interpreter without one."""

import dataclasses

import pytest
import torch
from cases import LATENT_CASES, LatentCase
from numerics import assert_parity
from test_attention import DEVICE, EACH_FUSED, _outputs_start_as_nan, random  # noqa: F401 (autouse)
from torch.autograd.graph import saved_tensors_hooks

import kernels

BY_NAME = {case.name: case for case in LATENT_CASES}
ALL_CASES = pytest.mark.parametrize("case", LATENT_CASES, ids=lambda case: case.name)


def cases(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda case: case.name)


def attend(case, impl="triton"):
    """The case as a function of its tensors that returns its output by name."""

    def run(**inputs):
        return {"o": kernels.latent_attention(**inputs, **case.arguments, impl=impl)}

    return run


def assert_case_parity(case, dtype, impl="triton"):
    assert_parity(attend(case, impl), attend(case, "eager"), case.inputs(dtype, DEVICE))


@EACH_FUSED
@ALL_CASES
def test_parity(case, impl):
    assert_case_parity(case, torch.float32, impl)


@EACH_FUSED
@cases("rope-free", "widths-40-8-24", "tokens-65", "packed-window", "strided", "scale", "sharp")
def test_parity_in_bfloat16(case, impl):
    assert_case_parity(case, torch.bfloat16, impl)


@EACH_FUSED
@cases("window-in-block", "sharp")
def test_parity_in_float16(case, impl):
    assert_case_parity(case, torch.float16, impl)


@EACH_FUSED
@cases("tokens-1", "tokens-129", "window-1", "window-in-block", "packed-window", "bidirectional")
def test_identity_values_show_exactly_the_mask(case, impl):
    """Where v is the identity the output is the attention matrix; so is dv where do is."""
    case = dataclasses.replace(case, heads=1, nope=16, rope=8)
    identity = torch.eye(case.tokens, device=DEVICE)[None, :, None]
    inputs = case.inputs(torch.float32, DEVICE) | {"v": identity.clone().requires_grad_()}
    o, expected = attend(case, impl)(**inputs)["o"], attend(case, "eager")(**inputs)["o"]
    assert torch.equal(o != 0, expected != 0)
    (dv,) = torch.autograd.grad(o, inputs["v"], identity)
    assert torch.equal(dv[0, :, 0] != 0, (expected[0, :, 0] != 0).T)


@EACH_FUSED
@pytest.mark.parametrize("packed", [False, True], ids=["window", "packed"])
def test_poison_out_of_sight_changes_no_bit(packed, impl):
    tokens, window, row = 110, 30, 80
    q_nope, q_rope, k_nope, k_rope, v, do = (
        random(1, tokens, *rest) for rest in ((2, 16), (2, 8), (2, 16), (8,), (2, 16), (2, 16))
    )
    options = {"impl": impl, "window_size": window}
    first = row - window + 1
    if packed:
        first = 70
        options["cu_seqlens"] = torch.tensor([0, 70, 110], dtype=torch.int32, device=DEVICE)

    def of_row(*keys_and_values):
        q = [x.clone().requires_grad_() for x in (q_nope, q_rope)]
        k_nope, k_rope, v = kv = [x.clone().requires_grad_() for x in keys_and_values]
        o = kernels.latent_attention(q[0], q[1], k_nope, k_rope, v, **options)
        gradients = torch.autograd.grad(o[:, row], (*q, *kv), do[:, row])
        seen = (dx[:, first : row + 1] for dx in gradients[2:])
        return o[:, row], *(dx[:, row] for dx in gradients[:2]), *seen

    clean = of_row(k_nope, k_rope, v)
    poisoned = [x.clone() for x in (k_nope, k_rope, v)]
    for x in poisoned:
        x[:, :first] = x[:, row + 1 :] = 1e4
    for before, after in zip(clean, of_row(*poisoned), strict=True):
        assert torch.equal(before, after)


@EACH_FUSED
@cases("widths-16-64-16", "packed-window")
def test_gradients_are_the_same_bits_every_time(case, impl):
    inputs = case.inputs(torch.bfloat16, DEVICE)
    leaves = [
        x.requires_grad_() for x in inputs.values() if x is not None and x.dtype.is_floating_point
    ]
    do = torch.randn_like(inputs["v"])
    one, other = (
        torch.autograd.grad(attend(case, impl)(**inputs)["o"], leaves, do) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def measured(call):
    """What the call returns, the operators that it ran, and the bytes of each allocation."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        result = call()
    events = profiler.events()
    usage = "self_device_memory_usage" if DEVICE == "cuda" else "self_cpu_memory_usage"
    sizes = [getattr(event, usage) for event in events]
    return result, {event.name for event in events}, [size for size in sizes if size > 0]


def test_nothing_is_quadratic_and_nothing_is_copied():
    """The shared rope key, wider here than the values, meets no head by a copy of its own."""
    case = LatentCase(
        "", tokens=192, nope=32, rope=48, v_width=32, window_size=70, contiguous=False
    )
    inputs = {n: x for n, x in case.inputs(torch.float32, DEVICE).items() if x is not None}
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    kept = []

    def forward():
        with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            return attend(case)(**dict(zip(inputs, leaves, strict=True)))["o"]

    o, operators, allocated = measured(forward)
    lse_bytes = 2 * case.tokens * case.heads * 4  # fp32 inputs: with its rounding
    assert sorted(size for size in allocated if size) == [lse_bytes, o.nbytes]
    assert not operators & {
        f"aten::{n}" for n in ("cat", "clone", "contiguous", "expand", "repeat")
    }

    q_nope, q_rope, k_nope, k_rope, v = leaves
    expected = [q_nope, k_nope, v, q_rope, k_rope, o]
    assert [tuple(x.shape) for x in kept[:6]] == [tuple(x.shape) for x in expected]
    assert [x.data_ptr() for x in kept[:6]] == [x.data_ptr() for x in expected]
    assert [x.nbytes for x in kept[6:]] == [lse_bytes, 0]

    _, _, allocated = measured(lambda: torch.autograd.grad(o, leaves, torch.ones_like(o)))
    per_head_share = q_rope.nbytes  # of dk_rope, before the heads are summed
    assert max(allocated) <= per_head_share


@EACH_FUSED
def test_equals_attention_over_joined_widths(impl):
    case = LatentCase("", tokens=70, heads=3, nope=32, rope=16, v_width=24, window_size=40)
    inputs = case.inputs(torch.float32, DEVICE)
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
    q_nope, q_rope, k_nope, k_rope, v = leaves
    o = kernels.latent_attention(*leaves, window_size=40, impl=impl)
    shared = k_rope[:, :, None].expand_as(q_rope)
    joined = kernels.attention(
        torch.cat((q_nope, q_rope), -1),
        torch.cat((k_nope, shared), -1),
        v,
        window_size=40,
        impl=impl,
    )
    do = torch.randn_like(o)
    torch.testing.assert_close(o, joined, atol=1e-5, rtol=1e-5)
    gradients = zip(*(torch.autograd.grad(x, leaves, do) for x in (o, joined)), strict=True)
    for dx, expected in gradients:
        torch.testing.assert_close(dx, expected, atol=1e-5, rtol=1e-4)


@EACH_FUSED
def test_rope_alone_may_ask_for_gradients(impl):
    inputs = LatentCase("", tokens=20, nope=16, rope=8, v_width=16).inputs(torch.float32, DEVICE)
    k_rope = inputs["k_rope"].requires_grad_()
    ours, expected = (
        torch.autograd.grad(kernels.latent_attention(**inputs, impl=name).sum(), k_rope)[0]
        for name in (impl, "eager")
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@EACH_FUSED
@pytest.mark.parametrize("rope", [8, 0], ids=["rope", "rope-free"])
def test_compiles_as_one_graph(rope, impl):
    torch.compiler.reset()

    def loss(*tensors):
        q_nope, k_nope, v, *pair = tensors
        q_rope, k_rope = pair or (None, None)
        o = kernels.latent_attention(q_nope, q_rope, k_nope, k_rope, v, window_size=7, impl=impl)
        return o.square().sum()

    leaves = [random(1, 20, 2, 16, grad=True) for _ in range(3)]
    if rope:
        leaves += [random(1, 20, 2, rope, grad=True), random(1, 20, rope, grad=True)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


@EACH_FUSED
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (1, 0)], ids=["B", "T"])
def test_empty_tensors(batch, tokens, impl):
    inputs = LatentCase("", batch=batch, tokens=tokens).inputs(torch.float32, DEVICE)
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
    o = kernels.latent_attention(**inputs, impl=impl)
    assert o.shape == inputs["v"].shape
    for x, dx in zip(leaves, torch.autograd.grad(o.sum(), leaves), strict=True):
        assert dx.shape == x.shape
