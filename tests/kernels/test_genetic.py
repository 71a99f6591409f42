"""MGA's kernels against their oracles: on a GPU, or under Triton's interpreter without one."""

import dataclasses
from itertools import cycle

import pytest
import torch
from cases import GENETIC_CASES, GeneticCase
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_parity
from test_attention import (  # noqa: F401 (autouse)
    DEVICE,
    EACH_FUSED,
    _outputs_start_as_nan,
    random,
)
from test_latent import measured
from torch.autograd.graph import saved_tensors_hooks

import kernels
from kernels import checks, reference
from smollm import MultiHeadGeneticAttention, create_smollm_with_attention

BY_NAME = {case.name: case for case in GENETIC_CASES}
ALL_CASES = pytest.mark.parametrize("case", GENETIC_CASES, ids=lambda case: case.name)
ENVIRONMENTS = ["query", "kin", "none"]
EACH_ENVIRONMENT = pytest.mark.parametrize("environment", ENVIRONMENTS)
MANY_HEADS = 32
POISONS = [
    {"g": 50.0, "e": -50.0, "v": 1e4},
    {"g": -50.0, "e": 1e4, "v": -1e4},
    {"g": 1e4, "e": 50.0, "v": 1e4},
]


def cases(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda case: case.name)


def attend(case, impl="triton", **held):
    """The case as a function of its tensors, but those held, that returns its output by name."""
    options = {**case.arguments, "rope": case.rope(DEVICE), "impl": impl, **held}

    def run(**inputs):
        return {"o": kernels.genetic_attention(**inputs, **options)}

    return run


def fitness(case, impl="triton"):
    """gene_fitness() of the case as a function of its tensors."""

    def run(**inputs):
        return {"gamma": kernels.gene_fitness(**inputs, **case.arguments, impl=impl)}

    return run


def of_fitness(inputs):
    """Those of the inputs that gene_fitness() takes."""
    return {name: inputs[name] for name in ("g", "e", "cu_seqlens")}


def assert_case_parity(case, dtype, impl="triton", inputs=None):
    inputs = case.inputs(dtype, DEVICE) if inputs is None else inputs
    held = {}
    if case.heads < MANY_HEADS:  # the root mean square of so few numbers is luck
        held["selection_pressure"] = inputs.pop("selection_pressure")
    assert_parity(attend(case, impl, **held), attend(case, "eager", **held), inputs)


def assert_fitness_parity(case, dtype, impl="triton"):
    inputs = of_fitness(case.inputs(dtype, DEVICE))
    assert_parity(fitness(case, impl), fitness(case, "eager"), inputs)


def leaves_of(inputs):
    """The floating inputs by name, each asking for its gradient."""
    floating = {n: x for n, x in inputs.items() if x is not None and x.is_floating_point()}
    return {name: x.detach().requires_grad_() for name, x in floating.items()}


def seen(case):
    """Who sees whom, boolean [T, T]."""
    position = torch.arange(case.tokens, device=DEVICE)
    lengths = torch.tensor(case.lengths or (case.tokens,), device=DEVICE)
    sequence = torch.arange(len(lengths), device=DEVICE).repeat_interleave(lengths)
    distance = position[:, None] - position
    same = sequence[:, None] == sequence
    return (distance >= 0) & (distance < case.window_size) & same


@EACH_FUSED
@ALL_CASES
def test_parity(case, impl):
    assert_case_parity(case, torch.float32, impl)


@EACH_FUSED
@cases("smollm", "tokens-17", "window-across-blocks", "width-96", "kin", "none-plain", "packed",
       "strided-values", "pressure", "kin-sharp")  # fmt: skip
def test_parity_in_bfloat16(case, impl):
    assert_case_parity(case, torch.bfloat16, impl)


@EACH_FUSED
@cases("window-in-block", "width-40", "kin-sharp")
def test_parity_in_float16(case, impl):
    assert_case_parity(case, torch.float16, impl)


@EACH_FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@cases("tokens-1", "tokens-129", "window-1", "window-in-block", "window-64", "window-65",
       "window-over-T", "width-5", "width-96", "kin", "kin-window-over-T", "none", "packed",
       "packed-kin", "packed-at-blocks", "strided")  # fmt: skip
def test_parity_of_fitness(case, dtype, impl):
    assert_fitness_parity(case, dtype, impl)


@EACH_FUSED
@EACH_ENVIRONMENT
def test_parity_of_extreme_logits(environment, impl):
    """sigmoid(-100) is 0 in fp32 and its logarithm -100: whole rows of it must stay finite."""
    case = GeneticCase("", tokens=40, width=16, window_size=7, environment=environment)
    inputs = case.inputs(torch.float32, DEVICE)
    for x in (inputs["g"], inputs["e"]):
        if x is not None:
            x[:] = 100 * x.sign()
            x[:, 5:14] = -100
            x[:, 20:24] = 100
            x[:, 30] = -1000
    assert_parity(fitness(case, impl), fitness(case, "eager"), of_fitness(inputs))
    assert_case_parity(case, torch.float32, impl, inputs)


