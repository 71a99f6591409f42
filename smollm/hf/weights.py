"""Checkpoints of transformers, in and out."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from smollm.data.tokenizer import END_OF_TEXT, end_of_text, vocab_size
from smollm.files import new_folder, write_json
from smollm.hf.facts import Facts, build, facts_of, refusal
from smollm.hf.families import FAMILIES, Family
from smollm.hf.library import load_transformers
from smollm.model import SmolLM

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def from_hf(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> SmolLM:
    """The model of a checkpoint's folder, as transformers writes it.

    Its architecture is one of Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo 2, EXAONE 4, GLM-4, Phi-3
    and DeepSeek-V3 without experts. Logits are transformers' own.

    Args:
        path: the folder: config.json, and weights in safetensors.
        dtype: of the weights. Default: as they are stored.
        device: of the weights. Default CPU.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or no config.json or safetensors in it.
        ValueError: a checkpoint that needs what this library lacks; the text names the field.
        ImportError: transformers is not installed.
    """
    folder = Path(path)
    family, config = _read_config(folder)
    facts = family.facts(config)
    weights = _read_weights(folder)
    if facts.tie_embeddings:
        _drop_tied(weights)
    with torch.device("meta"):
        model = build(facts)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    ours = family.to_ours(facts, weights, shapes)
    types = {weight.dtype for weight in ours.values()}
    if dtype is None and len(types) > 1:
        raise refusal("dtype", f"one for weights of {len(types)} types", None)
    model.load_state_dict(
        {name: weight.to(device, dtype).contiguous() for name, weight in ours.items()}, assign=True
    )
    return model.eval()


def save_hf(
    model: SmolLM,
    path: Path | str,
    *,
    tokenizer: Tokenizer | None = None,
    eos_token: str = END_OF_TEXT,
) -> str:
    """Write a checkpoint that transformers, and what builds on it, loads.

    Of the architectures that `from_hf` reads it is the first that carries the model.

    Args:
        model: the model; dropout, of training alone, is not carried.
        path: folder to write, which must not exist or be empty.
        tokenizer: to save beside the weights. Default none.
        eos_token: what ends its documents. Default <|endoftext|>.

    Returns:
        The architecture, as "LlamaForCausalLM".

    Raises:
        FileExistsError: the folder holds something.
        ValueError: no architecture carries the model, or the tokenizer does not fit it; the text
            says why.
        ImportError: transformers is not installed.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"path: expected a folder that is new or empty, got {folder}")
    facts = facts_of(model)
    eos = None if tokenizer is None else _end_of(tokenizer, eos_token, facts)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), eos)
    family, config = _carrier(facts, ids | {"pad_token_id": None})  # named there, it learns no more
    weights = family.to_theirs(facts, model.state_dict())
    config.architectures, config.dtype = [family.architecture], model.embed_tokens.weight.dtype
    with new_folder(folder) as staged:
        write_json(staged / CONFIG, _readable_by_all(json.loads(config.to_json_string())))
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(contiguous, staged / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            _save_tokenizer(staged, tokenizer, eos_token, facts)
            _check_tokenizer(staged, tokenizer, family)
            generation = load_transformers().GenerationConfig(**ids, pad_token_id=eos)
            generation.save_pretrained(staged)
    return family.architecture


def _read_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The folder's architecture, and all fields of its config that transformers knows."""
    transformers = load_transformers()
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"path: expected a folder with a {CONFIG}, got {folder}")
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: expected a model's config, got {error}") from error
    if model_type not in FAMILIES:
        raise refusal("model_type", f"one of {', '.join(FAMILIES)}", model_type)
    return FAMILIES[model_type], _fields(transformers.AutoConfig.from_pretrained(folder))


def _fields(config: Any) -> dict[str, Any]:
    """What its architecture reads; transformers keeps, and ignores, whatever else a file holds."""
    of_any = load_transformers().PreTrainedConfig().to_dict()
    read = type(config)().to_dict().keys() | {"head_dim", "quantization_config"}
    return {
        name: value
        for name, value in config.to_dict().items()
        if name in read and name not in of_any
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index, files = folder / INDEX, {WEIGHTS}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    weights: dict[str, Tensor] = {}
    for file in sorted(files):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"path: expected {file} in it, got {folder} without")
        try:
            weights |= load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: expected safetensors, got {error}") from error
    tables = "rotary_emb.inv_freq"  # older checkpoints hold what follows from the config
    return {name: weight for name, weight in weights.items() if not name.endswith(tables)}


def _drop_tied(weights: dict[str, Tensor]) -> None:
    head, embedding = weights.pop(HEAD, None), weights.get(EMBEDDING)
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise refusal(HEAD, f"none, or {EMBEDDING}'s, with tie_word_embeddings", "another")


def _carrier(facts: Facts, ids: dict[str, int | None]) -> tuple[Family, Any]:
    """The first architecture that carries a model, and its config."""
    from huggingface_hub.errors import StrictDataclassError

    classes = load_transformers().CONFIG_MAPPING
    lacking: list[tuple[int, str]] = []
    for family in FAMILIES.values():
        if family.latent != (facts.latent_dim is not None):
            continue
        try:
            config = classes[family.model_type](**family.config(facts), **ids)
            carried = family.facts(_fields(config))
        except (ValueError, StrictDataclassError) as error:
            lacking.append((len(fields(facts)), f"{family.architecture}: {error}"))
            continue
        if carried == facts:
            return family, config
        other = facts.differences(carried)
        lacking.append((len(other), f"{family.architecture} with {', '.join(other)}"))
    raise ValueError(
        "model: expected one that an architecture of transformers carries, the nearest is "
        f"{min(lacking)[1]}"
    )


def _readable_by_all(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the names that its fields had before transformers 5, too."""
    rope = config["rope_parameters"]
    older = {"torch_dtype": config["dtype"], "rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {name: x for name, x in rope.items() if name != "rope_theta"}
    return config | older


def _end_of(tokenizer: Tokenizer, eos_token: str, facts: Facts) -> int:
    if (size := vocab_size(tokenizer)) > facts.vocab_size:
        raise refusal("tokenizer", f"at most the model's {facts.vocab_size} ids", size)
    return end_of_text(tokenizer, eos_token)


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, eos_token: str, facts: Facts) -> None:
    load_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=eos_token,
        eos_token=eos_token,
        pad_token=eos_token,
        model_max_length=facts.max_seq_len,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    older = {"tokenizer_class": "PreTrainedTokenizerFast"}  # its name before transformers 5, too
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | older)


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, family: Family) -> None:
    """Refuse one that transformers makes another of, as it does beside some architectures."""
    theirs = load_transformers().AutoTokenizer.from_pretrained(folder).backend_tokenizer
    ours, read = (json.loads(x.to_str()) for x in (tokenizer, theirs))
    parts = ("normalizer", "pre_tokenizer", "model", "decoder")
    if other := [part for part in parts if ours[part] != read[part]]:
        raise refusal(
            "tokenizer",
            f"one that transformers keeps as it is beside {family.architecture}",
            f"one of which it replaces {', '.join(other)}",
        )
