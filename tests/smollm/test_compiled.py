"""Models and modules through torch.compile: graphs are counted, none is timed."""

import pytest
import torch
from test_model import VOCAB, build
from test_modules import WIDTH, WINDOW
from torch._dynamo.testing import CompileCounterWithBackend

from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)

MECHANISMS = {
    "mha": lambda **window: MultiHeadAttention(WIDTH, 6, is_causal=True, **window),
    "gqa": lambda **window: GroupedQueryAttention(WIDTH, 6, 2, is_causal=True, **window),
    "mla": lambda **window: MultiHeadLatentAttention(WIDTH, 6, 10, 4, is_causal=True, **window),
    "mga": lambda **_: MultiHeadGeneticAttention(WIDTH, 6, 3),
}
each_mechanism = pytest.mark.parametrize("make", MECHANISMS.values(), ids=MECHANISMS)


@pytest.fixture(autouse=True)
def _no_other_graphs():
    torch.compiler.reset()


def whole(network, backend="eager", **options):
    """It as one graph, which is an error if it is not, and what counts the graphs made of it."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(network, backend=counter, fullgraph=True, **options), counter


def of_any_length(*tensors):
    """Tensors for which a graph that fixes the number of tokens is refused."""
    for x in tensors:
        torch._dynamo.mark_dynamic(x, 1)
    return tensors


@each_mechanism
def test_one_graph_serves_all_lengths_forward_and_backward(make):
    full, window = make().double(), make(**WINDOW).double()

    def both(x):
        return full(x) + window(x)

    def results(network, x):
        out = network(x)
        leaves = [x, *full.parameters(), *window.parameters()]
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    network, counter = whole(both, dynamic=True)
    for tokens in (33, 47, 64, 2):
        (x,) = of_any_length(torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True))
        for got, expected in zip(results(network, x), results(both, x), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_a_second_graph_of_a_model_serves_all_other_lengths():
    model = build(MECHANISMS["gqa"](**WINDOW), num_layers=1)
    network, counter = whole(model)
    for tokens in (33, 40, 64, 47, 2):
        ids = torch.randint(VOCAB, (2, tokens))
        found, expected = (f(ids, labels=ids) for f in (network, model))
        torch.testing.assert_close(found, expected)
        found["loss"].backward()
    assert counter.frame_count == 2
