"""Checkpoints of transformers: the same logits, gradients and tokens, and the same bits back."""

import pytest
import torch
import transformers
from hf_cases import HALF, HYBRID, LATENT, LLAMA3, MIXED, SHAPE, their_model

from smollm.hf import from_hf, save_hf
from smollm.hf.facts import facts_of
from smollm.hf.families import FAMILIES

CASES = {
    "llama": ("llama", {}),
    "llama-as-3.1": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-head-width": ("mistral", {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", MIXED),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-windows": ("qwen3", MIXED | {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0]}),
    "smollm3-windows": ("smollm3", MIXED | {"no_rope_layers": [0, 1, 1]}),
    "olmo2": ("olmo2", {}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "exaone4-hybrid": ("exaone4", HYBRID),
    "glm4": ("glm4", {"head_dim": 8, "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": 5, "rope_parameters": HALF}),
    "deepseek": ("deepseek_v3", LATENT),
    "deepseek-q-latent": ("deepseek_v3", LATENT | {"q_lora_rank": 20, "attention_bias": True}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=str)
def checkpoint(request, tmp_path_factory):
    """A checkpoint's folder, and transformers' model."""
    model_type, changes = CASES[request.param]
    theirs = their_model(model_type, **changes)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return folder, theirs


def test_logits_and_gradients_are_those_of_transformers(checkpoint):
    folder, theirs = checkpoint
    ours = from_hf(folder)
    ids = torch.randint(97, (2, 21), generator=torch.Generator().manual_seed(1))
    out, expected = ours(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(out["logits"], expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["loss"], expected.loss, atol=1e-6, rtol=1e-6)

    out["loss"].backward()
    theirs.zero_grad()
    expected.loss.backward()
    family = FAMILIES[theirs.config.model_type]
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    mapped = family.to_theirs(facts_of(ours), gradients)
    own = {name: p.grad for name, p in theirs.named_parameters()}
    assert mapped.keys() == own.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(mapped[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_a_round_trip_changes_no_bit(checkpoint, tmp_path):
    folder, theirs = checkpoint
    assert save_hf(from_hf(folder), tmp_path / "back") == type(theirs).__name__
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    states = back.state_dict(), theirs.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, weight in states[1].items():
        assert torch.equal(states[0][name], weight), name
    ids = torch.arange(20)[None]
    assert torch.equal(
        back(ids).logits, transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    )


def test_padded_prompts_continue_with_the_same_tokens(checkpoint):
    folder, theirs = checkpoint
    ids = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert torch.equal(from_hf(folder).generate(ids, 10, attention_mask=mask), expected)


def test_thirty_layers_give_the_same(tmp_path):
    """SmolLM2's depth, heads and theta, at a quarter of its width."""
    shape = {
        "hidden_size": 144,
        "intermediate_size": 384,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
        "initializer_range": 144**-0.5,
    }
    config = transformers.LlamaConfig(**SHAPE | shape)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = from_hf(tmp_path), torch.arange(40)[None]
    assert ours.count_parameters() == theirs.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)["logits"], theirs(ids).logits, atol=1e-5, rtol=1e-5)
