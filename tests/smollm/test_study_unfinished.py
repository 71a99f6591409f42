"""Studies that are interrupted, that fail or that diverge, and what they leave behind."""

import itertools
import json
import math
import signal
import threading
import time

import pytest
import torch
from study_cases import run, tiny, train_py

from smollm.model.checkpoint import load_model
from smollm.studies import commands, plots, study
from smollm.training import run as training
from smollm.training import trainer


def wait_for(ready, process):
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_running_study_keeps_its_folder_and_an_interrupt_its_results(data_dir, tmp_path, capsys):
    """Another study is refused; of signals any may come, until the process has ended."""
    log = tmp_path / "mha" / "metrics.jsonl"
    with train_py(tiny(["--steps=2000", "--val-every=2000"], data_dir, tmp_path)) as process:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
        again = ["--overwrite", "--variants", "gqa", "--steps=2"]
        assert commands.main(tiny(again, data_dir, tmp_path)) == 2
        words = capsys.readouterr().err
        assert words.startswith(f"train.py: {tmp_path}: ") and f"process {process.pid} " in words
        signals = itertools.cycle((signal.SIGTERM, signal.SIGINT))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(next(signals))
            time.sleep(0.02)
        output, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and errors == ""
    assert f"Interrupted. Results so far in {tmp_path}/" in output
    content = json.loads((tmp_path / "ablation_results.json").read_text())
    assert content["runs"]["mha"]["status"] == "interrupted"
    assert content["runs"]["mha"]["train_loss"] > 0 and content["runs"]["mha"]["val_loss"] is None
    load_model(tmp_path / "mha_model.pt")
    assert "MHA (interrupted)" in (tmp_path / "report.md").read_text()


def before(call, first):
    """The call, with something else called before it."""

    def both(*args, **kwargs):
        first()
        return call(*args, **kwargs)

    return both


def test_an_interrupt_before_any_run_is_a_line(data_dir, tmp_path, capsys, monkeypatch, ctrl_c):
    monkeypatch.setattr(study, "load_corpus", ctrl_c)
    assert commands.main(tiny([], data_dir, tmp_path)) == 130
    assert capsys.readouterr().err == "train.py: interrupted, no run had begun\n"


def test_an_interrupt_while_a_model_is_built(data_dir, tmp_path, monkeypatch, ctrl_c):
    monkeypatch.setattr(trainer, "build_model", ctrl_c)
    assert run(["--variants", "gqa", "mga"], data_dir, tmp_path) == 130
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    assert list(runs) == ["gqa"] and runs["gqa"]["status"] == "interrupted"
    assert "GQA (interrupted)" in (tmp_path / "report.md").read_text()


def test_an_interrupt_long_after_a_record_keeps_its_loss(data_dir, tmp_path, monkeypatch, ctrl_c):
    rate = trainer.learning_rate
    interrupted = before(rate, ctrl_c)
    monkeypatch.setattr(
        trainer,
        "learning_rate",
        lambda step, *rest: (interrupted if step == 15 else rate)(step, *rest),
    )
    flags = ["--variants=mha", "--steps=20", "--log-every=10", "--val-every=20"]
    assert run(flags, data_dir, tmp_path) == 130
    result = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]["mha"]
    assert [record["step"] for record in result["history"]] == [1, 10] and result["steps"] == 15
    assert result["train_loss"] == result["history"][-1]["loss"]


@pytest.mark.parametrize("where", ["save_model", "write_json", "plot_loss"])
def test_signals_wait_while_results_are_written(where, data_dir, tmp_path, monkeypatch, ctrl_c):
    home = {"save_model": training, "write_json": study, "plot_loss": plots}[where]
    monkeypatch.setattr(home, where, before(getattr(home, where), ctrl_c))
    assert run(["--variants", "gqa", "mga", "--steps=2"], data_dir, tmp_path) == 130
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    expected = ["gqa", "mga"] if where == "plot_loss" else ["gqa"]
    assert list(runs) == expected and {r["status"] for r in runs.values()} == {"finished"}
    load_model(tmp_path / "gqa_model.pt")
    assert (tmp_path / "report.md").exists()


