"""The one tolerance: errors against fp64 truth, measured by those of an eager twin.

Truth is the oracle in fp64 on the already rounded inputs, the twin the oracle in the test's type.
The element clause lets no single value stray, the RMS clause no small error sit everywhere; each
alone misses planted faults that the pair catches.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


def assert_close_to_truth(actual: Tensor, twin: Tensor, truth: Tensor, name: str) -> None:
    """|err| <= 2 max|twin err| + eps |truth| + 1e-5 and rms(err) <= 1.5 rms(twin err) + 1e-6."""
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    infinite = torch.isinf(truth)
    same = torch.equal(actual.double()[infinite], truth[infinite])
    assert same, f"{name}: infinities differ from the truth's"
    actual, twin, truth = (x.detach()[~infinite] for x in (actual, twin, truth))
    if truth.numel() == 0:
        return
    error, twin_error = (actual.double() - truth).abs(), (twin.double() - truth).abs()
    bound = 2 * twin_error.max() + torch.finfo(actual.dtype).eps * truth.abs() + 1e-5
    excess = error - bound
    worst = int(torch.where(error.isnan(), torch.inf, excess).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: element {worst} is {actual.flatten()[worst]}, truth {truth.flatten()[worst]}, "
        f"error {error.flatten()[worst]:.3g} over its bound {bound.flatten()[worst]:.3g}"
    )
    rms, twin_rms = error.square().mean().sqrt(), twin_error.square().mean().sqrt()
    assert rms <= 1.5 * twin_rms + 1e-6, f"{name}: rms error {rms:.3g}, the twin's {twin_rms:.3g}"


def outputs_and_gradients(
    op: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor | None],
    upstream: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Outputs:
    """An op's outputs by name, and the gradient of each floating input as d<name>.

    Args:
        op: called with the inputs by name; returns outputs by name.
        inputs: tensors, or None where one is absent.
        upstream: the gradient of each output, by its name.
        dtype: cast floating inputs to it first.
    """
    leaves = {}
    for name, x in inputs.items():
        if x is not None and x.is_floating_point():
            x = x.detach().to(dtype or x.dtype).requires_grad_()
        leaves[name] = x
    outputs = op(**leaves)
    loss = sum(
        (torch.where(torch.isinf(out), 0.0, out) * upstream[name].to(out.dtype)).double().sum()
        for name, out in outputs.items()
    )
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        f"d{name}": x.grad for name, x in leaves.items() if x is not None and x.requires_grad
    }
    return {**outputs, **{k: g for k, g in gradients.items() if g is not None}}


def assert_parity(
    op: Callable[..., Mapping[str, Tensor]],
    oracle: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor | None],
) -> None:
    """Hold every output and gradient of op to the tolerance, with fresh upstream gradients."""
    actual, twin, truth = three_ways(op, oracle, inputs)
    assert actual.keys() == truth.keys()
    for name in truth:
        assert_close_to_truth(actual[name], twin[name], truth[name], name)


def three_ways(
    op: Callable[..., Mapping[str, Tensor]],
    oracle: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor | None],
) -> tuple[Outputs, Outputs, Outputs]:
    """Outputs and gradients of op, of the twin and in truth."""
    with torch.no_grad():
        shapes = oracle(**inputs)
    upstream = {n: torch.randn_like(x, device="cpu").to(x.device) for n, x in shapes.items()}
    actual = outputs_and_gradients(op, inputs, upstream)
    twin = outputs_and_gradients(oracle, inputs, upstream)
    truth = outputs_and_gradients(oracle, inputs, upstream, torch.float64)
    return actual, twin, truth
