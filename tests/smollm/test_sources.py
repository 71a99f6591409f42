"""Documents come from jsonl, txt and any dataset of the hub, or what they lack is said at once."""

import json
import re

import datasets
import pytest

from smollm.data import Corpus, HubDataset, LocalFiles, hub, prepare_corpus, sources

TEXTS = [f"document {i} with ünïcode\n\tand lines\r\n" for i in range(700)]


def write_jsonl(path, texts, key="text"):
    lines = [json.dumps({"id": i, key: text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_jsonl_gives_the_corpus_of_the_same_parquet(prepare_mine, tmp_path):
    rows = [*TEXTS[:300], None, "", *TEXTS[300:]]
    path = write_jsonl(tmp_path / "a.JSONL", rows, key="content")
    one = Corpus(prepare_mine(tmp_path, "one", data_files=[path], text_column="content"))
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "a.parquet")
    other = Corpus(prepare_mine(tmp_path, "other", data_files=[tmp_path / "a.parquet"]))
    assert one.sha256 == other.sha256 and one.documents == other.documents == 700


def test_a_txt_file_is_a_document_or_divided(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nfile\n")
    (tmp_path / "b.txt").write_bytes(b"two<|end|>three\n<|end|><|end|>four")
    (tmp_path / "empty.txt").touch()
    paths = [tmp_path / name for name in ("a.txt", "empty.txt", "b.txt")]
    assert list(LocalFiles(paths).texts()) == ["one\r\nfile\n", paths[2].read_text()]
    assert LocalFiles(paths).check() == 2
    for chunk in (1, 2, 5, 1000):
        monkeypatch.setattr(sources, "CHUNK", chunk)
        divided = LocalFiles(paths, separator="<|end|>")
        assert list(divided.texts()) == ["one\r\nfile\n", "two", "three\n", "four"]
        assert divided.check() == 4


def test_kinds_of_files_mix(parquet, prepare_mine, tmp_path):
    (tmp_path / "a.txt").write_text("a book")
    files = [parquet[0], write_jsonl(tmp_path / "b.jsonl", TEXTS), tmp_path / "a.txt"]
    assert Corpus(prepare_mine(tmp_path, data_files=files)).documents == 600 + 700 + 1


def test_no_more_documents_than_asked_for(prepare_mine, tmp_path):
    few = Corpus(prepare_mine(tmp_path, "few", max_documents=500))
    all_of_them = Corpus(prepare_mine(tmp_path, "all", max_documents=10_000))
    assert few.documents == 500 and all_of_them.documents == 1200


BAD_LINES = {
    "no json": (b'{"text": "a"', "Expecting ',' delimiter"),
    "no object": (b'["text"]', "TypeError"),
    "no key": (b'{"words": "a"}', "KeyError: 'text'"),
    "a number": (b'{"text": 5}', "'int' object has no attribute"),
    "bytes": (b'{"text": "\xff"}', "codec can't decode byte 0xff"),
    "half a pair": (b'{"text": "\\ud800"}', "surrogates not allowed"),
    "depth": (b"[" * 200_000, "RecursionError"),
}


@pytest.mark.parametrize(("line", "said"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_before_any_work(prepare_mine, tmp_path, line, said):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"in line 702 of {path}: ")) as caught:
        prepare_mine(tmp_path / "data", data_files=[path])
    assert str(caught.value).startswith("data_files: expected an object with text in 'text', got b")
    assert said in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "data").exists()


def test_refusals_of_files(prepare_mine, parquet, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text("\n")
    refusals = [
        ({"data_files": [tmp_path / "latin.txt"]}, "data_files: expected a txt file in UTF-8, got"),
        ({"data_files": [tmp_path / "no.txt"]}, "data_files: expected a txt file, got"),
        ({"data_files": [tmp_path / "no.jsonl"]}, "data_files: expected a jsonl file, got"),
        ({"data_files": [tmp_path / "empty.jsonl"]}, "data_files: expected documents, got none in"),
        ({"text_column": "words"}, "data_files: expected one column 'words', got ['text', 'id']"),
        ({"separator": "x"}, "separator: expected txt files to divide, got 'x'"),
        ({"data_files": [tmp_path / "a.txt"], "separator": ""}, "separator: expected text, got ''"),
    ]
    for keywords, text in refusals:
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(text)}"):
            prepare_mine(tmp_path / "data", **keywords)
    assert not (tmp_path / "data").exists()


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder that the hub's library reads as a dataset; asked for what, it is told."""
    asked = {}
    load = datasets.load_dataset

    def local(dataset, **options):
        asked.update(options, dataset=dataset)
        options.pop("name", None)
        return load(str(tmp_path / "hub"), **options, cache_dir=str(tmp_path / "cache"))

    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", [*TEXTS, None, ""], key="content")
    monkeypatch.setattr(hub, "reach_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", local)
    return asked


def test_any_dataset_of_the_hub(hub_folder, prepare_mine, tokenizer_file, tmp_path):
    source = HubDataset("owner/name", "2024", text_column="content")
    folder = prepare_corpus("stories", source, tmp_path, tokenizer=tokenizer_file)
    local = tmp_path / "hub" / "train.jsonl"
    same = prepare_mine(tmp_path, "same", data_files=[local], text_column="content")
    assert Corpus(folder).sha256 == Corpus(same).sha256
    assert hub_folder == {
        "dataset": "owner/name", "name": "2024", "split": "train", "streaming": True,
    }  # fmt: skip


def test_refusals_of_the_hub(hub_folder, tokenizer_file, tmp_path):
    refusals = [
        ({}, ValueError, "text_column: expected one of ['id', 'content'] of a/b, got 'text'"),
        ({"text_column": "id"}, ValueError, "text_column: expected text in 'id' of a/b, got 0"),
        ({"split": "odd"}, ConnectionError, "a/b could not be read: Bad split: odd"),
    ]
    for options, kind, text in refusals:
        with pytest.raises(kind, match=f"^{re.escape(text)}"):
            source = HubDataset("a/b", **options)
            prepare_corpus("x", source, tmp_path / "data", tokenizer=tokenizer_file)
    assert not (tmp_path / "data").exists()
