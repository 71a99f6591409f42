"""MGA's kernels on a GPU: every case, every width of the tables, and lengths that fill it."""

import dataclasses

import pytest
import torch
from cases import GENETIC_CASES, GENETIC_DECODE_CASES, GeneticCase, GeneticDecodeCase
from numerics import assert_close_to_truth
from test_attention import _outputs_start_as_nan  # noqa: F401 (autouse)
from test_genetic import (
    assert_case_parity,
    assert_fitness_at_length,
    assert_fitness_parity,
    attend,
    fitness,
    leaves_of,
    of_fitness,
)
from test_genetic_decode import assert_case_parity as assert_decode_parity
from test_genetic_decode import decode

pytestmark = pytest.mark.gpu
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SHAPES = [
    GeneticCase("smollm", tokens=500, heads=9, v_heads=3, window_size=64),
    GeneticCase("kin", tokens=500, heads=32, window_size=200, environment="kin"),
    GeneticCase(
        "none-plain",
        tokens=500,
        heads=32,
        v_heads=8,
        window_size=75,
        environment="none",
        rotary=False,
    ),
    GeneticCase("packed", tokens=500, heads=32, window_size=130, lengths=(100, 1, 0, 399)),
]
LARGE = GeneticCase("large", batch=4, tokens=2048, heads=9, v_heads=3, window_size=700)


@HALVES
@pytest.mark.parametrize("case", GENETIC_CASES, ids=lambda case: case.name)
def test_parity(case, dtype):
    assert_case_parity(case, dtype)


@HALVES
@pytest.mark.parametrize("width", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_parity_at_every_width(case, width, dtype):
    case = dataclasses.replace(case, width=width)
    assert_case_parity(case, dtype)
    assert_fitness_parity(case, dtype)


@pytest.mark.parametrize("width", [64, 96, 256])
@pytest.mark.parametrize("case", SHAPES[2:], ids=lambda case: case.name)
def test_parity_in_float32(case, width):
    case = dataclasses.replace(case, width=width)
    assert_case_parity(case, torch.float32)
    assert_fitness_parity(case, torch.float32)


@pytest.mark.parametrize("window_size", [64, 1000, 100_000])
def test_fitness_at_length(window_size):
    assert_fitness_at_length(131_072, window_size)


@HALVES
def test_long_sequences(dtype):
    """The last rows of 128k tokens, whose windows the oracle does alone."""
    last, window_size = 64, 1000
    case = GeneticCase("", tokens=131_072, heads=9, v_heads=3, window_size=window_size)
    inputs = case.inputs(dtype, "cuda")
    o = attend(case)(**inputs)["o"][:, -last:]
    ends = {name: inputs[name][:, -(last + window_size) :] for name in ("g", "e", "v")}
    end = dataclasses.replace(case, tokens=last + window_size)
    of_end = inputs | ends
    exact = {name: None if x is None else x.double() for name, x in of_end.items()}
    tables = tuple(x[-(last + window_size) :] for x in case.rope("cuda"))
    twin, truth = (attend(end, "eager", rope=tables)(**x)["o"][:, -last:] for x in (of_end, exact))
    assert_close_to_truth(o, twin, truth, "o")


@HALVES
def test_gradients_are_the_same_bits_every_time(dtype):
    inputs = LARGE.inputs(dtype, "cuda")
    leaves = leaves_of(inputs)
    o = attend(LARGE)(**inputs | leaves)["o"]
    gamma = fitness(LARGE)(**of_fitness(inputs | leaves))["gamma"]
    do, dgamma = torch.randn_like(o), torch.randn_like(gamma)

    def gradients():
        return (
            *torch.autograd.grad(o, list(leaves.values()), do, retain_graph=True),
            *torch.autograd.grad(gamma, (leaves["g"], leaves["e"]), dgamma, retain_graph=True),
        )

    first = gradients()
    for _ in range(5):
        assert torch.equal(attend(LARGE)(**inputs)["o"], o)
        for one, other in zip(first, gradients(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("environment", ["query", "kin"])
def test_memory_is_linear(environment):
    """The scores of all pairs in one head alone would take 114 times what g takes."""
    case = GeneticCase("", tokens=65_536, heads=9, window_size=1000, environment=environment)
    inputs = case.inputs(torch.bfloat16, "cuda")
    leaves, do = leaves_of(inputs), torch.randn_like(inputs["v"])
    of_g = inputs["g"].nbytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = attend(case)(**inputs | leaves)["o"]
    assert torch.cuda.memory_allocated() - before < 1.5 * of_g  # o, the lse and the tables
    assert torch.cuda.max_memory_allocated() - before < 6 * of_g
    gradients = torch.autograd.grad(o, list(leaves.values()), do)
    assert torch.cuda.max_memory_allocated() - before < 16 * of_g
    assert all(dx.isfinite().all() for dx in gradients)


def test_strides_beyond_32_bits():
    """Heads that lie more than 2^31 elements apart."""
    case = GeneticCase("", tokens=64, heads=2)
    inputs = case.inputs(torch.float16, "cuda")
    numbers = inputs["g"].numel() // 2  # of a head
    memory = torch.zeros(2, 2**31 + 3 * numbers, dtype=torch.float16, device="cuda")
    far = {}
    for part, name in enumerate(("g", "e", "v")):
        heads = memory[:, part * numbers : (part + 1) * numbers].view(1, 2, 64, 64)
        far[name] = heads.transpose(1, 2).copy_(inputs[name])
    do = torch.randn_like(inputs["v"])
    results = []
    for given in (inputs | far, inputs):
        leaves = leaves_of(given)
        o = attend(case)(**given | leaves)["o"]
        results.append((o, *torch.autograd.grad(o, list(leaves.values()), do)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)


@HALVES
@pytest.mark.parametrize("case", GENETIC_DECODE_CASES, ids=lambda case: case.name)
def test_decode_parity(case, dtype):
    assert_decode_parity(case, dtype)


@pytest.mark.parametrize("q_tokens", [1, 4])
def test_decoding_follows_the_lengths_in_a_graph(q_tokens):
    """Captured once, replayed as the sequences grow past their rings."""
    case = GeneticDecodeCase(
        "", (900,) * 4, 1000, q_tokens, q_heads=9, v_heads=3, window_size=900, rotary=False
    )
    inputs = case.inputs(torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture must not
        decode(case, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode(case, inputs)
    for lengths in ([900] * 4, [1, 0, 64, 1000], [1001, 12_345, 3, 500]):
        inputs["cache_lengths"].copy_(torch.tensor(lengths))
        o.fill_(torch.nan)
        graph.replay()
        assert torch.equal(o, decode(case, inputs))
        torch.testing.assert_close(o, decode(case, inputs, "eager"), atol=1e-2, rtol=1e-2)
