"""Shards, windows, boundaries, and the preparation of corpora."""

import json
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smollm.data import Corpus, load_corpus, prepare, prepare_builtin, prepare_corpus, sources
from smollm.data.shards import TokenWindows, document_boundaries, open_shard, write_shard


def shard(tmp_path, tokens, name="train_000000.bin"):
    path = tmp_path / name
    write_shard(path, np.array(tokens, dtype=np.uint16))
    return path


def test_a_shard_comes_back_as_it_was(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65535, 5000)
    path = shard(tmp_path, tokens)
    assert np.array_equal(open_shard(path, 65535), tokens)
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 5000] and not header[3:].any()
    assert [p.name for p in tmp_path.iterdir()] == ["train_000000.bin"]
    assert len(open_shard(shard(tmp_path, [], "empty.bin"), 10)) == 0


def corrupt(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = int(value).to_bytes(4, "little")
    path.write_bytes(content)


CORRUPTIONS = {
    "magic": (lambda p: corrupt(p, 0, 7), "expected magic 20240520, version 1, got 7, 1"),
    "version": (lambda p: corrupt(p, 4, 2), "expected magic 20240520, version 1, got 20240520, 2"),
    "count": (lambda p: corrupt(p, 8, 9), "expected 1042 bytes for its 9 tokens, got 1032"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-2]), "for its 4 tokens, got 1030"),
    "no header": (lambda p: p.write_bytes(b"abc"), "expected 1024 bytes of header, got 3"),
    "id": (lambda p: corrupt(p, 1024, 500), "expected ids below vocab_size=10, got 500"),
}


