"""A preparation that ended early goes on from its whole shards, to the same bytes."""

import json
import shutil
import signal
import subprocess
import sys

import datasets
import pytest

from smollm.data import Corpus, tokenise, writer
from smollm.data.__main__ import main

OPTIONS = {"shard_tokens": 1500, "held_out": 0.3}


def contents(folder):
    ours = (path for path in folder.iterdir() if path.name != "verified.json")
    return {path.name: path.read_bytes() for path in ours}


@pytest.fixture(scope="module")
def whole(prepare_mine, tmp_path_factory):
    """The folder of an uninterrupted preparation: shards of both splits, cut inside documents."""
    folder = prepare_mine(tmp_path_factory.mktemp("whole"), **OPTIONS)
    assert all(len(list(folder.glob(f"{split}_*"))) > 3 for split in ("train", "val"))
    return folder


def end_at(monkeypatch, shard, when, error=KeyboardInterrupt):
    """Let a preparation end before or after it writes its n-th shard, or before it notes it."""
    write, save, written = writer.write_shard, tokenise.save_progress, []

    def write_shard(path, tokens):
        written.append(path)
        if (len(written), when) == (shard, "before"):
            raise error
        return write(path, tokens)

    def save_progress(*arguments):
        if (len(written), when) == (shard, "unnoted"):
            raise error
        save(*arguments)
        if (len(written), when) == (shard, "after"):
            raise error

    monkeypatch.setattr(writer, "write_shard", write_shard)
    monkeypatch.setattr(tokenise, "save_progress", save_progress)


def count_encoded(monkeypatch):
    encoded = []
    encode = tokenise._encode

    def counted(tokenizer, spelled, texts):
        encoded.extend(texts)
        return encode(tokenizer, spelled, texts)

    monkeypatch.setattr(tokenise, "_encode", counted)
    return encoded


