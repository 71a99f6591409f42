"""A corpus opens as it was prepared, or says which file is not and what to do."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from smollm.data import Corpus, corpus, load_corpus


@pytest.fixture(scope="module")
def prepared(prepare_mine, tmp_path_factory):
    return prepare_mine(tmp_path_factory.mktemp("prepared"), shard_tokens=5000)


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "mine")


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        Corpus(folder)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def again(folder, flag=" --replace"):
    return (
        f"prepare it again with `python -m smollm.data --corpus mine --root {folder.parent}{flag}`"
    )


NO_JSON = {
    "empty": (b"", "expected JSON, got Expecting value"),
    "cut": (b'{"name": "mine", "sha', "expected JSON, got Unterminated string"),
    "binary": (b"\xff\x00", "expected JSON, got 'utf-8' codec"),
    "deep": (b"[" * 200_000, "expected JSON, got maximum recursion depth"),
    "list": (b"[1]", "expected a JSON object, got [1]"),
    "null": (b"null", "expected a JSON object, got None"),
    "text": (b'"mine"', "expected a JSON object, got 'mine'"),
    "empty object": (b"{}", "format: expected 2, got None"),
}


@pytest.mark.parametrize(("content", "text"), NO_JSON.values(), ids=NO_JSON)
def test_a_malformed_corpus_json_is_refused(folder, content, text):
    (folder / "corpus.json").write_bytes(content)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'corpus.json'}: corrupt corpus: {text}")
    assert said.endswith(f"move {folder} away and {again(folder, '')}")


FIELDS = ("format", "name", "sha256", "vocab_size", "eos_id", "documents", "train_tokens",
          "val_tokens", "files")  # fmt: skip


WRONG = (None, True, -1, 1.5, "odd", [], {}, {"a": "b"}, 10**30)
ALLOWED = (("name", "odd"), ("python", "odd"), ("documents", 10**30), ("request", {}),
           ("request", {"a": "b"}))  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [(f, v) for f in (*FIELDS, "python", "request") for v in WRONG if (f, v) not in ALLOWED],
)
def test_a_field_of_another_type_is_refused(folder, field, value):
    path = folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    said = refusal(folder)
    assert said.startswith(f"{path}: corrupt corpus: ") and field in said
    assert "prepare it again with `" in said


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_refused(folder, field):
    path = folder / "corpus.json"
    about = json.loads(path.read_text())
    del about[field]
    path.write_text(json.dumps(about))
    said = refusal(folder)
    wanted = "expected digests of its files" if field == "format" else field
    assert said.startswith(f"{path}: corrupt corpus: {wanted}") and "prepare it again" in said


def test_another_end_token_than_that_of_the_shards_is_refused(folder):
    path = folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_id": 5}))
    said = refusal(folder)
    assert said.startswith(f"{path}: corrupt corpus: expected vocab_size, eos_id,")


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "corpus.json", "train_0.bin", ""])
def test_only_parts_of_a_corpus_are_listed(folder, name):
    path = folder / "corpus.json"
    about = json.loads(path.read_text())
    about["files"][name] = "0" * 64
    path.write_text(json.dumps(about))
    assert "files: expected tokenizer.json and shards, got" in refusal(folder)


def test_a_corpus_of_the_earlier_format_is_to_be_prepared_again(folder, prepare_mine):
    about = json.loads((folder / "corpus.json").read_text())
    del about["format"], about["files"]
    (folder / "corpus.json").write_text(json.dumps(about))
    said = refusal(folder)
    assert "expected digests of its files, got an earlier version's corpus" in said
    assert said.endswith(again(folder))
    prepare_mine(folder.parent, replace=True)
    assert load_corpus("mine", folder.parent).documents == 1200


def flip(path, places):
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["bit", "many", "cut", "longer", "empty", "other", "gone"])
def test_a_damaged_file_is_named(folder, name, kind):
    Corpus(folder)
    path = folder / name
    if kind == "gone":
        path.unlink()
    elif kind == "other":
        shutil.copy(folder / "train_000000.bin", path)
    elif kind in ("bit", "many"):
        flip(path, [-2] if kind == "bit" else range(1024, path.stat().st_size, 2))
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[:-2], "longer": content + b"\0\0", "empty": b""}[kind])
    said = refusal(folder)
    wanted = "the file that corpus.json lists, got none" if kind == "gone" else "sha256 "
    assert said.startswith(f"{path}: corrupt corpus: expected {wanted}")
    assert said.endswith(again(folder))
    assert refusal(folder) == said


def count_digests(monkeypatch):
    read = []
    digest = hashlib.file_digest

    def counted(file, name):
        read.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return read


def test_what_has_not_changed_is_not_read_again(folder, monkeypatch):
    read = count_digests(monkeypatch)
    monkeypatch.setattr(corpus, "YOUNG", 0)
    Corpus(folder)
    files = json.loads((folder / "corpus.json").read_text())["files"]
    assert sorted(read) == sorted(files)
    read.clear()
    Corpus(folder)
    assert read == []
    status = (folder / "train_000001.bin").stat()
    flip(folder / "train_000001.bin", [-2])
    os.utime(folder / "train_000001.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "train_000001.bin: corrupt corpus: expected sha256" in refusal(folder)
    assert read == ["train_000001.bin"]


def test_young_files_are_read_again(folder, monkeypatch):
    """A change within the clock's grain of the last one would leave the times as they were."""
    Corpus(folder)
    read = count_digests(monkeypatch)
    Corpus(folder)
    assert len(read) > 2


def test_prepared_shards_are_known_to_be_whole(prepare_mine, tmp_path, monkeypatch):
    read = count_digests(monkeypatch)
    monkeypatch.setattr(corpus, "YOUNG", 0)
    Corpus(prepare_mine(tmp_path))
    assert read == []


@pytest.mark.parametrize("content", [b"", b"[]", b'{"train_000000.bin": 5}', b"\xff", b"null"])
def test_a_damaged_memory_is_forgotten(folder, content):
    sha256 = Corpus(folder).sha256
    (folder / "verified.json").write_bytes(content)
    assert Corpus(folder).sha256 == sha256


def test_a_memory_that_cannot_be_kept_is_none(folder):
    (folder / "verified.json").unlink()
    (folder / "verified.json").mkdir()
    assert Corpus(folder).documents == 1200


def test_the_hash_covers_the_tokenizer(prepare_mine, prepared, tokenizer_file, tmp_path):
    content = json.loads(Path(tokenizer_file).read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    same = Corpus(prepare_mine(tmp_path, "same", shard_tokens=5000))
    other = Corpus(prepare_mine(tmp_path, "other", tokenizer=str(tmp_path / "fewer.json")))
    assert same.sha256 == Corpus(prepared).sha256 != other.sha256


def test_the_newest_corpus_is_that_of_auto(prepare_mine, parquet, tmp_path):
    prepare_mine(tmp_path, "b", data_files=parquet[:1])
    prepare_mine(tmp_path, "a")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(tmp_path / "b" / "corpus.json", tmp_path / ".hidden")
    (tmp_path / "z" / "corpus.json").mkdir(parents=True)
    assert load_corpus("auto", tmp_path).folder.name == "a"
    (tmp_path / "b" / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'b' / 'corpus.json'}: corrupt")):
        load_corpus("auto", tmp_path)


def test_a_corpus_that_is_not_there(tmp_path):
    command = f"`python -m smollm.data --corpus mine --root {tmp_path}`"
    with pytest.raises(FileNotFoundError, match=re.escape(command)):
        load_corpus("mine", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"got no corpus\.json"):
        Corpus(tmp_path / "mine")