@pytest.mark.parametrize(("damage", "text"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_corrupt_shard_is_refused(tmp_path, damage, text):
    path = shard(tmp_path, [1, 2, 3, 4])
    damage(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: corrupt shard")) as caught:
        open_shard(path, 10)
    assert text in str(caught.value)


def windows(*lengths):
    """Shards whose tokens count on from one to the next."""
    ends = np.cumsum(lengths)
    parts = [np.arange(e - n, e, dtype=np.uint16) for n, e in zip(lengths, ends, strict=True)]
    return TokenWindows(parts)


def test_batches_are_a_function_of_the_step():
    first = windows(100, 60).batch(3, 4, 8, seed=1)
    reader = windows(100, 60)
    for step in (9, 0, 3, 7):
        reader.batch(step, 4, 8, seed=1)
    assert torch.equal(reader.batch(3, 4, 8, seed=1), first)
    assert first.shape == (4, 8) and first.dtype == torch.int64
    assert not torch.equal(reader.batch(3, 4, 8, seed=2), first)


def test_an_epoch_shows_every_window_once_in_its_own_order():
    reader = windows(100, 60)  # 12 + 7 windows of 8, and tails that fill none
    count = reader.num_windows(8)
    assert count == 19
    orders = []
    for epoch in range(3):
        starts = [int(reader.batch(epoch * count + i, 1, 8, 0)[0, 0]) for i in range(count)]
        assert sorted(starts) == [*range(0, 96, 8), *range(100, 156, 8)]
        orders.append(starts)
    assert orders[0] != orders[1] != orders[2]
    batched = torch.cat([reader.batch(step, 5, 8, 0) for step in range(8)])[:, 0].tolist()
    assert batched == (orders[0] + orders[1] + orders[2])[:40]


def test_windows_are_runs_of_one_shard():
    reader = windows(20, 9, 4, 30)
    for step in range(40):
        row = reader.batch(step, 1, 6, 0)[0]
        assert row.diff().eq(1).all()
        assert any(
            start <= row[0] and row[-1] < end for start, end in ((0, 20), (20, 29), (33, 63))
        )


def test_sequential_reads_in_order_with_a_smaller_last_batch():
    batches = list(windows(20, 9).sequential(2, 6))
    assert [len(batch) for batch in batches] == [2, 2]
    assert torch.cat(batches)[:, 0].tolist() == [0, 6, 12, 20]
    assert [len(batch) for batch in windows(20).sequential(2, 6)] == [2, 1]


def starts(batches):
    return torch.cat(list(batches))[:, 0].tolist()


def test_spread_windows_come_from_all_over_the_split():
    reader = windows(40, 24, 36)  # 10 + 6 + 9 windows of 4
    assert starts(reader.spread(2, 4, 5)) == [8, 28, 48, 68, 88]
    assert [len(batch) for batch in reader.spread(2, 4, 5)] == [2, 2, 1]
    assert starts(reader.spread(3, 4, 1)) == [48]
    for most in (25, 26, 1000):
        assert starts(reader.spread(4, 4, most)) == starts(reader.sequential(4, 4))


@given(st.integers(1, 300), st.integers(1, 400), st.integers(1, 9))
def test_spread_windows_are_even_and_distinct(count, most, batch_size):
    batches = list(windows(count * 2).spread(batch_size, 2, most))
    assert all(b.dtype == torch.int64 and b.shape[1] == 2 for b in batches)
    places = [start // 2 for start in starts(batches)]
    assert len(places) == min(count, most)
    gaps = np.diff(places)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    assert abs(places[0] - (count - 1 - places[-1])) <= 1


@pytest.mark.parametrize("name", ["batch_size", "seq_len", "most"])
def test_windows_of_nothing_are_refused(name):
    arguments = {"batch_size": 2, "seq_len": 4, "most": 3} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected >= 1, got 0"):
        list(windows(40).spread(**arguments))


def test_a_sequence_longer_than_any_shard_is_refused():
    with pytest.raises(ValueError, match=re.escape("corpus (20), got 21")):
        windows(20, 9).batch(0, 1, 21, 0)


def test_document_boundaries_by_hand():
    ids = torch.tensor([[5, 0, 6, 7], [8, 9, 1, 0], [0, 0, 3, 4]])
    assert document_boundaries(ids, eos_id=0).tolist() == [0, 2, 4, 8, 9, 10, 12]
    assert document_boundaries(ids, eos_id=99).tolist() == [0, 4, 8, 12]


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 1000))
def test_documents_end_at_eos_or_at_the_row(rows, tokens, seed):
    ids = torch.randint(3, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = document_boundaries(ids, eos_id=0)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0 and cu_seqlens[-1] == ids.numel()
    assert cu_seqlens.diff().gt(0).all()
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        assert ids.flatten()[a : b - 1].ne(0).all()
        assert ids.flatten()[b - 1] == 0 or b % tokens == 0


def test_the_builtin_corpus(corpus):
    assert corpus.vocab_size == 4096 and corpus.eos_id == 0
    assert corpus.train.tokens > 300_000 and 10_000 < corpus.val.tokens < 0.2 * corpus.train.tokens
    text = "The quick brown fox — été ✓\n\tdef f(x): return x"
    ids = corpus.tokenizer.encode(text).ids
    assert corpus.tokenizer.decode(ids) == text
    assert int(corpus.token_bytes[ids].sum()) == len(text.encode())
    assert corpus.token_bytes[corpus.eos_id] == 0


def test_validation_is_of_other_documents(corpus):
    def documents(windows):
        ids = np.concatenate(windows._shards)
        return {tuple(part) for part in np.split(ids, np.flatnonzero(ids == 0) + 1) if len(part)}

    train, val = documents(corpus.train), documents(corpus.val)
    assert len(train) > 500 and len(val) > 10
    assert not train & val
    assert len(train) + len(val) <= corpus.documents


def test_the_builtin_corpus_is_the_same_every_time(corpus, tmp_path):
    again = Corpus(prepare_builtin(tmp_path))
    assert again.sha256 == corpus.sha256
    for name in ("train_000000.bin", "val_000000.bin", "tokenizer.json"):
        assert (again.folder / name).read_bytes() == (corpus.folder / name).read_bytes()
    stamp = (again.folder / "corpus.json").stat().st_mtime_ns
    prepare_builtin(tmp_path)
    assert (again.folder / "corpus.json").stat().st_mtime_ns == stamp


def test_another_pythons_text_is_replaced(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "python_documents", lambda: (f"document {i}" for i in range(300)))
    folder = prepare_builtin(tmp_path)
    about = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(about | {"python": "2.7.18"}))
    monkeypatch.setattr(prepare, "python_documents", lambda: (f"newer {i}" for i in range(300)))
    assert Corpus(prepare_builtin(tmp_path)).sha256 != about["sha256"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    root = tmp_path_factory.mktemp("parquet")
    paths = []
    for part in range(2):
        texts = [f"document {part}-{i}: " + "some words here " * (i % 7) for i in range(600)]
        paths.append(root / f"part-{part}.parquet")
        datasets.Dataset.from_dict({"text": texts, "id": list(range(600))}).to_parquet(paths[-1])
    return paths


@pytest.fixture
def tokenizer_file(corpus):
    return str(corpus.folder / "tokenizer.json")


def test_parquet_becomes_shards(parquet, tokenizer_file, tmp_path):
    folder = prepare_corpus(
        "mine", 1, tmp_path, data_files=parquet, tokenizer=tokenizer_file, shard_tokens=5000
    )
    corpus = Corpus(folder)
    assert corpus.documents == 1200 and corpus.name == "mine"
    trained = sorted(folder.glob("train_*.bin"))
    assert len(trained) > 2
    assert all(len(open_shard(path, 4096)) == 5000 for path in trained[:-1])
    texts = [t for path in parquet for t in datasets.Dataset.from_parquet(str(path))["text"]]
    ids = np.concatenate(corpus.train._shards).tolist()
    decoded = corpus.tokenizer.decode(ids, skip_special_tokens=False).split("<|endoftext|>")[:-1]
    held = [t for t in texts if prepare._held_out(t, 5)]
    assert decoded == [t for t in texts if t not in held] and 0 < len(held) < 30
    assert load_corpus("auto", tmp_path).name == "mine"
    assert load_corpus("mine", tmp_path).sha256 == corpus.sha256


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
        "odd", 1, tmp_path / "d", data_files=[path], tokenizer=str(tmp_path / "tokenizer.json")
    )
    prepared = Corpus(folder)
    ids = np.concatenate([open_shard(s, prepared.vocab_size) for s in folder.glob("*.bin")])
    assert prepared.documents == len(texts)
    assert np.sum(ids == prepared.eos_id) == len(texts)
    assert prepared.tokenizer.decode(ids.tolist()).count("goes on for a while") == len(texts)


def test_an_interrupted_preparation_leaves_nothing(parquet, tokenizer_file, tmp_path, monkeypatch):
    def stream(*arguments):
        yield from (f"document {i}" for i in range(700))
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "parquet_texts", stream)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus("mine", 1, tmp_path, data_files=parquet, tokenizer=tokenizer_file)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=re.escape("`python -m smollm.data --corpus mine`")):
        load_corpus("mine", tmp_path)