@EACH_FUSED
@cases("tokens-1", "tokens-129", "window-1", "window-in-block", "window-64", "window-75",
       "window-over-T", "none-plain", "packed", "packed-at-blocks")  # fmt: skip
def test_identity_values_show_exactly_the_mask(case, impl):
    """Where v is the identity the output is who is selected by whom; so is dv where do is."""
    case = dataclasses.replace(case, heads=1, width=16)
    identity = torch.eye(case.tokens, device=DEVICE)[None, :, None]
    inputs = case.inputs(torch.float32, DEVICE) | {"v": identity.clone().requires_grad_()}
    o = attend(case, impl)(**inputs)["o"]
    assert torch.equal(o[0, :, 0] > 0, seen(case)) and o.ge(0).all()
    torch.testing.assert_close(o.sum(-1), torch.ones_like(o[..., 0]))
    (dv,) = torch.autograd.grad(o, inputs["v"], identity)
    assert torch.equal(dv[0, :, 0] > 0, seen(case).T)


@pytest.mark.parametrize(
    ("window_size", "environment", "lengths", "rows"),
    [(7, "query", None, (15, 16, 99)), (16, "kin", None, (15, 16)), (64, "query", None, (64, 99)),
     (75, "none", None, (16, 64, 99)), (40, "query", (32, 32, 0, 36), (16, 64, 99)),
     (200, "kin", (65, 35), (64, 99))],
    ids=["7", "16", "64", "75", "packed-40", "packed-200"],
)  # fmt: skip
@EACH_FUSED
def test_poison_out_of_sight_changes_no_bit(window_size, environment, lengths, rows, impl):
    """Of a row's output, fitness and gradients; what a row does not see it gives no gradient."""
    case = GeneticCase("", tokens=100, heads=1, width=16, window_size=window_size,
                       environment=environment, lengths=lengths)  # fmt: skip
    inputs = case.inputs(torch.float32, DEVICE)
    do = torch.randn_like(inputs["v"])

    def run(inputs):
        leaves = leaves_of(inputs)
        o = attend(case, impl)(**inputs | leaves)["o"]
        gamma = fitness(case, impl)(**of_fitness(inputs))["gamma"]

        def of_row(row):
            gradients = torch.autograd.grad(o[:, row], [*leaves.values()], do[:, row], True)
            return o[:, row], gamma[:, row], dict(zip(leaves, gradients, strict=True))

        return of_row

    clean = run(inputs)
    for row, poison in zip(rows, cycle(POISONS), strict=False):
        unseen = ~seen(case)[row]
        poisoned = {n: x.clone() for n, x in inputs.items() if n in poison and x is not None}
        for name, x in poisoned.items():
            x[:, unseen] = poison[name]
        o, gamma, gradients = clean(row)
        same_o, same_gamma, same_gradients = run(inputs | poisoned)(row)
        assert torch.equal(same_o, o) and torch.equal(same_gamma, gamma), f"row {row}"
        for name, dx in gradients.items():
            same = same_gradients[name]
            if name != "selection_pressure":
                assert dx[:, unseen].eq(0).all()
                dx, same = dx[:, ~unseen], same[:, ~unseen]
            assert torch.equal(same, dx), f"d{name} of row {row}"


@EACH_FUSED
def test_a_window_of_one_selects_oneself(impl):
    case = GeneticCase("", tokens=70, heads=6, v_heads=2, width=16, v_width=24, window_size=1)
    inputs = case.inputs(torch.float32, DEVICE)
    expected = inputs["v"].repeat_interleave(3, dim=2)
    torch.testing.assert_close(attend(case, impl)(**inputs)["o"], expected, atol=1e-6, rtol=0)


@EACH_FUSED
@EACH_ENVIRONMENT
@pytest.mark.parametrize("width", [1, 40, 64])
def test_fitness_is_shared_among_the_genes(width, environment, impl):
    case = GeneticCase("", width=width, window_size=7, environment=environment)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    gamma = fitness(case, impl)(**of_fitness(inputs))["gamma"]
    assert gamma.dtype == torch.float32 and gamma.gt(0).all()
    torch.testing.assert_close(gamma.sum(-1), torch.ones_like(gamma[..., 0]), atol=1e-6, rtol=0)