def test_a_study_runs_in_a_thread_and_as_quietly_as_its_console(data_dir, tmp_path, capfd):
    done = []
    flags = ["--variants", "gqa", "--steps=2"]
    thread = threading.Thread(target=lambda: done.append(run(flags, data_dir, tmp_path)))
    thread.start()
    thread.join()
    assert done == [0]
    assert capfd.readouterr() == ("", "")


def fail_for(mechanism, call, error):
    """The call, but for one mechanism an error."""

    def some(name, *args, **kwargs):
        if name == mechanism:
            raise error
        return call(name, *args, **kwargs)

    return some


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError(28, "No space left"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"), KeyError("x"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_failed_variant_is_a_row(error, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_model", fail_for("mha", trainer.build_model, error))
    with (tmp_path / "console.txt").open("w") as capture:
        assert run(["--variants", "mha", "gqa", "--steps=2"], data_dir, tmp_path, capture) == 1
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    assert runs["gqa"]["status"] == "finished" and runs["mha"]["status"] == "failed"
    name = type(error).__name__
    assert name in runs["mha"]["error"] and "build_model" in runs["mha"]["traceback"]
    for file in ("console.txt", "report.md"):
        text = (tmp_path / file).read_text()
        assert f"MHA failed after 0 steps: {runs['mha']['error']}\n" in text
        assert "Traceback" not in text


def test_weights_that_cannot_be_saved_fail_their_run(data_dir, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_model", full)
    assert run(["--variants", "gqa", "--steps=2"], data_dir, tmp_path) == 1
    result = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]["gqa"]
    assert result["status"] == "failed" and result["val_loss"] > 0
    assert "No space left on device" in result["error"]


def test_results_that_cannot_be_written_are_still_shown(data_dir, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study, "write_json", full)
    with (tmp_path / "console.txt").open("w") as capture:
        assert run(["--variants", "gqa", "--steps=2"], data_dir, tmp_path, capture) == 1
    text = (tmp_path / "console.txt").read_text()
    assert "Comparison" in text and "Grad max" in text
    assert text.endswith(
        f"Results could not all be written to {tmp_path}/: [Errno 28] No space left on device\n"
    )


@pytest.mark.slow
def test_a_study_outlives_what_reads_its_output(data_dir, tmp_path):
    with train_py(tiny(["--variants", "gqa", "--steps=2"], data_dir, tmp_path)) as process:
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "ablation_results.json").read_text())["best"]["loss"] == "GQA"


@pytest.mark.parametrize(("what", "number"), [("loss", math.nan), ("gradient", math.inf)])
def test_a_step_that_is_not_finite_is_not_taken(what, number, data_dir, tmp_path, monkeypatch):
    honest, calls = trainer.accumulate_gradients, []

    def poisoned(network, *args):
        loss = honest(network, *args)
        calls.append(None)
        if len(calls) == 4 and what == "gradient":
            network.norm.weight.grad[3] = number
        return loss * number if len(calls) == 4 and what == "loss" else loss

    monkeypatch.setattr(trainer, "accumulate_gradients", poisoned)
    with (tmp_path / "console.txt").open("w") as capture:
        assert run(["--variants", "mha", "gqa"], data_dir, tmp_path, capture) == 1
    text = (tmp_path / "ablation_results.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    runs = json.loads(text)["runs"]
    assert runs["mha"]["status"] == "diverged" and runs["gqa"]["status"] == "finished"
    assert runs["mha"]["steps"] == 3 and runs["mha"]["val_loss"] > 0  # of step 3
    last = json.loads((tmp_path / "mha" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and last["loss" if what == "loss" else "gradient_norm"] is None
    assert not (tmp_path / "mha_model.pt").exists() and (tmp_path / "gqa_model.pt").exists()
    assert (
        f"MHA diverged after 3 steps: {runs['mha']['error']}"
        in (tmp_path / "console.txt").read_text()
    )
    assert "MHA (diverged)" in (tmp_path / "report.md").read_text()


def test_runs_that_all_diverge_have_no_winner(data_dir, tmp_path):
    assert run(["--variants", "mha", "gqa", "--lr=1e30", "--clip=inf"], data_dir, tmp_path) == 1
    content = json.loads((tmp_path / "ablation_results.json").read_text())
    assert {r["status"] for r in content["runs"].values()} == {"diverged"}
    assert content["best"] == {}
