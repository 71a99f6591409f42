"""Ops under `torch.func`: what every example has for itself, and what is refused."""

import pytest
import torch
from test_attention import DEVICE, EACH_FUSED, EACH_IMPL, FUSED, _outputs_start_as_nan  # noqa: F401
from test_every_op import OPS, leaves_of
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import kernels

EXAMPLES = 2
SHARED = ("sinks", "selection_pressure", "k", "k_nope", "e")  # by all examples that fold
DIFFERENTIABLE = {name: op for name, op in OPS.items() if op.differentiable}
DECODING = {name: op for name, op in OPS.items() if not op.differentiable}
EACH_DIFFERENTIABLE = pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
EACH_DECODING = pytest.mark.parametrize("op", DECODING.values(), ids=DECODING)
IN_FORWARD_MODE = r"^impl: expected 'eager' in forward mode .*, got 'sdpa' or 'triton'$"


def several(given, shared):
    """The tensors, those that are not shared with an axis of examples; and where that axis is."""
    axes = {name: None if name in shared else 0 for name in given}
    scales = torch.linspace(0.5, 1.0, EXAMPLES, device=DEVICE)
    mapped = {name: torch.stack([scale * x for scale in scales]) for name, x in given.items()}
    return {name: x if name in shared else mapped[name] for name, x in given.items()}, axes


def each(given, axes):
    """The tensors of each example."""
    for i in range(EXAMPLES):
        yield {name: x if axes[name] is None else x[i] for name, x in given.items()}


def assert_all_close(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], atol=1e-4, rtol=1e-4)


@EACH_IMPL
@EACH_DIFFERENTIABLE
@pytest.mark.parametrize("folds", [True, False], ids=["folded", "alone"])
def test_gradients_of_each_example_and_of_all(op, impl, folds):
    """As a gradient of each, and as one of their sum."""
    fixed = op.inputs()
    if folds:
        fixed.pop("cu_seqlens", None)
    wanted = {name: fixed[name] for name, x in leaves_of(fixed).items() if x.requires_grad}
    given, axes = several(wanted, SHARED if folds else ())

    def loss(given, impl=impl):
        return sum(x.square().sum() for x in op(impl, fixed | given))

    alone = []
    for one in each(given, axes):
        leaves = leaves_of(one)
        found = torch.autograd.grad(loss(leaves, "eager"), list(leaves.values()))
        alone.append(dict(zip(leaves, found, strict=True)))
    expected = {name: torch.stack([x[name] for x in alone]) for name in given}
    assert_all_close(vmap(grad(loss), in_dims=(axes,))(given), expected)
    expected = {name: x.sum(0) if axes[name] is None else x for name, x in expected.items()}
    assert_all_close(grad(lambda given: vmap(loss, in_dims=(axes,))(given).sum())(given), expected)


@EACH_FUSED
@pytest.mark.parametrize("op", ["attention-batch", "genetic"])
def test_a_jacobian_is_that_of_eager(op, impl):
    """Of which only the gradients of outputs are several."""
    op, inputs = OPS[op], OPS[op].inputs()
    name = next(iter(inputs))

    def rows(x, impl):
        return op(impl, inputs | {name: x})[0][0, 3::9, 0, 0]

    found, expected = (jacrev(rows)(inputs[name], kind) for kind in (impl, "eager"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@EACH_IMPL
@EACH_DECODING
def test_each_example_decodes_for_itself(op, impl):
    fixed = op.inputs()
    floating = {name: x for name, x in fixed.items() if x.is_floating_point()}
    given, axes = several(floating, ("sinks", "cos", "sin"))

    def decode(given):
        return op(impl, fixed | given)[0]

    expected = torch.stack([decode(one) for one in each(given, axes)])
    found = vmap(decode, in_dims=(axes,))(given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@EACH_FUSED
@EACH_DECODING
def test_decoding_has_a_gradient_in_eager_alone(op, impl):
    fixed = op.inputs()
    name = next(iter(fixed))

    def loss(x, impl):
        return op(impl, fixed | {name: x})[0].square().sum()

    with pytest.raises(NotImplementedError, match="decoding: expected no backward"):
        grad(loss)(fixed[name], impl)
    x = fixed[name].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, "eager"), x)
    if DEVICE == "cpu":
        torch.testing.assert_close(grad(loss)(fixed[name], "auto"), expected)


def test_every_example_may_have_an_axis_of_examples():
    """And one may lie anywhere."""
    q = torch.randn(3, 1, 2, 5, 2, 8, device=DEVICE)  # [outer, B, inner, T, H, D]
    impl = "sdpa" if DEVICE == "cpu" else "triton"

    def one(q):
        return kernels.attention(q, q, q, window_size=3, impl=impl)

    found = vmap(vmap(one, in_dims=1, out_dims=1))(q)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(found[i, :, j], one(q[i, :, j]))
    total = grad(lambda q: vmap(vmap(one, in_dims=1))(q).square().sum())(q)
    x = q.clone().requires_grad_()
    folded = one(x.transpose(1, 2).flatten(0, 2))
    (expected,) = torch.autograd.grad(folded.square().sum(), x)
    torch.testing.assert_close(total, expected)


@EACH_FUSED
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_forward_mode_is_refused_but_by_eager(op, impl):
    inputs = op.inputs()
    name = next(iter(inputs))
    x, tangent = inputs[name], torch.randn_like(inputs[name])

    def first(x, impl="eager"):
        return op(impl, inputs | {name: x})[0]

    with pytest.raises(NotImplementedError, match=IN_FORWARD_MODE):
        jvp(lambda x: first(x, impl), (x,), (tangent,))
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=IN_FORWARD_MODE),
    ):
        first(forward_ad.make_dual(x, tangent), impl)
    jacobian = jvp(first, (x,), (tangent,))[1]
    step = 1e-2 * tangent
    torch.testing.assert_close(
        jacobian, (first(x + step) - first(x - step)) / 2e-2, atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize(("op", "impl"), [
    (op, impl) for impl in FUSED for name, op in DIFFERENTIABLE.items()
    if (name, impl) != ("fitness", "sdpa")  # which is PyTorch's own and running sums
])  # fmt: skip
def test_the_gradient_of_a_gradient_is_refused_but_by_eager(op, impl):
    inputs = leaves_of(op.inputs())
    leaves = [x for x in inputs.values() if x.requires_grad]
    for kind in ("eager", impl):
        out = op(kind, inputs)[0].square().sum()
        total = sum(x.square().sum() for x in torch.autograd.grad(out, leaves, create_graph=True))
        if kind == "eager":
            assert all(x.isfinite().all() for x in torch.autograd.grad(total, leaves))
            continue
        with pytest.raises(NotImplementedError, match=r"'eager' for the gradient of a gradient"):
            total.backward()
