"""Tokenizers that corpora are made with: those that spell every document, and the refused ones."""

import json
import re

import datasets
import huggingface_hub
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from smollm.data import (
    Corpus,
    LocalFiles,
    prepare_corpus,
    tokenizer,
)


def byte_level(path, entries, *, special=True):
    """A byte-level BPE of 256 bytes and no merges, filled up to a number of entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"filler{i}" for i in range(entries - 257))]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken("<|endoftext|>", special=special)])
    made.save(str(path))
    return str(path)


def test_the_largest_vocabulary_is_that_of_uint16(prepare_mine, tmp_path):
    path = tmp_path / "tokenizer.json"
    prepared = Corpus(prepare_mine(tmp_path, tokenizer=byte_level(path, 65_536)))
    assert prepared.vocab_size == 65_536 and prepared.eos_id == 65_535
    assert sum((s == 65_535).sum() for s in prepared.train._shards) > 1000
    with pytest.raises(ValueError, match=re.escape("at most 65536 (uint16), got 65537")):
        prepare_mine(tmp_path, "more", tokenizer=byte_level(path, 65_537))
    assert not (tmp_path / "more").exists()


def test_an_end_that_text_can_spell_is_refused(prepare_mine, tmp_path):
    path = byte_level(tmp_path / "tokenizer.json", 300, special=False)
    with pytest.raises(ValueError, match=re.escape("<|endoftext|> to be a special token")):
        prepare_mine(tmp_path, tokenizer=path)


def with_end(path, end):
    """A byte-level tokenizer.json whose special tokens are `end` and <pad>."""
    made = Tokenizer.from_file(byte_level(path, 300, special=False))
    content = json.loads(made.to_str())
    content["added_tokens"] = []
    made = Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens([end, "<pad>"])
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize("form", [lambda end: end, lambda end: {"content": end, "lstrip": False}])
def test_a_tokenizers_own_end_ends_documents(prepare_mine, tmp_path, form):
    source = with_end(tmp_path / "tokenizer.json", "</s>")
    with pytest.raises(ValueError, match=re.escape("a token <|endoftext|>, got none; --eos-token")):
        prepare_mine(tmp_path, tokenizer=source)
    given = Corpus(prepare_mine(tmp_path, "given", tokenizer=source, eos_token="</s>"))
    config = {"eos_token": form("</s>"), "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = Corpus(prepare_mine(tmp_path, "found", tokenizer=source))
    assert given.sha256 == found.sha256 and given.eos_id == found.eos_id
    assert found.tokenizer.id_to_token(found.eos_id) == "</s>"
    assert found.token_bytes[found.eos_id] == 0
    ends = sum((s == found.eos_id).sum() for w in (found.train, found.val) for s in w._shards)
    assert ends == 1200
    other = Corpus(prepare_mine(tmp_path, "other", tokenizer=source, eos_token="<pad>"))
    assert other.eos_id != found.eos_id and other.sha256 != found.sha256
    for token, said in (("</x>", "a token </x>, got none"), ("a", "a to be a special token")):
        with pytest.raises(ValueError, match=f"tokenizer: expected {said}"):
            prepare_mine(tmp_path, "no", tokenizer=source, eos_token=token)


@pytest.mark.parametrize("content", ["[", "[]", "{}", '{"eos_token": null}', '{"eos_token": {}}'])
def test_an_odd_tokenizer_config_names_no_end(prepare_mine, tmp_path, content):
    source = with_end(tmp_path / "tokenizer.json", "</s>")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(
        ValueError, match=re.escape("special tokens to end documents with: ['</s>'")
    ):
        prepare_mine(tmp_path, tokenizer=source)


def test_a_models_files_come_from_the_hub(prepare_mine, tmp_path, monkeypatch):
    with_end(tmp_path / "tokenizer.json", "</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    monkeypatch.setattr(tokenizer, "reach_hub", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, file: tmp_path / file)
    prepared = Corpus(prepare_mine(tmp_path, tokenizer="some/model"))
    assert prepared.tokenizer.id_to_token(prepared.eos_id) == "</s>"


def test_bytes_as_a_fallback_are_no_byte_level(prepare_mine, tmp_path):
    made = Tokenizer(models.BPE({"a": 0, "</s>": 1}, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    source = str(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="expected a byte-level BPE, got another decoder"):
        prepare_mine(tmp_path, tokenizer=source, eos_token="</s>")


TEXT = "Ünïcode  \ttext, <tool> and q: \ufb01ne A\u030a\r\n 日本 \x00 <|endoftext|> end "


def without_q(made, unknown=None):
    content = json.loads(made.to_str())
    del content["model"]["vocab"]["q"]
    content["model"]["unk_token"] = unknown
    return Tokenizer.from_str(json.dumps(content))


SPELLINGS = {
    "plain": (lambda t: None, True),
    "added": (lambda t: t.add_tokens(["<tool>", AddedToken("日本", normalized=False)]), True),
    "added special": (lambda t: t.add_special_tokens(["<tool>"]), True),
    "NFC": (lambda t: setattr(t, "normalizer", normalizers.NFC()), False),
    "lower case": (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), False),
    "strip": (lambda t: setattr(t, "normalizer", normalizers.Strip()), False),
    "same length": (lambda t: setattr(t, "normalizer", normalizers.Replace("x", "y")), False),
    "prefix space": (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        False,
    ),
    "spaces removed": (
        lambda t: setattr(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), t.pre_tokenizer]),
        ),
        False,
    ),
    "lstrip": (lambda t: t.add_tokens([AddedToken("<tool>", lstrip=True)]), False),
    "rstrip": (lambda t: t.add_tokens([AddedToken("<tool>", rstrip=True)]), False),
    "dropped": (without_q, False),
    "unknown": (lambda t: without_q(t, "filler3"), False),
}


@pytest.mark.parametrize(("change", "fits"), SPELLINGS.values(), ids=SPELLINGS)
def test_tokens_must_spell_every_document(tmp_path, change, fits):
    made = Tokenizer.from_file(byte_level(tmp_path / "tokenizer.json", 300))
    changed = change(made)
    changed = changed if isinstance(changed, Tokenizer) else made
    changed.save(str(tmp_path / "tokenizer.json"))
    texts = [*(f"plain words {i}" for i in range(900)), TEXT]
    path = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)

    def prepared():
        source = str(tmp_path / "tokenizer.json")
        return Corpus(prepare_corpus("it", LocalFiles([path]), tmp_path, tokenizer=source))

    if fits:
        corpus = prepared()
        shards = (s for split in (corpus.train, corpus.val) for s in split._shards)
        size = sum(int(corpus.token_bytes[s.astype(np.int64)].sum()) for s in shards)
        assert size == sum(len(text.encode()) for text in texts)
    else:
        with pytest.raises(ValueError, match="tokens that spell every document byte for byte"):
            prepared()
        assert not (tmp_path / "it").exists()
