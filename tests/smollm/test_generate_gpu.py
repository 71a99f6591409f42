"""Generation on a GPU: the steps that a CUDA graph replays are those that Python runs."""

import pytest
import torch
from test_generate import SAMPLED

from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
    create_smollm_with_attention,
)
from smollm.model import generate, replay

pytestmark = pytest.mark.gpu
VOCAB, WIDTH, NEW = 997, 192, 90
WINDOW = {"use_sliding_window": True, "window_size": 24}
MODULES = {
    "mha": lambda: MultiHeadAttention(WIDTH, 3),
    "gqa": lambda: GroupedQueryAttention(WIDTH, 3, 1, qk_norm="rms"),
    "gqa-window": lambda: GroupedQueryAttention(WIDTH, 3, 1, **WINDOW),
    "gqa-forget": lambda: GroupedQueryAttention(
        WIDTH, 3, 1, decay="forget", exclusive=True, output_gate="element", **WINDOW
    ),
    "mla": lambda: MultiHeadLatentAttention(WIDTH, 3, 96, 32),
    "mla-window": lambda: MultiHeadLatentAttention(WIDTH, 3, 96, 32, **WINDOW),
    "mla-alibi": lambda: MultiHeadLatentAttention(WIDTH, 3, 96, 32, decay="alibi", exclusive=True),
    "mga": lambda: MultiHeadGeneticAttention(WIDTH, 3, 24),
    "mga-kin": lambda: MultiHeadGeneticAttention(WIDTH, 3, 24, 1, environment="kin"),
}
PROMPTS = torch.randint(VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(20) >= torch.tensor([0, 19, 7, 12])[:, None]


class Counted:
    """A model whose steps are counted as Python runs them."""

    def __init__(self, make):
        model = create_smollm_with_attention(
            make(), VOCAB, WIDTH, num_layers=2, ffn_hidden_dim=256, max_seq_len=256
        )
        self.model, self.steps = model.cuda().bfloat16(), 0
        self.model.norm.register_forward_hook(self._count)

    def _count(self, *_):
        self.steps += 1

    def generate(self, **options):
        """Tokens, and the state in which the generator of random numbers was left."""
        self.steps = 0
        torch.manual_seed(1)
        ids = self.model.generate(PROMPTS.cuda(), NEW, attention_mask=MASK.cuda(), **options)
        return ids, torch.cuda.get_rng_state()


def plain(step, times, device):
    return step


@pytest.mark.parametrize("options", [{}, SAMPLED, {"temperature": 1.0}],
                         ids=["greedy", "top", "sampled"])  # fmt: skip
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_replayed_step_generates_the_same_tokens(make, options, monkeypatch):
    model = Counted(make)
    actual, state = model.generate(**options)
    assert model.steps == 1 + replay.WARM_UP + 1  # with the prompt's and the captured one
    eos = int(actual[0, -30])
    ended, _ = model.generate(eos_token_id=eos, **options)
    monkeypatch.setattr(generate, "repeated", plain)
    expected, same_state = model.generate(**options)
    assert model.steps == NEW
    assert torch.equal(actual, expected) and torch.equal(state, same_state)
    assert torch.equal(model.generate(eos_token_id=eos, **options)[0], ended)


def test_few_tokens_are_not_captured():
    model = Counted(MODULES["gqa"])
    assert model.model.generate(PROMPTS.cuda(), 6).shape == (4, 26) and model.steps == 6
