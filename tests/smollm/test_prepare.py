"""Documents become corpora: of hub and local files, by tokenizers that spell them."""

import json
import re
import shutil
import subprocess
import sys

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models

from smollm.data import (
    Corpus,
    HubDataset,
    LocalFiles,
    hub,
    load_corpus,
    prepare_corpus,
    tokenizer,
)
from smollm.data.__main__ import main
from smollm.data.shards import open_shard
from smollm.data.tokenise import is_held_out

SMOLLM = HubDataset.smollm("fineweb-edu-dedup", 2)


def test_parquet_becomes_shards(parquet, prepare_mine, tmp_path):
    folder = prepare_mine(tmp_path, shard_tokens=5000)
    corpus = Corpus(folder)
    assert corpus.documents == 1200 and corpus.name == "mine"
    trained = sorted(folder.glob("train_*.bin"))
    assert len(trained) > 2
    assert all(len(open_shard(path)) == 5000 for path in trained[:-1])
    texts = [t for path in parquet for t in datasets.Dataset.from_parquet(str(path))["text"]]
    ids = np.concatenate(corpus.train._shards).tolist()
    decoded = corpus.tokenizer.decode(ids, skip_special_tokens=False).split("<|endoftext|>")[:-1]
    held = [t for t in texts if is_held_out(t, 0.005)]
    assert decoded == [t for t in texts if t not in held] and 0 < len(held) < 30
    asked = json.loads((folder / "corpus.json").read_text())["request"]
    assert asked["source"]["paths"] == [str(path) for path in parquet]
    assert (asked["held_out"], asked["max_documents"]) == (0.005, None)
    assert load_corpus("auto", tmp_path).name == "mine"
    assert load_corpus("mine", tmp_path).sha256 == corpus.sha256


def test_a_larger_share_holds_out_more_of_the_same(prepare_mine, tmp_path):
    held = {}
    for share in (0.01, 0.1, 0.5):
        corpus = Corpus(prepare_mine(tmp_path, f"held-{share}", held_out=share))
        ids = np.concatenate(corpus.val._shards)
        held[share] = {tuple(d) for d in np.split(ids, np.flatnonzero(ids == corpus.eos_id) + 1)}
        assert abs(len(held[share]) - 1200 * share) < 5 * (1200 * share) ** 0.5
    assert held[0.01] < held[0.1] < held[0.5]


def test_a_tokenizer_cuts_pads_and_adds_nothing(corpus, tmp_path):
    """Neither settings saved in tokenizer.json nor a document's text bend the token stream."""
    from tokenizers import Tokenizer, processors

    loaded = Tokenizer.from_str(corpus.tokenizer.to_str())
    loaded.enable_truncation(4)
    loaded.enable_padding(length=64)
    loaded.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", corpus.eos_id)]
    )
    loaded.encode_special_tokens = False
    loaded.save(str(tmp_path / "tokenizer.json"))
    texts = [f"document {n} says <|endoftext|> and goes on for a while" for n in range(500)]
    path = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict({"text": [*texts, None, ""]}).to_parquet(path)
    folder = prepare_corpus(
        "odd", LocalFiles([path]), tmp_path / "d", tokenizer=str(tmp_path / "tokenizer.json")
    )
    prepared = Corpus(folder)
    ids = np.concatenate([open_shard(s) for s in folder.glob("*.bin")])
    assert prepared.documents == len(texts)
    assert np.sum(ids == prepared.eos_id) == len(texts)
    assert prepared.tokenizer.decode(ids.tolist()).count("goes on for a while") == len(texts)


def test_without_a_network_the_offline_choice_is_named(tokenizer_file, tmp_path, monkeypatch):
    def offline(*arguments, **keywords):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "reach_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ConnectionError, match=re.escape("`python train.py` trains on its built-in")
    ):
        prepare_corpus("fineweb-edu-dedup", SMOLLM, tmp_path, tokenizer=tokenizer_file)
    assert list(tmp_path.iterdir()) == []


def test_the_hub_files_asked_for(tokenizer_file, tmp_path, monkeypatch):
    asked = {}

    def load(source, data_files, split, streaming):
        asked.update(source=source, files=data_files["train"])
        return [{"text": f"document {i}"} for i in range(900)]

    monkeypatch.setattr(hub, "reach_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare_corpus("fineweb-edu-dedup", SMOLLM, tmp_path, tokenizer=tokenizer_file)
    assert asked == {
        "source": "HuggingFaceTB/smollm-corpus",
        "files": [
            "fineweb-edu-dedup/train-00000-of-00234.parquet",
            "fineweb-edu-dedup/train-00001-of-00234.parquet",
        ],
    }


def word_level(path, words):
    """A tokenizer.json that is no byte-level BPE."""
    Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])).save(
        str(path)
    )
    return str(path)