def test_without_a_network_the_offline_choice_is_named(tokenizer_file, tmp_path, monkeypatch):
    def offline(*arguments, **keywords):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(sources, "_reach_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ConnectionError, match=re.escape("`python train.py` trains on its built-in")
    ):
        prepare_corpus("fineweb-edu-dedup", 2, tmp_path, tokenizer=tokenizer_file)
    assert list(tmp_path.iterdir()) == []


def test_the_hub_files_asked_for(tokenizer_file, tmp_path, monkeypatch):
    asked = {}

    def load(source, data_files, split, streaming):
        asked.update(source=source, files=data_files["train"])
        return [{"text": f"document {i}"} for i in range(900)]

    monkeypatch.setattr(sources, "_reach_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare_corpus("fineweb-edu-dedup", 2, tmp_path, tokenizer=tokenizer_file)
    assert asked == {
        "source": "HuggingFaceTB/smollm-corpus",
        "files": [
            "fineweb-edu-dedup/train-00000-of-00234.parquet",
            "fineweb-edu-dedup/train-00001-of-00234.parquet",
        ],
    }


def word_level(tmp_path, words):
    """A tokenizer.json that is no byte-level BPE."""
    from tokenizers import Tokenizer, models

    path = tmp_path / "words.json"
    Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])).save(
        str(path)
    )
    return str(path)


