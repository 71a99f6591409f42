"""Models and modules through torch.compile and torch.export: graphs are counted, none is timed."""

import io

import pytest
import torch
from numerics import assert_close_to_truth
from test_model import VOCAB, build, mixed
from test_modules import WIDTH, WINDOW
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)

pytestmark = pytest.mark.slow
MECHANISMS = {
    "mha": lambda **window: MultiHeadAttention(
        WIDTH, 6, is_causal=True, decay="forget", exclusive=True, output_gate="head", **window
    ),
    "gqa": lambda **window: GroupedQueryAttention(WIDTH, 6, 2, is_causal=True, **window),
    "mla": lambda **window: MultiHeadLatentAttention(WIDTH, 6, 10, 4, is_causal=True, **window),
    "mga": lambda **_: MultiHeadGeneticAttention(WIDTH, 6, 3),
    "mga-no-fitness": lambda **_: MultiHeadGeneticAttention(WIDTH, 6, 3, gene_fitness=False),
}


@pytest.fixture(autouse=True)
def _no_other_graphs():
    torch.compiler.reset()


def whole(network, backend="eager", **options):
    """It as one graph, which is an error if it is not, and what counts the graphs made of it."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(network, backend=counter, fullgraph=True, **options), counter


def padded(batch, tokens, left, right):
    """A mask with padding at the left of the first row and at the right of the last."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, :left], mask[-1, tokens - right :] = False, False
    return mask


def of_any_length(*tensors):
    """Tensors for which a graph that fixes the number of tokens is refused."""
    for x in tensors:
        torch._dynamo.mark_dynamic(x, 1)
    return tensors


@pytest.mark.parametrize("name", MECHANISMS)
def test_one_graph_serves_all_lengths_and_all_padding_forward_and_backward(name):
    """Beside the module one with a window, where there is one; gqa's has a test of its own."""
    modules = nn.ModuleList([MECHANISMS[name]()])
    if name in ("mha", "mla"):  # gqa's window has a test of its own
        modules.append(MECHANISMS[name](**WINDOW))
    modules.double()

    def both(x, mask):
        return sum(module(x, mask) for module in modules)

    def results(network, x, mask):
        out = network(x, mask)
        return out, *torch.autograd.grad(out.square().sum(), [x, *modules.parameters()])

    network, counter = whole(both, dynamic=True)
    for tokens, left, right in ((33, 2, 5), (47, 0, 46), (64, 0, 0), (2, 1, 0)):
        x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
        inputs = of_any_length(x, padded(2, tokens, left, right))
        for got, expected in zip(results(network, *inputs), results(both, *inputs), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_a_second_graph_of_a_model_serves_all_other_lengths():
    model = build(MECHANISMS["gqa"](**WINDOW), num_layers=1)
    network, counter = whole(model)
    for tokens in (33, 40, 64, 47, 2):
        ids, mask = torch.randint(VOCAB, (2, tokens)), padded(2, tokens, 1, tokens // 2)
        found, expected = (f(ids, mask, labels=ids) for f in (network, model))
        torch.testing.assert_close(found, expected)
        found["loss"].backward()
    assert counter.frame_count == 2


def test_a_graph_keeps_out_what_stands_at_padding_and_refuses_what_is_none_as_it_runs():
    module = MECHANISMS["gqa"]()
    network, _ = whole(module, "aot_eager")
    mask = padded(2, 5, 3, 2).long()
    x = torch.randn(2, 5, WIDTH).masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    found, expected = (f(x, mask) for f in (network, module))
    torch.testing.assert_close(found, expected)
    (d,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, expected))
    torch.testing.assert_close(d, wanted)
    for row in ([1, 0, 1, 1, 1], [1, 1, 2, 1, 1], [1, 1, -1, 1, 1]):
        with pytest.raises(RuntimeError, match=r"^attention_mask: expected 0 or 1, .* got another"):
            network(x, torch.tensor([[1, 1, 1, 1, 1], row]))
    with pytest.raises(RuntimeError, match=r"^attention_mask: expected .* a real token, and"):
        network(x, torch.zeros(2, 5, dtype=torch.int64))


def test_a_graph_has_no_padding_beside_a_cache():
    model = build(MECHANISMS["mha"](), num_layers=1)
    ids, cache = torch.randint(VOCAB, (2, 5)), model.new_cache(2, 8)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no padding beside a cache"):
        whole(model)[0](ids, padded(2, 5, 1, 0), cache=cache)


def test_a_graph_of_unlike_layers_under_autocast_keeps_each_blocks_input_alone():
    model = build([MECHANISMS[name]() for name in ("mha", "mla", "mga")])
    # Without the tracing of gradients PyTorch 2.11 keeps all.
    network, _ = whole(model, "aot_eager")
    ids = torch.randint(VOCAB, (2, 32))

    def step(f, enabled=True):
        """Logits, all gradients, and how many numbers waited for the backward."""
        kept = {}

        def keep(x):
            kept[x.data_ptr()] = x.numel()
            return x

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            out = f(ids, labels=ids)
        gradients = torch.autograd.grad(out["loss"], list(model.parameters()))
        return out["logits"], torch.cat([d.flatten() for d in gradients]), sum(kept.values())

    *twin, all_numbers = step(model)
    model.activation_checkpointing = True
    *found, few_numbers = step(network)
    assert found[0].dtype == torch.bfloat16 and few_numbers < all_numbers / 2
    model.double()
    *truth, _ = step(model, enabled=False)
    for name, *results in zip(("logits", "gradients"), found, twin, truth, strict=True):
        assert_close_to_truth(*results, name)


def test_an_exported_model_of_unlike_layers_takes_batches_of_any_size_once_loaded():
    model = build(mixed()).eval()
    shape = {0: Dim("batch", max=8), 1: Dim("tokens", max=model.max_seq_len)}
    given = torch.randint(VOCAB, (3, 9)), padded(3, 9, 2, 3)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, given, dynamic_shapes=(shape, shape)), file)
    program = torch.export.load(file).module()
    for batch, tokens, left, right in ((2, 9, 1, 1), (8, 64, 0, 20), (1, 2, 1, 0), (2, 1, 0, 0)):
        inputs = torch.randint(VOCAB, (batch, tokens)), padded(batch, tokens, left, right)
        torch.testing.assert_close(program(*inputs), model(*inputs))
