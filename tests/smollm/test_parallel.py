"""Two processes train as one does; what ends one of them ends both, with words."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import pytest
import torch
from study_cases import ALONE, ROOT, run, tiny

from smollm.model.checkpoint import load_model
from smollm.studies import plan
from smollm.training.checks import check_config
from smollm.training.config import TrainConfig
from smollm.training.loader import Loader
from smollm.training.parallel import World

FLAGS = ["--variants=gqa", "--batch-size=4", "--grad-accum=3", "--document-mask", "--log-every=1",
         "--val-every=3", "--save-every=2", "--contexts", "8"]  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
if sys.platform == "linux":
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"  # needs no name of this machine
# Both processes are forks of one that has imported everything and computed nothing; the second one
# of the first attempt dies in its third step.
HARNESS = """
import gc, json, os, sys

import torch._dynamo, torch.distributed
from smollm.studies import commands, report, study
from smollm.training import trainer

gc.freeze()  # each run collects garbage
report.write_report = lambda *_: None  # a second of plots each
seed_step, calls = trainer.seed_step, []


def dying(*args):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os._exit(7)
    return seed_step(*args)


def both(argv, step, port):
    children = []
    for rank in "01":
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            trainer.seed_step = step
            os._exit(commands.main(argv))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


for first, again, port in json.loads(sys.argv[1]):
    assert both(first, dying, port) == [1, 7]
    assert both(again, seed_step, port) == [0, 0]
"""


@contextmanager
def two_processes(arguments):
    """torchrun, which is killed with its processes, and its logs' folder, when the block ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "--local-addr=127.0.0.1"]  # fmt: skip
    with TemporaryDirectory() as logs, subprocess.Popen(
        [*command, "train.py", *arguments], cwd=ROOT, text=True, start_new_session=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "TMPDIR": logs},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one_though_one_dies(data_dir, tmp_path):
    """Rows are shared out: three micro-batches of documents of other lengths in each half."""
    attempts = []
    for name, flags in (("ddp", []), ("fsdp", ["--fsdp"])):
        folder = tmp_path / name
        first = tiny([*FLAGS, *flags], data_dir, folder)
        attempts.append((first, [f"--resume={folder}"], str(free_port())))
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, json.dumps(attempts)], cwd=ROOT, capture_output=True,
        text=True, timeout=240, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GQA failed after 2 steps: ") == 2  # its neighbour died
    assert done.stdout.count("going on after step 2") == 2
    assert run(FLAGS, data_dir, tmp_path / "one") == 0
    ddp, fsdp, one = (
        json.loads((tmp_path / name / "ablation_results.json").read_text())
        for name in ("ddp", "fsdp", "one")
    )
    assert (ddp["processes"], fsdp["processes"], one["processes"]) == (2, 2, 1)
    ddp, fsdp, one = (content["runs"]["gqa"] for content in (ddp, fsdp, one))
    for two in (ddp, fsdp):
        assert two["steps"] == one["steps"] and two["parameters"] == one["parameters"]
        for ours, theirs in zip(two["history"], one["history"], strict=True):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
            if theirs["val_loss"] is not None:
                assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
        assert two["sample"] == one["sample"]
    load_model(tmp_path / "fsdp" / "gqa_model.pt")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_they_go_on(data_dir, tmp_path):
    flags = ["--variants=gqa", "--steps=4000", "--val-every=4000", "--batch-size=4"]
    log = tmp_path / "gqa" / "metrics.jsonl"
    with two_processes(tiny(flags, data_dir, tmp_path)) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int((tmp_path / ".lock").read_text()), signal.SIGTERM)  # the first one's
        output, _ = process.communicate(timeout=60)
    assert f"`python train.py --resume {tmp_path}` goes on." in output
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    steps = runs["gqa"]["steps"]
    assert runs["gqa"]["status"] == "interrupted" and steps > 5
    (saved,) = {path.stem for path in (tmp_path / "gqa" / "checkpoints").iterdir()}
    assert saved == f"step_{steps:09}"


@pytest.mark.parametrize("accumulated", [1, 4])
def test_batches_are_shared_out_whole(accumulated, corpus):
    config = TrainConfig(seq_len=16, batch_size=6, grad_accum=accumulated)
    with Loader(corpus, config, ALONE) as loader:
        whole = torch.cat([batch.ids for batch in loader.step(3)])
    parts = []
    for rank in range(2):
        with Loader(corpus, config, World(rank, 2, ALONE.device)) as loader:
            batches = loader.step(3)
            assert len(batches) == (1 if accumulated == 1 else 2)
            parts += [batch.ids for batch in batches]
    found = torch.cat(parts)
    assert sorted(found.tolist()) == sorted(whole.tolist()) and len(found) == 6 * accumulated


def test_what_two_processes_cannot_share_is_refused(monkeypatch, capsys, data_dir, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = plan.parse(tiny(["--batch-size=3", "--grad-accum=3"], data_dir, tmp_path))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes, or"):
        check_config(config, 1)
    flags = ["--batch-size=3", "--grad-accum=4", "--fsdp", "--optimizer=muon"]
    with pytest.raises(ValueError, match="fsdp: expected optimizer 'adamw', since Muon needs whol"):
        check_config(plan.parse(tiny(flags, data_dir, tmp_path)), 1)