def test_refusals(parquet, tokenizer_file, tmp_path):
    many = word_level(tmp_path, ["<|endoftext|>", *(f"w{i}" for i in range(65_535))])
    root = tmp_path / "data"

    def prepare(name="mine", shards=1, data_files=parquet, tokenizer=tokenizer_file):
        return prepare_corpus(name, shards, root, data_files=data_files, tokenizer=tokenizer)

    refusals = [
        (lambda: prepare(tokenizer=many), ValueError, "at most 65535 (uint16), got 65536"),
        (
            lambda: prepare(tokenizer=word_level(tmp_path, ["a"])),
            ValueError,
            "a token <|endoftext|>",
        ),
        (lambda: prepare(tokenizer=str(parquet[0])), ValueError, "tokenizer: expected a tokenizer"),
        (lambda: prepare("fineweb-edu-dedup", 0, ()), ValueError, "shards: expected 1 to 234"),
        (lambda: prepare("fineweb-edu-dedup", 235, ()), ValueError, "shards: expected 1 to 234"),
        (lambda: prepare("wikipedia", 1, ()), ValueError, "corpus: expected one of ['builtin'"),
        (lambda: prepare("../mine"), ValueError, "corpus: expected the name of a folder"),
        (lambda: prepare("builtin"), ValueError, "corpus: expected the name of a folder"),
        (lambda: prepare(data_files=[tmp_path / "no.parquet"]), FileNotFoundError, "no.parquet"),
    ]
    for call, error, text in refusals:
        with pytest.raises(error, match=re.escape(text)):
            call()
    assert not root.exists()


def test_too_few_documents_to_hold_some_out(tokenizer_file, tmp_path):
    path = tmp_path / "one.parquet"
    datasets.Dataset.from_dict({"text": ["only one"]}).to_parquet(path)
    with pytest.raises(ValueError, match="expected enough documents to hold some out, got 1"):
        prepare_corpus("one", 1, tmp_path / "d", data_files=[path], tokenizer=tokenizer_file)
    datasets.Dataset.from_dict({"words": ["only one"]}).to_parquet(path)
    with pytest.raises(ValueError, match="expected a column 'text'"):
        prepare_corpus("one", 1, tmp_path / "d", data_files=[path], tokenizer=tokenizer_file)


def test_a_corpus_that_lost_a_shard_is_refused(parquet, tokenizer_file, tmp_path):
    folder = prepare_corpus(
        "mine", 1, tmp_path, data_files=parquet, tokenizer=tokenizer_file, shard_tokens=5000
    )
    (folder / "train_000001.bin").unlink()
    with pytest.raises(ValueError, match=r"corrupt corpus: expected \d+ train tokens"):
        Corpus(folder)


def test_command_line(data_dir, parquet, tokenizer_file, tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "smollm.data", "--root", str(tmp_path), *flags]
        return subprocess.run(command, capture_output=True, text=True)

    files = ["--data-files", *map(str, parquet), "--tokenizer", tokenizer_file]
    done = run("--corpus", "mine", *files)
    assert done.returncode == 0, done.stderr
    assert re.search(r"mine: [\d,]+ training and [\d,]+ validation tokens of 1,200", done.stdout)
    failed = run("--corpus", "builtin2")
    assert failed.returncode == 2
    assert failed.stderr.startswith("smollm.data: corpus: expected one of")
    assert "Traceback" not in failed.stderr
