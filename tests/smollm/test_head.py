"""The loss without all logits at once is the loss of the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from bench.timing import peak_bytes
from smollm.model import head
from smollm.model.head import IGNORED, linear_next_token_loss, next_token_loss

BATCH, TOKENS, WIDTH, VOCAB = 2, 9, 6, 20


def problem(tokens=TOKENS):
    hidden = torch.randn(BATCH, tokens, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB, (BATCH, tokens))
    targets[0, 2:5] = targets[1, 0] = IGNORED
    return hidden, weight, targets


def of_logits(hidden, weight, targets):
    return next_token_loss(F.linear(hidden, weight), targets)


def values_and_gradients(loss, hidden, weight, targets):
    value = 3 * loss(hidden, weight, targets)
    return value, *torch.autograd.grad(value, (hidden, weight))


@pytest.mark.parametrize("rows", [1, 4, 5, 18, 100])
def test_any_number_of_rows_at_once_gives_the_loss_and_both_gradients(rows, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", rows * VOCAB)
    arguments = problem()
    found = values_and_gradients(linear_next_token_loss, *arguments)
    for got, expected in zip(found, values_and_gradients(of_logits, *arguments), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert found[0].dtype == torch.float32


def test_autocast_rounds_as_the_head_does():
    hidden, weight, targets = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(linear_next_token_loss, hidden, weight, targets)
        expected = values_and_gradients(of_logits, hidden, weight, targets)
    assert torch.equal(found[0], expected[0]) and found[1].dtype == torch.float32
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, atol=0.02, rtol=0.02)


def test_no_target_at_all_gives_zeros():
    hidden, weight, targets = problem()
    found = values_and_gradients(
        linear_next_token_loss, hidden, weight, torch.full_like(targets, IGNORED)
    )
    assert not any(x.any() for x in found)


def test_what_asks_for_no_gradient_gets_none():
    hidden, weight, targets = problem()
    linear_next_token_loss(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        loss = linear_next_token_loss(hidden, weight, targets)
    torch.testing.assert_close(loss, of_logits(hidden, weight, targets).detach())


def test_a_huge_logit_overflows_nothing():
    hidden, weight, targets = problem()
    arguments = (hidden * 1e4).detach().requires_grad_(), weight, targets
    found = values_and_gradients(linear_next_token_loss, *arguments)
    for got, expected in zip(found, values_and_gradients(of_logits, *arguments), strict=True):
        size = expected.abs().max()
        torch.testing.assert_close(got / size, expected / size, atol=1e-6, rtol=0)


def test_memory_does_not_grow_with_the_logits(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 64 * 4096)
    hidden = torch.randn(4, 512, 32, requires_grad=True)
    weight = torch.randn(4096, 32, requires_grad=True)
    targets = torch.randint(4096, (4, 512))

    def step(loss):
        return lambda: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

    logits = 4 * 512 * 4096 * 4
    assert peak_bytes(step(of_logits)) > 2 * logits
    assert peak_bytes(step(linear_next_token_loss)) < logits / 4


def test_a_loss_alone_holds_no_gradient(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 4096)
    hidden = torch.randn(1, 16, 32, requires_grad=True)
    weight = torch.randn(4096, 32, requires_grad=True)
    targets = torch.randint(4096, (1, 16))
    with torch.no_grad():
        held = peak_bytes(lambda: linear_next_token_loss(hidden, weight, targets))
    assert held < weight.numel() * 4 / 2


@pytest.mark.slow
def test_one_graph_serves_all_lengths_up_to_a_power_of_two(monkeypatch):
    """In parts, which are as many for each of them."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 16 * VOCAB)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_next_token_loss, fullgraph=True, backend=counter)
    for tokens in (9, 11, 16):
        arguments = problem(tokens=tokens)
        torch._dynamo.mark_dynamic(arguments[0], 1)
        torch._dynamo.mark_dynamic(arguments[2], 1)
        found = values_and_gradients(compiled, *arguments)
        for got, expected in zip(found, values_and_gradients(of_logits, *arguments), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1
