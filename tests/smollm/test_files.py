"""Atomic files under many writers, strict JSON, locks that name their holder."""

import json
import math
import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from smollm.files import json_text, locked, write_atomically, write_json


def test_many_writers_of_one_path_never_meet(tmp_path):
    path, failures = tmp_path / "x.json", []

    def write(number):
        try:
            for turn in range(50):
                write_json(path, {"writer": number, "turn": turn, "fill": "x" * 1000})
                json.loads(path.read_text())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_json(tmp_path / "ours", 1)
    usual, ours = (stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("usual", "ours"))
    assert usual == ours


def test_json_is_strict():
    value = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.nan,)}}
    assert json.loads(json_text(value)) == {"a": None, "b": [None, None, 1.5], "c": {"d": [None]}}


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    code = (
        "import sys, pathlib, smollm.files as f\n"
        "with f.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(BlockingIOError, match=f"that process {holder.pid} writes to")
        with refused, locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with locked(tmp_path):
        pass


def test_a_lock_makes_its_folder_and_leaves_no_file(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_what_cannot_be_a_folder_is_not_locked(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere/at/all")
    for path in ("file", "file/x", "link", "link/x"):
        with pytest.raises(OSError, match=path), locked(tmp_path / path):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_who_waits_for_a_lock_gets_it_though_its_folder_goes(tmp_path):
    order = []

    def wait(name):
        with locked(tmp_path / "x", wait=True):
            order.append(name)
            assert (tmp_path / "x" / ".lock").read_text() == str(os.getpid())
            order.append(name)
        with suppress(OSError):  # the next may hold it by now
            (tmp_path / "x").rmdir()

    waiting = [threading.Thread(target=wait, args=(name,)) for name in range(6)]
    with locked(tmp_path / "x"):
        for thread in waiting:
            thread.start()
        time.sleep(0.2)
        assert order == []
    for thread in waiting:
        thread.join()
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(6))