def test_refusals(parquet, tokenizer_file, tmp_path):
    root = tmp_path / "data"
    refusals = [
        ({"tokenizer": word_level(tmp_path / "a", ["a"])}, "a token <|endoftext|>, got none"),
        ({"tokenizer": word_level(tmp_path / "b", ["<|endoftext|>"])}, "to be a special token"),
        ({"tokenizer": str(parquet[0])}, "tokenizer: expected a tokenizer.json, got"),
        ({"tokenizer": str(tmp_path)}, "tokenizer: expected a tokenizer.json, got"),
        ({"tokenizer": ""}, "tokenizer: expected a tokenizer.json, got"),
        ({"name": "fineweb-edu-dedup"}, "corpus: expected a name of its own for data_files"),
        ({"name": "fineweb-edu-dedup", "source": HubDataset("a/b")}, "or dataset, got 'fineweb"),
        ({"source": HubDataset("a/b/c")}, "dataset: expected OWNER/NAME of the hub, got 'a/b/c'"),
        ({"source": HubDataset("../a")}, "dataset: expected OWNER/NAME of the hub, got '../a'"),
        ({"max_documents": 0}, "max_documents: expected >= 1, got 0"),
        ({"shard_tokens": 0}, "shard_tokens: expected 1 to"),
        ({"shard_tokens": 2**31}, "shard_tokens: expected 1 to"),
        *(
            ({"held_out": x}, f"held_out: expected a share between 0 and 1, got {x}")
            for x in (0, 1, -0.1, 2, float("nan"))
        ),
    ]
    usual = {"name": "mine", "source": LocalFiles(parquet), "tokenizer": tokenizer_file}
    for keywords, text in refusals:
        with pytest.raises(ValueError, match=re.escape(text)):
            prepare_corpus(root=root, **usual | keywords)
    assert not root.exists()


@pytest.mark.parametrize(
    "source", ["no.json", "./no", "../no/where", "a/b/c", "/no/such", "~/no", "{here}/no", "x y"]
)
def test_a_missing_tokenizer_is_said_at_once(prepare_mine, tmp_path, monkeypatch, source):
    monkeypatch.setattr(tokenizer, "reach_hub", lambda: pytest.fail("asked the hub"))
    source = source.format(here=tmp_path)
    with pytest.raises(FileNotFoundError, match=f"got {re.escape(repr(source))}, no such file"):
        prepare_mine(tmp_path / "data", tokenizer=source)
    assert not (tmp_path / "data").exists()


def test_a_model_that_the_hub_lacks(prepare_mine, tmp_path, monkeypatch):
    def lacks(*arguments):
        raise RuntimeError("404")

    monkeypatch.setattr(tokenizer, "reach_hub", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lacks)
    for source in ("some/model", "gpt2"):
        with pytest.raises(ConnectionError, match=f"tokenizer: '{source}' could not be loaded"):
            prepare_mine(tmp_path / "data", tokenizer=source)


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_the_kinds_of_text_columns(tokenizer_file, tmp_path):
    texts = [f"document {i}" for i in range(900)]
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    for number, kind in enumerate([*kinds, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]):
        column = pyarrow.array([*texts, None, ""]).cast(kind)
        path = write_parquet(tmp_path / "x.parquet", {"id": range(902), "text": column})
        folder = prepare_corpus(
            f"kind{number}", LocalFiles([path]), tmp_path, tokenizer=tokenizer_file
        )
        assert Corpus(folder).documents == 900


NO_TEXTS = {
    "other columns": ({"words": ["a"], "id": [1]}, "one column 'text', got ['words', 'id'] in"),
    "integers": ({"text": [1, 2]}, "strings in column 'text', got int64 in"),
    "lists": ({"text": [["a"], ["b"]]}, "strings in column 'text', got list<"),
    "structs": ({"text": [{"a": "b"}]}, "strings in column 'text', got struct<"),
    "bytes": ({"text": [b"a"]}, "strings in column 'text', got binary in"),
    "nulls": ({"text": [None, None]}, "strings in column 'text', got null in"),
    "no rows": ({"text": pyarrow.array([], pyarrow.string())}, "documents, got none in"),
}


