"""Shards, windows, boundaries, and the built-in corpus."""

import json
import os
import re
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smollm.data import Corpus, load_corpus, prepare, prepare_builtin, sources
from smollm.data.shards import TokenWindows, document_boundaries, open_shard, write_shard


def shard(tmp_path, tokens, name="train_000000.bin"):
    path = tmp_path / name
    write_shard(path, np.array(tokens, dtype=np.uint16))
    return path


def test_a_shard_comes_back_as_it_was(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 5000)
    path = shard(tmp_path, tokens)
    assert np.array_equal(open_shard(path), tokens)
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 5000] and not header[3:].any()
    assert [p.name for p in tmp_path.iterdir()] == ["train_000000.bin"]
    assert len(open_shard(shard(tmp_path, [], "empty.bin"))) == 0


def corrupt(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(content)


CORRUPTIONS = {
    "magic": (lambda p: corrupt(p, 0, 7), "expected magic 20240520, version 1, got 7, 1"),
    "version": (lambda p: corrupt(p, 4, 2), "expected magic 20240520, version 1, got 20240520, 2"),
    "count": (lambda p: corrupt(p, 8, 9), "expected 1042 bytes for its 9 tokens, got 1032"),
    "negative count": (lambda p: corrupt(p, 8, -4), "expected a count >= 0, got -4"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-2]), "for its 4 tokens, got 1030"),
    "no header": (lambda p: p.write_bytes(b"abc"), "expected 1024 bytes of header, got 3"),
}


@pytest.mark.parametrize(("damage", "text"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_corrupt_shard_is_refused(tmp_path, damage, text):
    path = shard(tmp_path, [1, 2, 3, 4])
    damage(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: corrupt shard")) as caught:
        open_shard(path)
    assert text in str(caught.value)


def test_a_shard_that_shrinks_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path = shard(tmp_path, range(5000))
    read_header = np.frombuffer

    def shrink(*arguments, **keywords):
        os.truncate(path, 1100)
        return read_header(*arguments, **keywords)

    monkeypatch.setattr(np, "frombuffer", shrink)
    with pytest.raises(ValueError, match="expected 11024 bytes for its 5000 tokens, got 1100"):
        open_shard(path)


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
    assert corpus.vocab_size == 4096 and corpus.eos_id == 0 and corpus.documents == 400
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
    assert len(train) > 300 and len(val) > 10
    assert not train & val
    assert len(train) + len(val) <= corpus.documents


def test_the_builtin_corpus_is_the_same_every_time(tmp_path, monkeypatch):
    texts = list(islice(sources.python_documents(), 100))
    assert texts == list(islice(sources.python_documents(), 100))
    monkeypatch.setattr(prepare, "python_documents", lambda: (text[:1000] for text in texts))
    corpus, again = (Corpus(prepare_builtin(tmp_path / name)) for name in ("first", "second"))
    assert again.sha256 == corpus.sha256
    for name in ("train_000000.bin", "val_000000.bin", "tokenizer.json"):
        assert (again.folder / name).read_bytes() == (corpus.folder / name).read_bytes()
    stamp = (again.folder / "corpus.json").stat().st_mtime_ns
    prepare_builtin(tmp_path / "second")
    assert (again.folder / "corpus.json").stat().st_mtime_ns == stamp


def test_another_pythons_text_is_replaced(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "python_documents", lambda: (f"document {i}" for i in range(300)))
    folder = prepare_builtin(tmp_path)
    about = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(about | {"python": "2.7.18"}))
    monkeypatch.setattr(prepare, "python_documents", lambda: (f"newer {i}" for i in range(300)))
    assert Corpus(prepare_builtin(tmp_path)).sha256 != about["sha256"]


def test_the_builtin_code_is_the_library_whole(tmp_path, monkeypatch):
    texts = list(islice(sources.python_sources(), 400))
    assert texts[:100] == list(islice(sources.python_sources(), 100))
    assert sum(map(len, texts)) > 3_000_000
    assert any("class OrderedDict(dict):" in text for text in texts)
    monkeypatch.setattr(prepare, "python_sources", lambda: (text[:1000] for text in texts[:100]))
    corpus = load_corpus("builtin-code", tmp_path)
    assert corpus.name == "builtin-code" and corpus.documents == 100
    again = prepare_builtin(tmp_path, "builtin-code")
    assert Corpus(again).sha256 == corpus.sha256
    monkeypatch.setattr(prepare, "python_documents", lambda: (f"document {i}" for i in range(300)))
    assert load_corpus("auto", tmp_path).name == "builtin"
    with pytest.raises(ValueError, match=re.escape("one of ('builtin', 'builtin-code'), got 'x'")):
        prepare_builtin(tmp_path, "x")
