"""What every op keeps, forward and backward, through each implementation alike."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import AttentionCase, DecodeCase, GeneticCase, GeneticDecodeCase, LatentCase
from test_attention import DEVICE, EACH_IMPL, FUSED, _outputs_start_as_nan  # noqa: F401 (autouse)
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import kernels

TOKENS = 20
SMALL = ("sinks", "cu_seqlens", "cache_lengths", "selection_pressure", "cos", "sin")
PACKED = {"window_size": 9, "lengths": (7, 13)}


@dataclass
class Op:
    """An op, its case, and whether more than the oracle has its backward."""

    call: object
    case: object
    differentiable: bool = True

    def inputs(self):
        given = self.case.inputs(torch.float32, DEVICE)
        if isinstance(self.case, GeneticDecodeCase):
            given |= dict(zip(("cos", "sin"), self.case.tables(DEVICE), strict=True))
        elif isinstance(self.case, GeneticCase) and self.call is genetic_attention:
            given |= dict(zip(("cos", "sin"), self.case.rope(DEVICE), strict=True))
        elif isinstance(self.case, GeneticCase):
            del given["v"], given["selection_pressure"]
        return {name: x for name, x in given.items() if x is not None}

    def __call__(self, impl, inputs):
        out = self.call(**inputs, **self.case.arguments, impl=impl)
        return out if isinstance(out, tuple) else (out,)


def genetic_attention(cos, sin, **arguments):
    return kernels.genetic_attention(**arguments, rope=(cos, sin))


def genetic_decode(cos, sin, **arguments):
    return kernels.genetic_decode(e=None, **arguments, rope=(cos, sin))


OPS = {
    "attention": Op(
        partial(kernels.attention, return_lse=True),
        AttentionCase("", q_tokens=TOKENS, q_heads=4, k_heads=2, width=16, sinks=True, **PACKED),
    ),
    "attention-batch": Op(
        partial(kernels.attention, return_lse=True),
        AttentionCase("", batch=3, q_tokens=TOKENS, k_tokens=30, width=16, sinks=True, bias=0.0),
    ),
    "latent": Op(kernels.latent_attention, LatentCase("", tokens=TOKENS, nope=16, **PACKED)),
    "decode": Op(
        kernels.attention_decode,
        DecodeCase("", (30, 30, 30), q_heads=4, k_heads=2, width=16, sinks=True, window_size=20),
        False,
    ),
    "decode-tokens": Op(
        kernels.attention_decode,
        DecodeCase("", (70, 70, 70), 40, 3, q_heads=4, k_heads=2, width=16, sinks=True, bias=0.0),
        False,
    ),
    "latent-decode": Op(
        kernels.latent_decode,
        DecodeCase("", (30, 30, 30), width=16, rope=8, latent=True, bias=0.0),
        False,
    ),
    "fitness": Op(kernels.gene_fitness, GeneticCase("", tokens=TOKENS, width=16, **PACKED)),
    "genetic": Op(
        genetic_attention,
        GeneticCase("", tokens=TOKENS, heads=2, v_heads=1, width=16, **PACKED),
    ),
    "genetic-decode": Op(
        genetic_decode,
        GeneticDecodeCase("", (70,) * 3, 40, 3, 2, width=16, window_size=9, environment="kin"),
        False,
    ),
}
EACH_OP = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def leaves_of(inputs):
    """The inputs, in the strides that they have, the floating ones asking for their gradients."""
    return {
        name: x.detach().requires_grad_(x.is_floating_point() and name not in ("cos", "sin"))
        for name, x in inputs.items()
    }


def results(op, impl, inputs, upstream=None):
    """Outputs, and where there is a backward gradients, under an upstream gradient of each."""
    inputs = leaves_of(inputs)
    outputs = op(impl, inputs)
    if impl != "eager" and not op.differentiable:
        return outputs
    leaves = [x for x in inputs.values() if x.requires_grad]
    if upstream is None:
        upstream = [torch.ones_like(out).cumsum(1) for out in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, upstream)


def assert_same(actual, expected, impl):
    for x, y in zip(actual, expected, strict=True):
        if impl == "triton":
            assert torch.equal(x, y)
        else:  # whose products may take another order
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def gapped(x, last):
    """x with gaps between its numbers, or with last between its rows alone."""
    memory = torch.full((*x.shape, 3) if last else (*x.shape[:-1], x.shape[-1] + 3), 77).to(x)
    view = memory[..., 1] if last else memory[..., 1:-2]
    return view.copy_(x)


def heads_first(name, x):
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x


def expanded(dim):
    """A view that has one slice along a dimension for all."""
    return lambda name, x: x if name == "cu_seqlens" else x.narrow(dim, 0, 1).expand_as(x)


def overlapping(name, x):
    """Batches, or rows, that share most of their memory."""
    strides = (x.stride(1), *x.stride()[1:]) if x.dim() > 2 else x.stride()
    return x.as_strided(x.shape, strides)


VIEWS = {
    "gapped": lambda name, x: gapped(x, name in SMALL),
    "heads-first": heads_first,
    "one-batch": expanded(0),
    "one-token": lambda name, x: expanded(1)(name, x) if x.dim() > 2 else x,
    "overlapping": overlapping,
}


@EACH_IMPL
@EACH_OP
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_counts_as_its_copy(view, op, impl):
    views = {name: view(name, x) for name, x in op.inputs().items()}
    copies = {name: x.contiguous() for name, x in views.items()}
    assert_same(results(op, impl, views), results(op, impl, copies), impl)


class ComparedWithFakes(TorchDispatchMode):
    """Each of our operators' results has the shape, type and strides that its fake says."""

    def __init__(self):
        super().__init__()
        self.met = 0

    def __torch_dispatch__(self, overload, types, arguments=(), kwargs=None):
        real = overload(*arguments, **(kwargs or {}))
        if overload.namespace == "smollm_attention":
            self.met += 1
            with FakeTensorMode() as mode:
                fake = overload(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
            for x, y in zip(tree_leaves(real), tree_leaves(fake), strict=True):
                assert (x.shape, x.dtype) == (y.shape, y.dtype), overload
                known = [n for n, size in enumerate(x.shape) if size > 1] if x.numel() else []
                assert [x.stride(n) for n in known] == [y.stride(n) for n in known], overload
        return real


@pytest.mark.parametrize("impl", FUSED)
@EACH_OP
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_results_lie_as_compilers_are_told(view, op, impl):
    """Whose views of them fail, or read elsewhere, where they do not."""
    views = {name: view(name, x) for name, x in op.inputs().items()}
    with ComparedWithFakes() as compared:
        results(op, impl, views)
    assert compared.met or (impl == "sdpa" and not op.differentiable)  # a decode on a CPU has none


def upstreams(outputs):
    """Gradients of unusual strides and types, one for each output."""
    yield [torch.randn_like(out[:, :1]).expand_as(out) for out in outputs]
    yield [torch.randn_like(out.mT, dtype=torch.float64).mT for out in outputs]
    yield [gapped(torch.randn_like(out), last=True) for out in outputs]


BACKWARDS = {
    f"{impl}-{name}": (op, impl)
    for name, op in OPS.items()
    for impl in (*FUSED, "eager")
    if impl == "eager" or op.differentiable
}


@pytest.mark.parametrize(("op", "impl"), BACKWARDS.values(), ids=BACKWARDS)
def test_an_upstream_gradient_counts_as_its_copy(op, impl):
    inputs = leaves_of(op.inputs())
    leaves = [x for x in inputs.values() if x.requires_grad]
    outputs = op(impl, inputs)
    for upstream in upstreams(outputs):
        plain = [dx.float().contiguous() for dx in upstream]
        actual, expected = (
            torch.autograd.grad(outputs, leaves, dx, retain_graph=True) for dx in (upstream, plain)
        )
        assert_same(actual, expected, impl)


@EACH_IMPL
@EACH_OP
def test_autocast_changes_nothing(op, impl):
    """Neither in the forward nor, where it is still on, in the backward."""
    inputs = op.inputs()
    expected = results(op, impl, inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = results(op, impl, inputs)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_autocast_changes_no_formula():
    x, table = torch.randn(1, 5, 2, 8, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    half = x.sigmoid().to(torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rotated, gamma = kernels.rotate(x, table, table), kernels.closed_form_fitness(half, half)
    assert torch.equal(rotated, kernels.rotate(x, table, table))
    assert torch.equal(gamma, kernels.closed_form_fitness(half, half)) and gamma.dtype == half.dtype


@EACH_IMPL
@pytest.mark.parametrize("used", [0, 1], ids=["o", "lse"])
def test_a_loss_of_one_output_gives_every_input_a_gradient(used, impl):
    """The lse does not depend on v, whose gradient is zeros nevertheless."""
    op = OPS["attention"]
    inputs = leaves_of(op.inputs())
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    outputs = op(impl, inputs)
    upstream = torch.randn_like(outputs[used])
    got = torch.autograd.grad(outputs[used], list(leaves.values()), upstream)
    both = [torch.zeros_like(out) for out in outputs]
    both[used] = upstream
    expected = results(op, "eager", inputs, both)[2:]
    assert_same(got, expected, "eager")
    assert got[list(leaves).index("v")].eq(0).all() == (used == 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton, which CUDA tensors take, has no such backward")
@EACH_OP
def test_what_nobody_chose_has_a_gradient_of_whichever_input_asks(op):
    inputs = op.inputs()
    for name, x in leaves_of(inputs).items():
        if x.requires_grad:
            outputs = op("auto", inputs | {name: x})
            assert torch.autograd.grad(outputs[0].sum(), x)[0].isfinite().all()
