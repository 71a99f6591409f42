"""Checkpoints of transformers as files: what is refused, and what comes along."""

import json
from copy import deepcopy

import pytest
import torch
import transformers
from hf_cases import LATENT, LLAMA3, MIXED, SHAPE, their_model
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from smollm import (
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
    create_smollm_with_attention,
)
from smollm.attention.scaling import Llama3Scaling
from smollm.hf import from_hf, save_hf


@pytest.mark.parametrize(
    ("model_type", "changes", "text"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: expected silu, got gelu"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout: expected 0, got 0.1"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
            "rope_parameters: expected rope_type default or llama3, got linear",
        ),
        (
            "qwen2",
            MIXED | {"layer_types": ["chunked_attention", *MIXED["layer_types"][1:]]},
            "layer_types: expected full_attention or sliding_attention, got chunked_attention",
        ),
        (
            "deepseek_v3",
            LATENT | {"first_k_dense_replace": 1},
            "first_k_dense_replace: expected num_hidden_layers=3, got experts",
        ),
        ("gemma2", {}, "model_type: expected one of llama, .*, got gemma2"),
        (
            "llama",
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quantization_config: expected no such field, which this library lacks",
        ),
    ],
)
def test_what_a_checkpoint_needs_and_we_lack_is_refused_by_field(
    model_type, changes, text, tmp_path
):
    config = transformers.AutoConfig.for_model(model_type, **deepcopy(SHAPE)).to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=text):
        from_hf(tmp_path)


def llama(tmp_path, change=lambda weights: None):
    """A checkpoint's folder with weights that `change` has changed."""
    theirs = their_model("llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


LAST = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop(LAST), f"{LAST}: expected a weight for \\[32, 48\\], got none"),
        (
            lambda w: w.update({LAST: torch.zeros(32, 47)}),
            f"{LAST}: expected a weight for \\[32, 48\\], got \\[32, 47\\]",
        ),
        (
            lambda w: w.update({LAST: torch.zeros(33, 48)}),
            f"{LAST}: expected no such weight, or fewer rows, got \\[33, 48\\]",
        ),
        (
            lambda w: w.update(other=torch.zeros(1)),
            "other: expected no such weight, or fewer rows, got \\[1\\]",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(97, 32)}),
            "lm_head.weight: expected none, or model.embed_tokens.weight's, with tie_word_emb",
        ),
        (
            lambda w: w.update({LAST: w[LAST].half()}),
            "dtype: expected one for weights of 2 types, got None",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        from_hf(llama(tmp_path, change))


def test_a_tied_head_may_be_stored_twice(tmp_path):
    def with_head(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    model = from_hf(llama(tmp_path, with_head), dtype=torch.float64)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.embed_tokens.weight.dtype == torch.float64


def test_weights_in_several_files(tmp_path):
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    ids = torch.arange(9)[None]
    torch.testing.assert_close(from_hf(tmp_path)(ids)["logits"], theirs(ids).logits)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"path: expected model-.*-of-.* in it"):
        from_hf(tmp_path)


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: expected a folder with a config.json"):
        from_hf(tmp_path / "nowhere")
    llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model.safetensors: expected safetensors, got"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config.json: expected a model's config, got"):
        from_hf(tmp_path)


def model_of(*prototypes, **shape):
    return create_smollm_with_attention(
        list(prototypes), vocab_size=300, embed_dim=32, num_layers=len(prototypes),
        ffn_hidden_dim=48, max_seq_len=64, **shape,
    )  # fmt: skip


def mha(**settings):
    return MultiHeadAttention(32, 4, bias=False, **settings)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            lambda: model_of(MultiHeadGeneticAttention(32, 4, 8)),
            "expected a mechanism of transformers: MHA, GQA or MLA, got MultiHeadGeneticAttention",
        ),
        (
            lambda: model_of(mha(), MultiHeadLatentAttention(32, 4, 16, 8, bias=False)),
            "expected layers that differ in windows and in whether they rotate alone, got ",
        ),
        (
            lambda: model_of(mha(), mha(rope_theta=77.0)),
            "expected layers that differ in windows and .*rotation .*theta=77.0",
        ),
        (
            lambda: model_of(mha(), norm_strategy="post"),
            "the nearest is Exaone4ForCausalLM with qk_norm=rms instead of False",
        ),
        (lambda: model_of(mha(sinks=True)), "LlamaForCausalLM with sinks=False instead of True"),
        (
            lambda: model_of(mha(qk_norm="rms", norm_eps=1e-3)),
            r"norm_eps: expected one for all norms, got \[1e-05, 0.001\]",
        ),
    ],
)
def test_models_that_no_architecture_carries_are_refused_with_the_reason(model, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        save_hf(model(), tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_only_a_new_or_empty_folder_is_written_to(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="path: expected a folder that is new or empty"):
        save_hf(model_of(mha()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    save_hf(model_of(mha()), tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def bytes_alone():
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["no text"], vocab_size=260, special_tokens=["<|endoftext|>"])
    return Tokenizer.from_str(tokenizer.to_str())


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = bytes_alone()
    save_hf(model_of(mha()), tmp_path / "new", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    text = " All of it, 1 \u00fc.\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(tokenizer.encode(text).ids) == text
    config = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    end = tokenizer.token_to_id("<|endoftext|>")
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == end
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (end, end, None)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "new")
    assert generation.bos_token_id == generation.eos_token_id == generation.pad_token_id == end
    with pytest.raises(ValueError, match="tokenizer: expected at most the model's 97 ids, got 2"):
        save_hf(from_hf(llama(tmp_path)), tmp_path / "other", tokenizer=tokenizer)


def test_a_tokenizer_that_would_be_read_as_another_is_refused(tmp_path):
    """Beside a Qwen2 transformers 5 makes every tokenizer split text as Qwen2's."""
    model = model_of(MultiHeadAttention(32, 4, bias="qkv"))
    assert save_hf(model, tmp_path / "bare") == "Qwen2ForCausalLM"
    text = (
        "tokenizer: expected one that transformers keeps as it is beside Qwen2ForCausalLM, got one "
        "of which it replaces normalizer, pre_tokenizer"
    )
    with pytest.raises(ValueError, match=f"^{text}"):
        save_hf(model, tmp_path / "new", tokenizer=bytes_alone())
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_older_readers_find_the_fields_by_their_older_names(tmp_path):
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 16)
    model = model_of(mha(rope_theta=500.0, rope_scaling=scaling))
    save_hf(model, tmp_path / "new", tokenizer=bytes_alone())
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["torch_dtype"] == "float32"
    assert config["rope_scaling"] == {name: x for name, x in LLAMA3.items() if name != "rope_theta"}
    tokenizer = json.loads((tmp_path / "new/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
