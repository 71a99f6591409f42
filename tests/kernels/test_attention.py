"""The fused attention against its oracle: on a GPU, or under Triton's interpreter without one."""

import dataclasses

import pytest
import torch
from cases import ATTENTION_CASES, AttentionCase
from numerics import assert_parity
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import checks
from kernels.core.problem import Problem
from smollm import GroupedQueryAttention, create_smollm_with_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = ["triton", "sdpa"] if DEVICE == "cpu" else ["triton"]
EACH_FUSED = pytest.mark.parametrize("impl", FUSED)
# opcheck traces operators with dynamic shapes too, so one way to compile for each is enough.
EACH_COMPILED = pytest.mark.parametrize(("impl", "dynamic"), [("triton", False), (FUSED[-1], True)])
EACH_IMPL = pytest.mark.parametrize("impl", [*FUSED, "eager"])
BY_NAME = {case.name: case for case in ATTENTION_CASES}
ALL_CASES = pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)


def cases(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    """PyTorch fills fresh memory with NaN where algorithms are to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(case, impl="triton"):
    """The case as a function of its tensors that returns its outputs by name."""

    def run(**inputs):
        o, lse = kernels.attention(**inputs, **case.arguments, return_lse=True, impl=impl)
        return {"o": o, "lse": lse}

    return run


def random(*shape, grad=False):
    return torch.randn(*shape, device=DEVICE, requires_grad=grad)


def assert_case_parity(case, dtype, impl="triton"):
    assert_parity(attend(case, impl), attend(case, "eager"), case.inputs(dtype, DEVICE))


@EACH_FUSED
@ALL_CASES
def test_parity(case, impl):
    assert_case_parity(case, torch.float32, impl)


@EACH_FUSED
@cases("smollm", "tokens-17", "window-across-blocks", "width-96", "value-heads-8-4-2",
       "packed-window", "fewer-queries-window", "strided", "sinks-window", "sharp", "sharp-sinks",
       "sharp-bias")  # fmt: skip
def test_parity_in_bfloat16(case, impl):
    assert_case_parity(case, torch.bfloat16, impl)


@EACH_FUSED
@cases("tokens-65", "width-40", "sinks", "sharp", "sharp-sinks", "sharp-bias")
def test_parity_in_float16(case, impl):
    assert_case_parity(case, torch.float16, impl)


@EACH_FUSED
@ALL_CASES
def test_identity_values_show_exactly_the_mask(case, impl):
    """Where v is the identity the output is the attention matrix; so is dv where do is."""
    case = dataclasses.replace(case, batch=1, q_heads=1, k_heads=1, v_heads=None, width=16)
    inputs = case.inputs(torch.float32, DEVICE)
    inputs["v"] = torch.eye(inputs["k"].shape[1], device=DEVICE)[None, :, None].requires_grad_()
    o, expected = attend(case, impl)(**inputs)["o"], attend(case, "eager")(**inputs)["o"]
    assert torch.equal(o != 0, expected != 0)
    if case.q_tokens == inputs["k"].shape[1]:
        (dv,) = torch.autograd.grad(o, inputs["v"], torch.eye(case.q_tokens)[None, :, None].to(o))
        assert torch.equal(dv[0, :, 0] != 0, (expected[0, :, 0] != 0).T)


@EACH_FUSED
@pytest.mark.parametrize("packed", [False, True], ids=["window", "packed"])
def test_poison_out_of_sight_changes_no_bit(packed, impl):
    tokens, window, row = 150, 40, 100
    q, k, v, do = (random(1, tokens, 2, 32) for _ in range(4))
    options = {"impl": impl, "window_size": window, "return_lse": True}
    first = row - window + 1
    if packed:
        first = 90
        options["cu_seqlens"] = torch.tensor([0, 90, 150], dtype=torch.int32, device=DEVICE)

    def of_row(k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o, lse = kernels.attention(*leaves, **options)
        dq, dk, dv = torch.autograd.grad(o[:, row], leaves, do[:, row])
        return o[:, row], lse[:, row], dq[:, row], dk[:, first : row + 1], dv[:, first : row + 1]

    clean = of_row(k, v)
    for unseen in (slice(0, first), slice(row + 1, None)):
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, unseen] = poisoned_v[:, unseen] = 1e4
        for before, after in zip(clean, of_row(poisoned_k, poisoned_v), strict=True):
            assert torch.equal(before, after)


@EACH_FUSED
@cases("heads-6-2", "packed-window")
def test_gradients_are_the_same_bits_every_time(case, impl):
    inputs = case.inputs(torch.bfloat16, DEVICE)
    names = [name for name, x in inputs.items() if x is not None and x.is_floating_point()]
    do = None

    def gradients():
        nonlocal do
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        o = attend(case, impl)(**inputs | leaves)["o"]
        do = torch.randn_like(o) if do is None else do
        return torch.autograd.grad(o, list(leaves.values()), do)

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


class Ops(TorchDispatchMode):
    """Every operator that ran, by name, and the largest tensor that one returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_is_quadratic_and_nothing_is_copied(dtype):
    """Kept are the inputs, o, the lse and what rounding takes off: in fp32 the lse, else o."""
    tokens = 300
    case = AttentionCase("strided", q_tokens=tokens, width=16, window_size=70, contiguous=False)
    leaves = {n: x for n, x in case.inputs(dtype, DEVICE).items() if x is not None}
    for x in leaves.values():
        x.requires_grad_()
    do = case.inputs(dtype, DEVICE)["q"]
    assert not do.is_contiguous()
    kept = []
    with Ops() as ops:
        with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            o = kernels.attention(**leaves, window_size=70, impl="triton")
        torch.autograd.grad(o, list(leaves.values()), do)
    assert ops.largest == tokens * 3 * 16
    assert not ops.names & {"clone", "copy_", "contiguous", "_to_copy"}
    shapes = [tuple(x.shape) for x in kept]
    lse, rest = (1, 3, 2, tokens), (0,) * 4
    if dtype == torch.bfloat16:
        lse, rest = (1, 3, 1, tokens), tuple(o.shape)
    assert shapes == [tuple(x.shape) for x in (*leaves.values(), o)] + [lse, rest]
    assert all(any(x.data_ptr() == y.data_ptr() for x in kept) for y in leaves.values())


@EACH_FUSED
def test_a_summed_output_has_a_gradient(impl):
    """The gradient of a sum has no strides at all."""
    leaves = [random(1, 20, 2, 16, grad=True) for _ in range(3)]
    sums = (kernels.attention(*leaves, impl=name).sum() for name in (impl, "eager"))
    gradients = [torch.autograd.grad(x, leaves) for x in sums]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@EACH_FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_lse_alone_has_gradients(dtype, impl):
    """o and what rounding takes off it get none."""

    def lse(q, k, v):
        return kernels.attention(q, k, v, return_lse=True, impl=impl)[1].sum()

    inputs = [random(1, 20, 2, 16).to(dtype) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    dq, dk, dv = torch.autograd.grad(lse(*leaves), leaves)
    assert dv.eq(0).all()
    expected = torch.func.grad(lse, (0, 1, 2))(*inputs)
    for x, y in zip((dq, dk, dv), expected, strict=True):
        assert torch.equal(x, y)
    rows = torch.stack(inputs)[:, None].expand(3, 2, *inputs[0].shape)
    of_each = torch.func.vmap(torch.func.grad(lse, (0, 1, 2)))(*rows)
    for x, y in zip(of_each, expected, strict=True):
        assert torch.equal(x[0], y) and torch.equal(x[1], y)


@EACH_FUSED
@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 5, 0)], ids=["B", "Tq", "Tk"])
def test_empty_tensors(shape, impl):
    batch, q_tokens, k_tokens = shape
    q, k, v = (random(batch, t, 2, 16, grad=True) for t in (q_tokens, k_tokens, k_tokens))
    o, lse = kernels.attention(q, k, v, return_lse=True, impl=impl)
    assert o.shape == q.shape and o.eq(0).all()
    assert lse.shape == q.shape[:3] and lse.eq(-torch.inf).all()
    for x, dx in zip((q, k, v), torch.autograd.grad(o.sum(), (q, k, v)), strict=True):
        assert dx.shape == x.shape and dx.eq(0).all()