@pytest.mark.parametrize(("columns", "text"), NO_TEXTS.values(), ids=NO_TEXTS)
def test_parquet_without_text_is_refused(parquet, prepare_mine, tmp_path, columns, text):
    path = write_parquet(tmp_path / "x.parquet", columns)
    files = [path] if text.startswith("documents") else [*parquet, path]
    with pytest.raises(ValueError, match=re.escape(f"data_files: expected {text}")) as caught:
        prepare_mine(tmp_path / "data", data_files=files)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_what_is_no_parquet_file_is_refused(parquet, prepare_mine, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no parquet at all, though long enough to be one" * 9)
    whole = parquet[0].read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-100])
    for name in ("empty", "text", "cut"):
        with pytest.raises(ValueError, match=re.escape(f"parquet file, got {tmp_path / name}: ")):
            prepare_mine(tmp_path / "data", data_files=[*parquet, tmp_path / name])
    for path in (tmp_path, tmp_path / "no.parquet"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"parquet file, got '{path}'")):
            prepare_mine(tmp_path / "data", data_files=[*parquet, path])
    (tmp_path / "damaged").write_bytes(
        whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]
    )
    with pytest.raises(ValueError, match=re.escape(f"parquet file, got {tmp_path / 'damaged'}: ")):
        prepare_mine(tmp_path / "data", data_files=[*parquet, tmp_path / "damaged"])
    assert not (tmp_path / "data").exists()


def test_text_that_is_not_utf8_is_refused(prepare_mine, tmp_path):
    column = pyarrow.array([b"ok", b"\xff\xfe"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "latin.parquet", {"text": column})
    with pytest.raises(ValueError, match=re.escape(f"got {path}: 'utf-8' codec can't decode")):
        prepare_mine(tmp_path / "data", data_files=[path])


@pytest.mark.parametrize(
    "name",
    ["a[0-9].parquet", "*.parquet", "?", "zip:::x.parquet", "a b", "{x}", "ü", "-x", ".txt"],
)
def test_names_of_data_files_are_taken_literally(parquet, prepare_mine, tmp_path, name):
    shutil.copy(parquet[0], tmp_path / "a1.parquet")
    shutil.copy(parquet[1], tmp_path / name)
    prepared = Corpus(prepare_mine(tmp_path / "data", data_files=[tmp_path / name]))
    assert prepared.documents == 600
    ids = np.concatenate(prepared.train._shards).tolist()
    assert "document 1-" in prepared.tokenizer.decode(ids[:20])


def test_too_few_documents_to_hold_some_out(tokenizer_file, tmp_path):
    path = write_parquet(tmp_path / "one.parquet", {"text": ["only one"]})
    with pytest.raises(ValueError, match="expected enough documents to hold some out, got 1"):
        prepare_corpus("one", LocalFiles([path]), tmp_path / "d", tokenizer=tokenizer_file)
    assert not (tmp_path / "d").exists()


def test_command_line(parquet, tokenizer_file, tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    files = ["--data-files", *map(str, parquet), "--tokenizer", tokenizer_file]
    assert main([*root, "--corpus", "mine", *files]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(
        r".*mine: [\d,]+ training and [\d,]+ validation tokens of 1,200 documents, sha256 \w{12}\n",
        said.out,
    )
    assert said.err == ""
    command = [sys.executable, "-m", "smollm.data", *root, "--corpus", "builtin2"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("smollm.data: corpus: expected one of")
    assert failed.stderr.count("\n") == 1


def test_the_command_refuses_in_one_line(parquet, tokenizer_file, tmp_path, capsys):
    shared = ["--root", str(tmp_path / "data"), "--tokenizer", tokenizer_file]
    files = ["--data-files", str(parquet[0])]
    refusals = [
        ([*shared, *files], "corpus: expected a name of its own for data_files or dataset, got"),
        ([*shared, "--shards", "0"], "shards: expected 1 to 234 of fineweb-edu-dedup, got 0"),
        ([*shared, "--corpus", "wiki"], "corpus: expected one of ['fineweb-edu-dedup', "),
        ([*shared, "--subset", "x"], "subset: expected a dataset beside it, got none"),
        ([*shared, "--text-column", "x"], "text_column: expected a dataset beside it, got none"),
        ([*shared, "--separator", "x"], "separator: expected data_files to divide, got 'x'"),
        ([*shared, *files, "--dataset", "a/b"], "dataset: expected none beside data_files, got"),
        ([*shared, *files, "--split", "x"], "split: expected none beside data_files, got 'x'"),
        ([*shared, "--corpus", "cosmopedia-v2", *files], "corpus: expected a name of its own"),
        ([*shared, "--corpus", "builtin", *files], "corpus: expected 'builtin' with --root alone"),
        (
            [*shared, "--corpus", "builtin-code", "--max-documents", "5"],
            "corpus: expected 'builtin-code' with --root alone",
        ),
        ([*shared, "--corpus", "auto", *files], "corpus: expected a name other than"),
        ([*shared, "--corpus", "x", "--data-files", str(tmp_path)], "data_files: expected a parq"),
    ]
    for flags, text in refusals:
        assert main(flags) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"smollm.data: {text}") and said.err.count("\n") == 1
        assert said.out == ""
    assert not (tmp_path / "data").exists()
