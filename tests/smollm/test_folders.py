"""Corpora take their places one at a time, and nothing that is not ours is ever lost."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from smollm.data import (
    Corpus,
    LocalFiles,
    folders,
    load_corpus,
    prepare,
    prepare_builtin,
    prepare_corpus,
)
from smollm.data.folders import build


def tree(root):
    """Every path under a root, with the bytes of files and the targets of links."""

    def content(path):
        if path.is_symlink():
            return path.readlink()
        return path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(root)): content(path) for path in root.rglob("*")}


@pytest.fixture
def no_work(monkeypatch):
    """Fail as soon as a tokenizer or a document is read."""
    for where, name in (
        (prepare, "load_tokenizer"), (prepare, "python_documents"), (prepare, "python_sources"),
        (LocalFiles, "check"), (LocalFiles, "texts"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


ODD_NAMES = [
    "", ".", "..", "a/b", "/", "/etc", "../x", "x/", ".x", "x ", " x", "a b", "a\nb", "x\n", "a\0b",
    "\t", "-x", "~", "a\\b", "*", "a:b", "é", "x" * 101,
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_refused(no_work, parquet, tmp_path, name):
    (tmp_path / "precious").write_text("mine")
    before = tree(tmp_path)
    for replace in (False, True):
        with pytest.raises(ValueError, match="corpus: expected a name of letters"):
            prepare_corpus(name, LocalFiles(parquet), tmp_path, replace=replace)
    with pytest.raises(ValueError, match="corpus: expected a name of letters"):
        load_corpus(name, tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["auto", "builtin", "builtin-code", "Auto", "BUILTIN", "Cosmopedia-v2"]
)
def test_names_that_mean_something_else_are_refused(no_work, parquet, tmp_path, name):
    with pytest.raises(ValueError, match=f"corpus: expected a name .*{name}"):
        prepare_corpus(name, LocalFiles(parquet), tmp_path, replace=True)
    assert not tree(tmp_path)


def foreign_corpus_json(place):
    place.mkdir()
    (place / "corpus.json").write_text('{"name": "words", "sha256": 5}')


def file_in_the_way(place):
    place.write_text("a file")


def files_without_corpus_json(place):
    place.mkdir()
    (place / "model.py").write_text("precious")


def tokenizer_alone(place):
    place.mkdir()
    (place / "tokenizer.json").write_text("{}")


def folder_called_corpus_json(place):
    (place / "corpus.json").mkdir(parents=True)


def link_to_a_foreign_folder(place):
    files_without_corpus_json(place.with_name("elsewhere"))
    place.symlink_to("elsewhere")


def link_to_nowhere(place):
    place.symlink_to("nowhere")


def link_to_itself(place):
    place.symlink_to(place.name)


STRANGERS = [
    foreign_corpus_json, file_in_the_way, files_without_corpus_json, tokenizer_alone,
    folder_called_corpus_json, link_to_a_foreign_folder, link_to_nowhere, link_to_itself,
]  # fmt: skip


@pytest.mark.parametrize("name", ["mine", "builtin", "builtin-code"])
@pytest.mark.parametrize("stand", STRANGERS)
def test_only_a_corpus_of_ours_is_replaced(no_work, parquet, tmp_path, stand, name):
    stand(tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}")):
        if name != "mine":
            prepare_builtin(tmp_path, name)
        else:
            prepare_corpus(name, LocalFiles(parquet), tmp_path, replace=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "stranger", ["notes.txt", ".hidden", "train_1.bin", "train_000009.bin", "sub/", "link"]
)
def test_a_corpus_with_a_strangers_file_is_left_alone(prepare_mine, tmp_path, stranger):
    folder = prepare_mine(tmp_path)
    if stranger == "link":
        (folder / stranger).symlink_to("corpus.json")
    elif stranger.endswith("/"):
        (folder / stranger).mkdir()
    else:
        (folder / stranger).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"nothing else, got also '{stranger.strip('/')}'; move"):
        prepare_mine(tmp_path, replace=True)
    assert tree(tmp_path) == before


def test_an_empty_folder_is_not_replaced(prepare_mine, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"got a folder without a corpus\.json of ours"):
        prepare_mine(tmp_path, replace=True)


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_root_that_is_no_folder_is_refused(no_work, parquet, tmp_path, root):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="root: expected a folder that can be written to"):
        prepare_corpus("mine", LocalFiles(parquet), tmp_path / root)
    with pytest.raises(ValueError, match="root: expected a folder that can be written to"):
        load_corpus("auto", tmp_path / root)


def test_a_corpus_is_replaced_when_asked(prepare_mine, parquet, tmp_path):
    before = Corpus(prepare_mine(tmp_path))
    with pytest.raises(ValueError, match="expected a new name, got 'mine', which is prepared; --r"):
        prepare_mine(tmp_path, data_files=parquet[:1])
    assert Corpus(tmp_path / "mine").sha256 == before.sha256
    after = Corpus(prepare_mine(tmp_path, data_files=parquet[:1], replace=True))
    assert after.documents == 600 and before.documents == 1200
    assert int(before.train.batch(0, 1, 8, 0).max()) < 4096  # what is open stays whole
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "mine" / ".corpus.json.abc_1.tmp").touch()  # a killed process's
    (tmp_path / "mine" / "val_000000.bin").unlink()
    assert Corpus(prepare_mine(tmp_path, replace=True)).sha256 == before.sha256


def test_a_linked_corpus_opens_and_is_replaced_where_it_lies(prepare_mine, parquet, tmp_path):
    root, disk = tmp_path / "root", tmp_path / "disk"
    prepare_mine(disk)
    root.mkdir()
    (root / "linked").symlink_to("../disk/mine")
    (disk / "other").write_text("precious")
    assert load_corpus("linked", root).documents == 1200
    assert load_corpus("auto", root).folder == root / "linked"
    with pytest.raises(ValueError, match="expected a new name, got 'linked'"):
        prepare_mine(root, "linked")
    prepare_mine(root, "linked", data_files=parquet[:1], replace=True)
    assert (root / "linked").is_symlink() and Corpus(disk / "mine").documents == 600
    assert sorted(p.name for p in disk.iterdir()) == ["mine", "other"]
    assert sorted(p.name for p in root.iterdir()) == ["linked"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), ValueError("odd")])
def test_what_fails_leaves_everything_as_it_was(prepare_mine, tmp_path, monkeypatch, error):
    root = tmp_path / "a" / "root"

    def stream(*arguments):
        yield from (f"document {i}" for i in range(700))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "texts", stream)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            prepare_mine(root)
        assert not (tmp_path / "a").exists()
    prepare_mine(root)
    before = tree(root)
    monkeypatch.setattr(LocalFiles, "texts", stream)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        prepare_mine(root, replace=True)
    assert tree(root) == before


def test_an_interruption_between_the_renames_brings_the_old_corpus_back(
    prepare_mine, tmp_path, monkeypatch
):
    prepare_mine(tmp_path)
    before = tree(tmp_path)

    def interrupted(new, place):
        place.rename(new.with_name(folders.OLD))
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_mine(tmp_path, replace=True)
    assert tree(tmp_path) == before


def test_a_stranger_that_comes_meanwhile_stays(prepare_mine, tmp_path, monkeypatch):
    def stream(*arguments):
        yield from (f"document {i}" for i in range(900))
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes").write_text("precious")

    monkeypatch.setattr(LocalFiles, "texts", stream)
    with pytest.raises(ValueError, match="nothing else, got also 'notes'"):
        prepare_mine(tmp_path, replace=True)
    assert tree(tmp_path) == {"mine": None, "mine/notes": b"precious"}


KILLED = """
import os, sys, pathlib
from smollm.data import folders
place = pathlib.Path(sys.argv[1])
with folders.build(place) as new:
    (new / "train_000000.bin").write_text("half")
    (new / ".val_000000.bin.x1_y.tmp").write_text("less")
    if place.exists():
        place.rename(new.with_name("old"))
    os.kill(os.getpid(), 9)
