"""Two processes train as one does; what ends one of them ends both, with words."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from study_cases import ALONE, ROOT, run, tiny

from smollm.model.checkpoint import load_model
from smollm.studies import study
from smollm.training.checks import check_config
from smollm.training.config import TrainConfig
from smollm.training.loader import Loader
from smollm.training.parallel import World

FLAGS = ["--variants=gqa", "--batch-size=4", "--grad-accum=3", "--document-mask", "--log-every=1",
         "--val-every=3", "--save-every=2"]  # fmt: skip
BREAKING = """
import os, sys
from smollm.studies import study
from smollm.training import trainer

whole, calls = trainer.seed_step, []

def breaking(*args):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os._exit(7)
    return whole(*args)

trainer.seed_step = breaking
sys.exit(study.main(sys.argv[1:]))
"""


@contextmanager
def two_processes(arguments, script="train.py"):
    """torchrun, which is killed with its processes when the block ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*command, script, *arguments], cwd=ROOT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_reach_the_loss_of_one_though_one_dies(flags, data_dir, tmp_path):
    """Rows are shared out: three micro-batches of documents of other lengths in each half."""
    script, folder = tmp_path / "breaking.py", tmp_path / "two"
    script.write_text(BREAKING)
    with two_processes(tiny([*FLAGS, *flags], data_dir, folder), str(script)) as process:
        process.communicate(timeout=120)
        assert process.returncode != 0
    (broken,) = json.loads((folder / "ablation_results.json").read_text())["runs"].values()
    assert broken["status"] in ("failed", "interrupted") and broken["steps"] == 2
    with two_processes([f"--resume={folder}"]) as process:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert output.count("Comparison") == 1
    assert run(FLAGS, data_dir, tmp_path / "one") == 0
    two, one = (
        json.loads((place / "ablation_results.json").read_text())
        for place in (folder, tmp_path / "one")
    )
    assert (two["processes"], one["processes"]) == (2, 1)
    two, one = two["runs"]["gqa"], one["runs"]["gqa"]
    assert two["steps"] == one["steps"] and two["parameters"] == one["parameters"]
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        if theirs["val_loss"] is not None:
            assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    assert two["sample"] == one["sample"]
    load_model(folder / "gqa_model.pt")


def test_a_signal_to_one_stops_both_and_they_go_on(data_dir, tmp_path):
    flags = ["--variants=gqa", "--steps=4000", "--val-every=4000", "--batch-size=4"]
    log = tmp_path / "gqa" / "metrics.jsonl"
    with two_processes(tiny(flags, data_dir, tmp_path)) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGTERM)
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
    config = study.parse(tiny(["--batch-size=3", "--grad-accum=3"], data_dir, tmp_path))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes, or"):
        check_config(config, 1)
    flags = ["--batch-size=3", "--grad-accum=4", "--fsdp", "--optimizer=muon"]
    with pytest.raises(ValueError, match="fsdp: expected optimizer 'adamw', since Muon needs whol"):
        check_config(study.parse(tiny(flags, data_dir, tmp_path)), 1)