@EACH_FUSED
def test_an_open_environment_re_weighs_nothing(impl):
    none = GeneticCase("", tokens=70, width=16, environment="none")
    inputs = none.inputs(torch.float32, DEVICE)
    opened = inputs | {"e": torch.zeros_like(inputs["g"])}
    query = dataclasses.replace(none, environment="query")
    for op, of in ((attend, dict), (fitness, of_fitness)):
        (expected,), (actual,) = op(none)(**of(inputs)).values(), op(query)(**of(opened)).values()
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_fewer_value_heads_equal_repeated_values():
    case = GeneticCase("", tokens=70, heads=6, v_heads=2, width=16, v_width=24)
    inputs = case.inputs(torch.float32, DEVICE)
    v = inputs["v"].requires_grad_()
    repeated = inputs["v"].detach().repeat_interleave(3, dim=2).requires_grad_()
    o, expected = (attend(case)(**inputs | {"v": x})["o"] for x in (v, repeated))
    torch.testing.assert_close(o, expected, atol=1e-6, rtol=1e-6)
    do = torch.randn_like(o)
    (dv,), (dv_repeated,) = (
        torch.autograd.grad(o, v, do),
        torch.autograd.grad(expected, repeated, do),
    )
    torch.testing.assert_close(dv, dv_repeated.unflatten(2, (2, 3)).sum(3), atol=1e-5, rtol=1e-5)


@EACH_ENVIRONMENT
def test_memory_is_linear_and_little_is_kept(environment):
    """g, e, v, o, the lse and what the caller holds anyway; q, k and gamma are made again."""
    case = GeneticCase(
        "",
        tokens=192,
        heads=1,
        width=32,
        window_size=70,
        environment=environment,
        lengths=(100, 92),
        contiguous=False,
    )
    inputs = case.inputs(torch.float32, DEVICE)
    leaves = leaves_of(inputs)
    rope = dataclasses.replace(case, contiguous=True).rope(DEVICE)
    kept = []

    def forward():
        with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            return kernels.genetic_attention(
                **inputs | leaves, **case.arguments, rope=rope, impl="triton"
            )

    o, _, allocated = measured(forward)
    do = random(1, 1, 192, 48)[..., :32].transpose(1, 2)
    _, _, allocated_backward = measured(lambda: torch.autograd.grad(o, list(leaves.values()), do))
    fp32_of_g = 4 * inputs["g"].numel()
    assert max(allocated + allocated_backward) <= fp32_of_g < case.tokens**2

    needed = {x.data_ptr() for name, x in leaves.items() if name in "gev"} | {o.data_ptr()}
    small = {x.data_ptr() for x in (*rope, leaves["selection_pressure"], inputs["cu_seqlens"])}
    assert needed <= {x.data_ptr() for x in kept}
    (lse,) = (x for x in kept if x.numel() and x.data_ptr() not in needed | small)
    assert lse.nbytes == 2 * 4 * case.tokens * case.heads  # fp32 inputs: with its rounding


@EACH_FUSED
@cases("tokens-65", "packed", "strided")
def test_gradients_are_the_same_bits_every_time(case, impl):
    inputs = case.inputs(torch.bfloat16, DEVICE)
    leaves = leaves_of(inputs)
    do = torch.randn_like(inputs["v"])

    def gradients():
        o = attend(case, impl)(**inputs | leaves)["o"]
        gamma = fitness(case, impl)(**of_fitness(inputs | leaves))["gamma"]
        of_gamma = torch.autograd.grad(gamma, (leaves["g"], leaves["e"]), do.float())
        return *torch.autograd.grad(o, list(leaves.values()), do), *of_gamma

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


@EACH_FUSED
@pytest.mark.parametrize("name", ["g", "e", "v", "selection_pressure"])
def test_one_input_alone_may_ask_for_gradients(name, impl):
    case = GeneticCase("", tokens=20, v_heads=1, width=16, window_size=7)
    inputs = case.inputs(torch.float32, DEVICE)
    x = inputs[name].requires_grad_()
    do = random(1, 20, 3, 16)
    ours, expected = (
        torch.autograd.grad(attend(case, which)(**inputs)["o"], x, do)[0]
        for which in (impl, "eager")
    )
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_a_pressure_in_bfloat16_is_taken_as_the_number_it_is():
    """As a module has it that was cast as a whole; its gradient is rounded once."""
    case = GeneticCase("", tokens=20, width=16)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    rounded = inputs["selection_pressure"].bfloat16()
    results = []
    for pressure in (rounded.requires_grad_(), rounded.detach().float().requires_grad_()):
        o = attend(case)(**inputs | {"selection_pressure": pressure})["o"]
        results.append((o, torch.autograd.grad(o, pressure, torch.ones_like(o))[0]))
    (o, dpressure), (expected, exact) = results
    assert torch.equal(o, expected) and torch.equal(dpressure, exact.bfloat16())