"""


def kill_while_preparing(place):
    done = subprocess.run([sys.executable, "-c", KILLED, str(place)])
    assert done.returncode == -signal.SIGKILL
    assert place.with_name(f".{place.name}.building").is_dir()


@pytest.mark.slow
def test_what_a_killed_preparation_left_is_cleared(prepare_mine, tmp_path):
    kill_while_preparing(tmp_path / "gone")
    prepare_mine(tmp_path, "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow
def test_a_kill_between_the_renames_is_undone_by_the_next(prepare_mine, tmp_path):
    prepare_mine(tmp_path)
    before = tree(tmp_path)
    kill_while_preparing(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    with pytest.raises(ValueError, match="expected a new name, got 'mine'"):
        prepare_mine(tmp_path)
    assert tree(tmp_path) == before


def test_hidden_folders_of_others_stay(prepare_mine, tmp_path):
    for name, file in ((".a.building", "notes"), (".b.building", "new"), (".mine-abc", ".lock")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("precious")
    (tmp_path / ".c.building/new").mkdir(parents=True)
    (tmp_path / ".c.building/.lock").touch()
    (tmp_path / ".c.building/new/thesis.tex").write_text("precious")
    before = tree(tmp_path)
    prepare_mine(tmp_path)
    assert {n: c for n, c in tree(tmp_path).items() if not n.startswith("mine")} == before
    for name in "abc":
        with pytest.raises(ValueError, match=rf"\.{name}\.building: expected what a preparation"):
            prepare_mine(tmp_path, name)
    assert {n: c for n, c in tree(tmp_path).items() if not n.startswith("mine")} == before


def test_of_two_preparations_of_a_name_the_second_is_refused(prepare_mine, tmp_path, monkeypatch):
    with build(tmp_path / "mine") as new, monkeypatch.context() as patch:
        (new / "train_000000.bin").write_text("half")
        before = tree(tmp_path)
        patch.setattr(LocalFiles, "texts", lambda *_: pytest.fail("read documents"))
        with pytest.raises(BlockingIOError, match=f"got 'mine': .* process {os.getpid()} writes"):
            prepare_mine(tmp_path)
        assert tree(tmp_path) == before
        patch.undo()
        prepare_mine(tmp_path, "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.fixture
def few_documents(monkeypatch):
    """A built-in corpus that takes no time; its documents are counted."""
    calls = []

    def documents():
        calls.append(threading.get_ident())
        return (f"document {i}" for i in range(300))

    monkeypatch.setattr(prepare, "python_documents", documents)
    return calls


def test_of_many_first_users_of_the_builtin_corpus_one_makes_it(few_documents, tmp_path):
    corpora, failures = [], []

    def use():
        try:
            corpora.append(load_corpus("auto", tmp_path / "data"))
        except BaseException as error:
            failures.append(error)

    with build(tmp_path / "data" / "builtin"):
        users = [threading.Thread(target=use) for _ in range(6)]
        for user in users:
            user.start()
        time.sleep(0.3)
        assert not corpora and not few_documents
    for user in users:
        user.join()
    assert not failures and len(few_documents) == 1
    assert len({corpus.sha256 for corpus in corpora}) == 1 and len(corpora) == 6
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["builtin"]


def rewrite(change):
    def damage(folder):
        about = json.loads((folder / "corpus.json").read_text())
        change(about)
        (folder / "corpus.json").write_text(json.dumps(about))

    return damage


def flip(name):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return damage


DAMAGES = {
    "older python": rewrite(lambda about: about.update(python="2.7.18")),
    "no digests": rewrite(lambda about: [about.pop("format"), about.pop("files")]),
    "wrong type": rewrite(lambda about: about.update(documents="many")),
    "wrong count": rewrite(lambda about: about.update(val_tokens=7)),
    "cut json": lambda f: (f / "corpus.json").write_text('{"name": "buil'),
    "empty json": lambda f: (f / "corpus.json").write_text(""),
    "no json": lambda f: (f / "corpus.json").unlink(),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer": flip("tokenizer.json"),
    "shard": flip("train_000000.bin"),
    "cut shard": lambda f: (f / "val_000000.bin").write_bytes(b""),
    "no shard": lambda f: (f / "val_000000.bin").unlink(),
    "nothing left": lambda f: [path.unlink() for path in f.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_builtin_corpus_is_made_anew(few_documents, tmp_path, damage):
    folder = prepare_builtin(tmp_path)
    before = tree(tmp_path)
    del before["builtin/verified.json"]
    damage(folder)
    load_corpus("builtin", tmp_path)
    after = tree(tmp_path)
    del after["builtin/verified.json"]
    assert after == before and len(few_documents) == 2
    load_corpus("builtin", tmp_path)
    assert len(few_documents) == 2


def test_a_damaged_builtin_corpus_with_a_strangers_file_is_left_alone(few_documents, tmp_path):
    folder = prepare_builtin(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "notes").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="nothing else, got also 'notes'"):
        load_corpus("builtin", tmp_path)
    assert tree(tmp_path) == before


INTERRUPTED = """
import signal, sys, time
from smollm.data import LocalFiles, prepare
from smollm.data.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this was started to ignore it

def stream(*arguments):
    yield from (f"document {i}" for i in range(700))
    print("working", flush=True)
    time.sleep(60)

LocalFiles.texts = prepare.python_documents = stream
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "mine"), (signal.SIGTERM, "builtin")])
def test_an_interrupted_command_ends_cleanly(
    prepare_mine, parquet, tokenizer_file, tmp_path, number, name
):
    prepare_mine(tmp_path)
    before = tree(tmp_path)
    flags = ["--root", str(tmp_path), "--corpus", name]
    if name == "mine":
        flags += ["--replace", "--data-files", str(parquet[0]), "--tokenizer", tokenizer_file]
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        assert command.stdout.readline() == "working\n"
        command.send_signal(number)
        out, err = command.communicate(timeout=30)
    assert command.returncode == 130
    assert (out, err) == ("", "smollm.data: interrupted\n")
    assert tree(tmp_path) == before