def test_fp32_weights_lose_nothing_to_a_large_lse():
    """Three equal keys weigh 1 / 3 each, however large their score."""
    q = 40 * random(1, 50, 2, 16)
    k, v = torch.ones_like(q), torch.zeros_like(q, requires_grad=True)
    o = kernels.attention(q, k, v, window_size=3, impl="triton")
    (dv,) = torch.autograd.grad(o, v, torch.ones_like(o))
    torch.testing.assert_close(
        dv[:, 2:48], torch.ones(1, 46, 2, 16, device=DEVICE), atol=3e-7, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-rotary"])
def test_opcheck(dtype):
    inputs = [random(1, 20, 6, 16), random(1, 20, 2, 16), random(1, 20, 2, 24)]
    inputs += [random(1, 20, 6, 8), random(1, 20, 8)]
    inputs = [x.to(dtype) for x in inputs] if dtype == torch.bfloat16 else [*inputs[:3], None, None]
    sinks, cu_seqlens = random(6), torch.tensor([0, 7, 20], dtype=torch.int32, device=DEVICE)
    problem = Problem(*inputs, sinks, None, cu_seqlens, scale=0.25, window_size=5)
    ops = torch.ops.smollm_attention
    torch.library.opcheck(ops.forward.default, (*problem, True))
    o, lse, rest = ops.forward(*problem, True)
    assert rest.numel() == (0 if dtype == torch.float32 else o.numel())
    gradients = torch.randn_like(o), torch.randn_like(lse)
    for with_excess in (False, True):
        arguments = (*problem, o, lse, rest, *gradients, with_excess)
        torch.library.opcheck(ops.backward.default, arguments)


@pytest.mark.slow
@EACH_COMPILED
def test_compiles_as_one_graph(dynamic, impl):
    torch.compiler.reset()

    def loss(q, k, v, sinks):
        o, lse = kernels.attention(q, k, v, sinks=sinks, window_size=7, return_lse=True, impl=impl)
        return o.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (20, 33):
        leaves = [random(1, tokens, h, 16, grad=True) for h in (6, 2, 2)] + [random(6, grad=True)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(x, y)


def test_smollm_trains_through_the_kernels(monkeypatch):
    """A model calls attention() alone; where that chooses Triton, the model trains with it."""
    prototype = GroupedQueryAttention(48, 3, num_kv_heads=1, use_sliding_window=True, window_size=9)
    model = create_smollm_with_attention(prototype, 50, 48, 2, 64, 64).to(DEVICE)
    ids = torch.randint(50, (2, 40), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding packs the batch
    results = {}
    for impl in ("eager", "triton"):
        monkeypatch.setattr(checks, "implementation", lambda *_, impl=impl, **__: impl)
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))["loss"]
        loss.backward()
        results[impl] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for x, y in zip(results["triton"], results["eager"], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