@EACH_FUSED
def test_a_summed_output_has_a_gradient(impl):
    """The gradient of a sum has no strides at all."""
    case = GeneticCase("", tokens=20, width=16, window_size=7)
    inputs = case.inputs(torch.float32, DEVICE)
    leaves = leaves_of(inputs)
    for op, names in ((attend, list(leaves)), (fitness, ["g", "e"])):
        gradients = []
        for which in (impl, "eager"):
            given = inputs | leaves if op is attend else of_fitness(inputs | leaves)
            (out,) = op(case, which)(**given).values()
            gradients.append(torch.autograd.grad(out.sum(), [leaves[n] for n in names]))
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


@EACH_FUSED
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (1, 0)], ids=["B", "T"])
def test_empty_tensors(batch, tokens, impl):
    case = GeneticCase("", batch=batch, tokens=tokens, width=16, v_width=24)
    inputs = case.inputs(torch.float32, DEVICE)
    leaves = leaves_of(inputs)
    o = attend(case, impl)(**inputs | leaves)["o"]
    gamma = fitness(case, impl)(**of_fitness(inputs | leaves))["gamma"]
    assert o.shape == inputs["v"].shape and gamma.shape == inputs["g"].shape
    gradients = torch.autograd.grad(o.sum() + gamma.sum(), list(leaves.values()))
    for x, dx in zip(leaves.values(), gradients, strict=True):
        assert dx.shape == x.shape and dx.eq(0).all()


def assert_fitness_at_length(tokens, window_size):
    """Against fp64, where the difference of two sums over all tokens before is exact enough."""
    g, dgamma = random(1, tokens, 1, 16, grad=True), random(1, tokens, 1, 16)
    options = {"window_size": window_size, "environment": "none"}
    gamma = kernels.gene_fitness(g, **options, impl="triton")

    exact = g.detach().double().requires_grad_()
    end = torch.arange(1, tokens + 1, device=DEVICE)
    first = (end - window_size).clamp(min=0)
    before = torch.nn.functional.pad(exact.sigmoid()[0, :, 0].cumsum(0), (0, 0, 1, 0))
    expression = (before[end] - before[first]) / (end - first)[:, None]
    truth = (1 / (expression + 0.5))[None, :, None]
    truth = truth / truth.sum(-1, keepdim=True)
    assert ((gamma - truth) / truth).abs().max() <= 1e-6

    (dg,) = torch.autograd.grad(gamma, g, dgamma)
    (truth,) = torch.autograd.grad(truth, exact, dgamma.double())
    assert (dg - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("window_size", [8, 1000])
def test_fitness_at_length(window_size):
    """The difference of two sums over thousands of tokens in fp32 errs more than a window's sum."""
    assert_fitness_at_length(1500, window_size)


@st.composite
def genetic_cases(draw):
    v_heads = draw(st.integers(1, 2))
    rotary, packed = draw(st.booleans()), draw(st.booleans())
    lengths = None
    if packed:
        lists = st.lists(st.integers(0, 30), min_size=2, max_size=3)
        lengths = tuple(draw(lists.filter(lambda n: sum(n) > 0)))
    return GeneticCase(
        "drawn",
        batch=1 if packed else draw(st.integers(1, 2)),
        tokens=draw(st.integers(1, 90)) if lengths is None else sum(lengths),
        heads=v_heads * draw(st.integers(1, 3)),
        v_heads=v_heads,
        width=2 * draw(st.integers(1, 24)) if rotary else draw(st.integers(1, 48)),
        v_width=draw(st.integers(1, 48)),
        window_size=draw(st.integers(1, 100)),
        environment=draw(st.sampled_from(ENVIRONMENTS)),
        rotary=rotary,
        lengths=lengths,
        contiguous=draw(st.booleans()),
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(genetic_cases(), st.integers(0, 2**31))
def test_parity_beyond_the_named_cases(case, seed):
    torch.manual_seed(seed)
    assert_case_parity(case, torch.float32)
    assert_fitness_parity(case, torch.float32)


def test_smollm_trains_through_the_kernels(monkeypatch):
    """Where genetic_attention() chooses Triton, the model trains with it and without the oracle."""
    prototype = MultiHeadGeneticAttention(48, 3, window_size=9, num_value_heads=1)
    model = create_smollm_with_attention(prototype, 50, 48, 2, 64, 64).to(DEVICE)
    ids = torch.randint(50, (2, 40), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding packs the batch
    results = {}
    for impl in ("eager", "triton"):
        monkeypatch.setattr(checks, "implementation", lambda *_, impl=impl, **__: impl)
        if impl == "triton":
            monkeypatch.delattr(reference, "genetic_attention")
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))["loss"]
        loss.backward()
        results[impl] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for x, y in zip(results["triton"], results["eager"], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
