"""Models through torch.compile, torch.export and torch.func: graphs are counted, none is timed."""

import pytest
import torch
from test_model import VOCAB, build
from test_modules import MODULES, WIDTH
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call, grad, vmap

EACH_MECHANISM = pytest.mark.parametrize("name", ["mha-window", "gqa-rms", "mla-qk-norm", "mga"])


@pytest.fixture(autouse=True)
def _no_other_graphs():
    torch.compiler.reset()


def whole(network):
    """It as one graph, which is an error if it is not, and what counts the graphs made of it."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(network, backend=counter, fullgraph=True), counter


def padded(batch, tokens, left, right):
    """Ids, and a mask with padding at the left of the first row and at the right of the last."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, :left], mask[-1, tokens - right :] = False, False
    return torch.randint(VOCAB, (batch, tokens)), mask


def results(model, network, *inputs, **options):
    """Outputs of a network, and the gradients of the model's parameters."""
    out = network(*inputs, labels=inputs[0], **options)
    given = [x for x in out.values() if x is not None]
    return *given, *torch.autograd.grad(out["loss"], list(model.parameters()))


def assert_same(model, network, *inputs, **options):
    compiled, eager = (results(model, f, *inputs, **options) for f in (network, model))
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y)


def of_any_length(*tensors):
    """Tensors for which a graph that fixes the number of tokens is refused."""
    for x in tensors:
        torch._dynamo.mark_dynamic(x, 1)
    return tensors


@EACH_MECHANISM
def test_one_graph_serves_padded_batches_of_any_length(name):
    model = build(MODULES[name](), num_layers=1)
    network, counter = whole(model)
    assert_same(model, network, *of_any_length(*padded(2, 9, 2, 3)))
    for shape in ((2, 9, 0, 8), (2, 9, 0, 0), (2, 12, 1, 4), (2, 33, 30, 1)):
        assert_same(model, network, *padded(*shape))
    assert counter.frame_count == 1


def test_one_graph_serves_packed_batches_of_any_length():
    """In bf16, computing blocks anew in the backward, and without whole logits."""
    model = build(MODULES["mga"](), num_layers=1)
    model.activation_checkpointing = True
    network, counter = whole(model)
    for offsets in ((0, 3, 9), (0, 8, 9), (0, 1, 12), (0, 2, 40)):
        (ids,) = of_any_length(torch.randint(VOCAB, (1, offsets[-1])))
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(model, network, ids, cu_seqlens=cu_seqlens, with_logits=False)
    assert counter.frame_count == 1


def test_a_graph_refuses_what_is_no_padding_as_it_runs():
    module = MODULES["mha"]()
    network, _ = whole(module)
    x = torch.randn(2, 5, WIDTH)
    network(x, torch.ones(2, 5, dtype=torch.int64))
    for row in ([1, 0, 1, 1, 1], [1, 1, 2, 1, 1], [1, 1, -1, 1, 1]):
        with pytest.raises(RuntimeError, match=r"^attention_mask: expected 0 or 1, .* got another"):
            network(x, torch.tensor([[1, 1, 1, 1, 1], row]))
    with pytest.raises(RuntimeError, match=r"^attention_mask: expected .* a real token, and"):
        network(x, torch.zeros(2, 5, dtype=torch.int64))


def test_what_stands_at_padding_reaches_no_result_of_a_graph():
    module = MODULES["gqa-rms"]()
    network, _ = whole(module)
    _, mask = padded(2, 7, 3, 2)
    x = torch.randn(2, 7, WIDTH).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    leaves = [x, *module.parameters()]
    out, expected = network(x, mask), module(x, mask)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), leaves)
    for d, y in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(d, y)


def test_a_graph_has_no_padding_beside_a_cache():
    model = build(MODULES["mha"](), num_layers=1)
    ids, mask = padded(2, 5, 1, 0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no padding beside a cache"):
        whole(model)[0](ids, mask, cache=model.new_cache(2, 8))


@EACH_MECHANISM
def test_an_exported_model_takes_padded_batches_of_any_size(name):
    model = build(MODULES[name](), num_layers=1).eval()
    shape = {0: Dim("batch", max=64), 1: Dim("tokens", min=2, max=model.max_seq_len)}
    ids, mask = padded(2, 9, 2, 3)
    program = torch.export.export(model, (ids, mask), dynamic_shapes=(shape, shape))
    assert any("smollm_attention.sdpa" in str(node.target) for node in program.graph.nodes)
    for size in ((2, 9, 1, 1), (3, 33, 0, 20)):
        inputs = padded(*size)
        found = program.module()(*inputs)["logits"]
        torch.testing.assert_close(found, model(*inputs)["logits"])


@EACH_MECHANISM
def test_each_sequence_has_gradients_of_its_own(name):
    model = build(MODULES[name](), num_layers=1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ids = torch.randint(VOCAB, (3, 8))

    def loss(parameters, ids):
        return functional_call(model, parameters, (ids[None],), {"labels": ids[None]})["loss"]

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for i in range(len(ids)):
        alone = model(ids[i : i + 1], labels=ids[i : i + 1])["loss"]
        for name, d in zip(
            parameters, torch.autograd.grad(alone, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(found[name][i], d)