@pytest.mark.parametrize(
    ("shard", "when"), [(1, "before"), (1, "after"), (2, "unnoted"), (9, "before"), (9, "after")]
)
def test_the_rest_is_prepared_to_the_same_bytes(
    prepare_mine, whole, tmp_path, monkeypatch, shard, when
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        end_at(patch, shard, when)
        prepare_mine(tmp_path, **OPTIONS)
    left = tmp_path / ".mine.building" / "new"
    noted = shard - (when != "after")
    assert left.exists() == (noted > 0)
    assert len(list(left.glob("*.bin"))) == (shard if when == "unnoted" and noted else noted)
    encoded = count_encoded(monkeypatch)
    folder = prepare_mine(tmp_path, **OPTIONS)
    assert contents(folder) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert Corpus(folder).documents == 1200
    if noted == 9:
        assert len(encoded) < 900
    if noted == 0:
        assert len(encoded) == 1200


def test_it_may_end_early_again_and_again(prepare_mine, whole, tmp_path, monkeypatch):
    ends = 0
    while not (tmp_path / "mine").exists():
        with monkeypatch.context() as patch:
            end_at(patch, 4, "after", ConnectionError("gone"))
            try:
                prepare_mine(tmp_path, **OPTIONS)
            except ConnectionError:
                ends += 1
    assert ends > 2
    assert contents(tmp_path / "mine") == contents(whole)


KILLED = """
import json, os, sys, pathlib
from smollm.data import LocalFiles, prepare_corpus, writer

write, count = writer.write_shard, 0

def write_shard(path, tokens):
    global count
    count += 1
    if count == 6:
        path.with_name(f".{path.name}.x1.tmp").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    return write(path, tokens)

writer.write_shard = write_shard
root, tokenizer, options, *paths = sys.argv[1:]
source = LocalFiles([pathlib.Path(path) for path in paths])
prepare_corpus("mine", source, pathlib.Path(root), tokenizer=tokenizer, **json.loads(options))
"""


@pytest.mark.slow
def test_a_killed_preparation_goes_on(
    prepare_mine, parquet, tokenizer_file, whole, tmp_path, monkeypatch
):
    command = [sys.executable, "-c", KILLED, tmp_path, tokenizer_file, json.dumps(OPTIONS)]
    done = subprocess.run([*map(str, (*command, *parquet))], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 5 and all(line.startswith("mine: ") for line in said)
    left = tmp_path / ".mine.building"
    before = contents(left / "new")
    assert len(before) == 5 + 2  # shards, progress.json, half a shard
    prepare_mine(tmp_path, "other", **OPTIONS)
    assert contents(left / "new") == before  # another name's preparation leaves it
    encoded = count_encoded(monkeypatch)
    assert contents(prepare_mine(tmp_path, **OPTIONS)) == contents(whole)
    assert len(encoded) < 1100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]


def interrupted(prepare_mine, root, monkeypatch, **keywords):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        end_at(patch, 5, "after")
        prepare_mine(root, **OPTIONS | keywords)
    return root / ".mine.building" / "new"


OTHERS = {
    "held out": {"held_out": 0.31},
    "files": {"data_files": slice(1, None)},
    "fewer": {"max_documents": 1100},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_request_begins_anew(prepare_mine, parquet, tmp_path, monkeypatch, change):
    interrupted(prepare_mine, tmp_path, monkeypatch)
    change = {k: parquet[v] if isinstance(v, slice) else v for k, v in change.items()}
    encoded = count_encoded(monkeypatch)
    folder = prepare_mine(tmp_path, **OPTIONS | change)
    assert len(encoded) == Corpus(folder).documents
    monkeypatch.undo()
    fresh = prepare_mine(tmp_path / "fresh", **OPTIONS | change)
    assert contents(folder) == contents(fresh)


def damage(name):
    def flip(left):
        content = bytearray((left / name).read_bytes())
        content[-1] ^= 1
        (left / name).write_bytes(content)

    return flip


DAMAGES = {
    "shard": damage("train_000001.bin"),
    "no shard": lambda left: (left / "train_000000.bin").unlink(),
    "progress": damage("progress.json"),
    "cut progress": lambda left: (left / "progress.json").write_text("{"),
}


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_damaged_shards_are_made_again(prepare_mine, whole, tmp_path, monkeypatch, harm):
    harm(interrupted(prepare_mine, tmp_path, monkeypatch))
    assert contents(prepare_mine(tmp_path, **OPTIONS)) == contents(whole)


@pytest.mark.parametrize("change", ["middle", "fewer"])
def test_other_documents_under_the_same_name_begin_anew(
    prepare_mine, parquet, tmp_path, monkeypatch, change
):
    path = tmp_path / "x.parquet"
    texts = list(datasets.Dataset.from_parquet(str(parquet[0]))["text"])
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    interrupted(prepare_mine, tmp_path, monkeypatch, data_files=[path])
    if change == "fewer":
        texts = texts[:60]
    else:
        texts[100] += "!"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    folder = prepare_mine(tmp_path, **OPTIONS, data_files=[path])
    fresh = prepare_mine(tmp_path / "fresh", **OPTIONS, data_files=[path])
    assert contents(folder) == contents(fresh)


def test_what_comes_after_the_shards_may_change(prepare_mine, parquet, tmp_path, monkeypatch):
    """A file that proves corrupt far on is mended, and what was prepared until then is kept."""
    path = tmp_path / "x.parquet"
    texts = list(datasets.Dataset.from_parquet(str(parquet[0]))["text"])
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    interrupted(prepare_mine, tmp_path, monkeypatch, data_files=[path])
    texts[-1] += "!"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    encoded = count_encoded(monkeypatch)
    folder = prepare_mine(tmp_path, **OPTIONS, data_files=[path])
    assert len(encoded) < 600
    monkeypatch.undo()
    fresh = prepare_mine(tmp_path / "fresh", **OPTIONS, data_files=[path])
    assert contents(folder) == contents(fresh)


def test_a_strangers_file_among_the_shards_stops_it(prepare_mine, tmp_path, monkeypatch):
    left = interrupted(prepare_mine, tmp_path, monkeypatch)
    (left / "notes").write_text("precious")
    before = contents(left)
    with pytest.raises(ValueError, match="expected what a preparation left, got also"):
        prepare_mine(tmp_path, **OPTIONS)
    assert contents(left) == before


def test_a_replacement_goes_on_too(prepare_mine, parquet, whole, tmp_path, monkeypatch):
    old = contents(prepare_mine(tmp_path, data_files=parquet[:1]))
    interrupted(prepare_mine, tmp_path, monkeypatch, replace=True)
    assert contents(tmp_path / "mine") == old
    with pytest.raises(ValueError, match="expected a new name, got 'mine'"):
        prepare_mine(tmp_path, **OPTIONS)
    assert contents(prepare_mine(tmp_path, **OPTIONS, replace=True)) == contents(whole)
    shutil.rmtree(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_stays(prepare_mine, parquet, tmp_path, monkeypatch, capsys):
    left = interrupted(prepare_mine, tmp_path, monkeypatch)
    capsys.readouterr()
    flags = ["--corpus", "mine", "--root", str(tmp_path), "--tokenizer", "no.json"]
    assert main([*flags, "--data-files", *map(str, parquet)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "'no.json', no such file" in said[0]
    assert said[1] == (
        f"smollm.data: whole shards stay in {left}; the same command goes on from them"
    )
    flags[1] = "../mine"
    assert main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
