"""A study that was stopped anywhere goes on as if nothing had happened."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from study_cases import ROOT, run, tiny

from smollm.attention import MECHANISMS
from smollm.studies import commands
from smollm.training import metrics, state, trainer
from smollm.training.record import Run

FLAGS = [
    "--steps=7", "--save-every=2", "--log-every=2", "--val-every=3", "--dropout=0.1",
    "--contexts", "8",
]  # fmt: skip
TIMES = {"tokens_per_second", "generation_tokens_per_second", "seconds", "timed_steps", "mfu",
         "timed_seconds", "train_seconds", "loader_seconds", "first_step_seconds",
         "inference", "compile_seconds", "peak_memory_bytes"}  # fmt: skip

# Each attempt is a fork of one process that has imported everything and computed nothing.
HARNESS = """
import gc, importlib, json, os, signal, sys

import torch._dynamo  # what optimizers import
from smollm.studies import commands, report, study

gc.freeze()  # each run collects garbage
report.write_report = lambda *_: None  # a second of plots each


def killed_at(argv, module, name, count):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    home = importlib.import_module(module)
    whole, calls = getattr(home, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            if module == "torch":  # half of a file is on the disk
                args[1].write(b"half")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(home, name, call)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os._exit(commands.main(argv))


whole, stopped, kills = json.loads(sys.argv[1])
assert killed_at(whole, "smollm.training.trainer", "seed_step", -1) == 0
for argv, *where in [(stopped[0], *kills[0]), *((stopped[1], *kill) for kill in kills[1:])]:
    assert killed_at(argv, *where) == signal.SIGKILL, where
assert killed_at(stopped[1], "smollm.training.trainer", "seed_step", -1) == 0
"""
KILLS = [  # (module, function, call): where each attempt ends
    ("smollm.training.trainer", "seed_step", 2),  # no checkpoint yet
    ("smollm.training.trainer", "seed_step", 5),
    ("torch", "save", 1),  # whatever the mechanism, a file is a file
    *[("smollm.training.trainer", "seed_step", 5)] * (len(MECHANISMS) - 1),  # of the next run
    ("smollm.training.metrics", "evaluate", 1),
    ("smollm.training.trainer", "accumulate_gradients", 1),
    ("smollm.training.metrics", "generation", 1),
    ("smollm.training.run", "save_model", 1),
    ("smollm.studies.study", "write_json", 1),
    ("smollm.studies.study", "clear_checkpoints", 4),
]
KILLS_OF_A_CHECKPOINT = [
    ("smollm.training.state", "write_json", 1),  # saved, but not sealed
    ("smollm.training.state", "_remove", 1),  # one more than is kept
]


def lasting(folder):
    """What a study leaves, but for the times."""
    content = json.loads((folder / "ablation_results.json").read_text())
    found = {}
    for name, plain in content["runs"].items():
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == plain["history"]
        for measured in (plain, *plain["history"]):
            for time in TIMES & set(measured):
                measured[time] = None
        weights = torch.load(folder / f"{name}_model.pt", weights_only=True)["state_dict"]
        found[name] = plain, weights
    return found


def assert_same(folder, other):
    ours, theirs = lasting(folder), lasting(other)
    assert ours.keys() == theirs.keys()
    for name, (plain, weights) in ours.items():
        assert plain == theirs[name][0]
        assert all(torch.equal(value, theirs[name][1][key]) for key, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "kills"), [
    (("--variants", *MECHANISMS), KILLS),
    (("--variants=gqa", "--optimizer=muon", "--activation-checkpointing"), KILLS_OF_A_CHECKPOINT),
], ids=["anywhere", "in-a-checkpoint"])  # fmt: skip
def test_a_study_killed_anywhere_ends_the_same_to_the_bit(flags, kills, data_dir, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*FLAGS, *flags]
    attempts = [tiny(flags, data_dir, stopped), [f"--resume={stopped}"]]
    task = json.dumps([tiny(flags, data_dir, whole), attempts, kills])
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, task], env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(whole, stopped)
    assert not list(stopped.glob("*/checkpoints"))


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A study that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run([*FLAGS, "--variants", "gqa", "mga"], data_dir, folder) == 0
    return folder


def stop(monkeypatch, home, name, call, stopper):
    """Call `stopper` before the call-th call of a function."""
    original, calls = getattr(home, name), []

    def stopping(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            stopper()
        return original(*args, **kwargs)

    monkeypatch.setattr(home, name, stopping)


def resume(folder, *flags):
    return commands.main([f"--resume={folder}", *flags])


@pytest.mark.parametrize(("home", "name", "call"), [
    (trainer, "learning_rate", 4), (metrics, "evaluate", 2), (metrics, "generation", 1),
    (trainer, "build_model", 2),
], ids=["step", "evaluation", "generation", "second-variant"])  # fmt: skip
def test_an_interrupted_study_goes_on(
    home, name, call, whole, data_dir, tmp_path, monkeypatch, ctrl_c, capsys
):
    flags = [*FLAGS, "--save-every=5", "--variants", "gqa", "mga"]
    with monkeypatch.context() as patched:
        stop(patched, home, name, call, ctrl_c)
        assert commands.main(tiny(flags, data_dir, tmp_path)) == 130
    assert f"`python train.py --resume {tmp_path}` goes on.\n" in capsys.readouterr().out
    assert resume(tmp_path) == 0
    assert_same(whole, tmp_path)


def stopped_late(data_dir, folder, monkeypatch, ctrl_c, flags=()):
    """A study interrupted in the sixth step of its one run, with checkpoints after 2, 4 and 5."""
    with monkeypatch.context() as patched:
        stop(patched, trainer, "accumulate_gradients", 6, ctrl_c)
        flags = [*FLAGS, "--variants=gqa", "--keep-checkpoints=3", *flags]
        assert run(flags, data_dir, folder) == 130
    return sorted((folder / "gqa" / "checkpoints").iterdir())


def test_the_latest_checkpoints_are_kept(data_dir, tmp_path, monkeypatch, ctrl_c):
    names = [path.name for path in stopped_late(data_dir, tmp_path / "3", monkeypatch, ctrl_c)]
    assert names == [f"step_00000000{step}.{kind}" for step in (2, 4, 5) for kind in ("json", "pt")]
    left = stopped_late(data_dir, tmp_path / "1", monkeypatch, ctrl_c, ["--keep-checkpoints=1"])
    assert [path.name for path in left] == ["step_000000005.json", "step_000000005.pt"]


@pytest.mark.parametrize("damage", ["weights", "seal", "missing", "all"])
def test_a_damaged_checkpoint_falls_back_and_says_so(
    damage, whole, data_dir, tmp_path, monkeypatch, ctrl_c, capsys
):
    files = stopped_late(data_dir, tmp_path, monkeypatch, ctrl_c)
    for path in files if damage == "all" else files[-2:]:
        if path.suffix == (".json" if damage == "seal" else ".pt"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content[:10] if damage == "seal" else content)
            if damage == "missing":
                path.unlink()
    capsys.readouterr()
    assert resume(tmp_path) == 0
    said = capsys.readouterr().out
    assert f"{files[-1]} is damaged; going on from the one before it" in said
    assert ("going on after step 4" in said) == (damage != "all")
    ours, theirs = lasting(tmp_path)["gqa"], lasting(whole)["gqa"]
    assert ours[0]["history"] == theirs[0]["history"]
    assert all(torch.equal(value, theirs[1][key]) for key, value in ours[1].items())


def test_another_config_is_refused_with_the_fields(data_dir, tmp_path, monkeypatch, ctrl_c, capsys):
    stopped_late(data_dir, tmp_path / "mine", monkeypatch, ctrl_c)
    stopped_late(data_dir, tmp_path / "other", monkeypatch, ctrl_c, ["--lr=0.5", "--beta1=0.8"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}
    capsys.readouterr()
    assert resume(tmp_path / "mine", "--weight-decay=0.5", "--num-kv-heads=1") == 2
    words = capsys.readouterr().err
    assert "weight_decay=0.5 instead of 0.01" in words and "num_kv_heads=1 instead of 3" in words
    strange = tmp_path / "other" / "gqa" / "checkpoints" / "step_000000005.json"
    target = tmp_path / "mine" / "gqa" / "checkpoints" / strange.name
    content = target.read_bytes()
    target.write_bytes(strange.read_bytes())
    assert resume(tmp_path / "mine") == 2
    assert "lr=0.003 instead of 0.5, beta1=0.9 instead of 0.8" in capsys.readouterr().err
    target.write_bytes(content)
    for path, time in before.items():
        assert path.is_dir() or path == target or path.stat().st_mtime_ns == time


def test_a_finished_run_is_kept_and_a_variant_may_join(whole, data_dir, tmp_path, capsys):
    assert run([*FLAGS, "--variants=gqa"], data_dir, tmp_path) == 0
    before = (tmp_path / "gqa_model.pt").stat().st_mtime_ns
    assert resume(tmp_path) == 0
    assert resume(tmp_path, "--variants", "gqa", "mga", "--save-every=3") == 0
    assert (tmp_path / "gqa_model.pt").stat().st_mtime_ns == before
    assert_same(whole, tmp_path)
    assert resume(tmp_path, "--variants=mga") == 2
    assert "expected all runs" in capsys.readouterr().err
    assert resume(tmp_path, "--lr=1") == 2
    assert "gqa was, got lr=1.0 instead of 0.003" in capsys.readouterr().err


def test_what_cannot_be_resumed_is_refused(data_dir, tmp_path, capsys):
    assert resume(tmp_path) == 2
    assert "study.toml: expected a study's file, got" in capsys.readouterr().err
    (tmp_path / "study.toml").write_text(f"steps = 50\ndata_dir = '{data_dir}'\n")
    assert resume(tmp_path, "--overwrite") == 2
    assert "overwrite: expected no --resume beside it" in capsys.readouterr().err
    assert resume(tmp_path, f"--output-dir={tmp_path / 'elsewhere'}") == 2
    assert "output_dir: expected" in capsys.readouterr().err
    (tmp_path / "ablation_results.json").write_text('{"runs": {"mha": {"new": 1}}}')
    assert resume(tmp_path) == 2
    assert "expected a study's results, got" in capsys.readouterr().err


def test_a_full_disk_leaves_the_checkpoint_before(data_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        stop(patched, state, "write_tensors", 2, full)
        assert run([*FLAGS, "--variants=gqa"], data_dir, tmp_path) == 1
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    assert runs["gqa"]["status"] == "failed" and "no space left" in runs["gqa"]["error"]
    names = [path.name for path in sorted((tmp_path / "gqa" / "checkpoints").iterdir())]
    assert names == ["step_000000002.json", "step_000000002.pt"]
    assert resume(tmp_path) == 0


def test_a_run_survives_json():
    made = Run("mga", "cpu", status="diverged", gradient_norm=1.0, steps=3)
    again = Run.of(json.loads(json.dumps(made.plain | {"loss": None})))
    assert math.isnan(again.loss) and again.plain | {"loss": 0} == made.plain | {"loss": 0}
