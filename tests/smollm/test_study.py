"""train.py's whole path on tiny models, and what it leaves behind."""

import dataclasses
import functools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from smollm.attention import MECHANISMS
from smollm.model.checkpoint import load_model, save_model
from smollm.model.config import ModelConfig, build_model
from smollm.studies import report, study
from smollm.training import metrics
from smollm.training.config import PRESETS, TrainConfig, check_config
from smollm.training.run import learning_rate, make_optimizer

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(embed_dim=36, num_layers=1, ffn_hidden_dim=48)
TINY = [
    "--preset=cpu", "--embed-dim=36", "--num-layers=1", "--ffn-hidden-dim=48", "--seq-len=32",
    "--batch-size=2", "--steps=6", "--warmup-steps=2", "--log-every=2", "--val-every=3",
    "--val-tokens=128", "--generate-tokens=4", "--latent-dim=16",
]  # fmt: skip


def run(flags, data_dir, output_dir, capture=None):
    console = Console(file=capture, width=80) if capture else Console(quiet=True)
    config = study.parse([*TINY, f"--data-dir={data_dir}", f"--output-dir={output_dir}", *flags])
    device, corpus = study.prepare(config)
    return study.run_study(config, corpus, device, console)


@pytest.fixture(scope="module")
def results(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with (folder / "console.txt").open("w") as capture:
        assert run([], data_dir, folder, capture) == 0
    return folder


def test_the_results_are_all_there(results):
    names = {path.name for path in results.iterdir()}
    expected = {"ablation_results.json", "report.md", "loss.png", "speed_and_memory.png"}
    expected |= {f"{m}_model.pt" for m in MECHANISMS} | set(MECHANISMS) | {"console.txt"}
    assert names == expected
    content = json.loads((results / "ablation_results.json").read_text())
    assert list(content["runs"]) == list(MECHANISMS)
    assert set(content["best"]) == {"loss", "throughput", "memory"}
    assert re.fullmatch(r"[0-9a-f]{64}", content["corpus"]["sha256"])
    assert content["versions"]["torch"] == torch.__version__
    assert content["config"]["train"]["steps"] == 6
    for mechanism, run_ in content["runs"].items():
        assert run_["status"] == "finished" and run_["steps"] == 6 and run_["tokens"] == 6 * 64
        assert math.isclose(run_["perplexity"], math.exp(run_["val_loss"]))
        for name, value in run_.items():
            assert value is not None or name == "mfu", name
        lines = (results / mechanism / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records[:-1]] == [1, 2, 3, 4, 6]
        assert [r["step"] for r in records[:-1] if "val_loss" in r] == [3, 6]
        assert records[-1]["val_loss"] == run_["val_loss"]


def test_the_console_ends_with_table_and_winners(results):
    text = (results / "console.txt").read_text()
    for title, _, _ in report.COLUMNS:
        assert title in text
    assert re.search(r"Best model by loss: \w{3}\nBest model by throughput: \w{3}\n", text)
    assert text.strip().endswith("ablation_results/") or "Results in" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_report_holds_table_and_plots(results):
    text = (results / "report.md").read_text()
    assert text.count("\n| ") == 5
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (results / image).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"!\[", text)) == 2


def test_saved_models_load(results):
    for mechanism in MECHANISMS:
        path = results / f"{mechanism}_model.pt"
        content = torch.load(path, weights_only=True)
        assert content["mechanism"] == mechanism and content["steps"] == 6
        model = load_model(path)
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, content["state_dict"][name])


def test_a_study_repeats_itself(results, data_dir, tmp_path):
    run(["--variants", "gqa", "mga"], data_dir, tmp_path)
    for mechanism in ("gqa", "mga"):
        first = torch.load(results / f"{mechanism}_model.pt", weights_only=True)["state_dict"]
        second = torch.load(tmp_path / f"{mechanism}_model.pt", weights_only=True)["state_dict"]
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulated_steps_equal_one_large_batch(data_dir, tmp_path):
    """Two micro-batches of two are the batch of four that they split."""
    flags = ["--variants", "gqa", "--steps=2", "--clip=1e9"]
    run([*flags, "--batch-size=4"], data_dir, tmp_path / "whole")
    run([*flags, "--batch-size=2", "--grad-accum=2"], data_dir, tmp_path / "split")
    whole, split = (
        json.loads((tmp_path / name / "ablation_results.json").read_text())["runs"]["gqa"][
            "history"
        ]
        for name in ("whole", "split")
    )
    for one, other in zip(whole, split, strict=True):
        assert one["tokens"] == other["tokens"]
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
        assert math.isclose(one["gradient_norm"], other["gradient_norm"], rel_tol=1e-4)


@pytest.mark.parametrize("flags", [["--document-mask"], ["--dtype=bfloat16"], ["--compile"]],
                         ids=["document-mask", "bfloat16", "compile"])  # fmt: skip
def test_options_train(flags, data_dir, tmp_path, monkeypatch):
    """Compilation goes as far as the captured graph; generating code would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert run(["--variants", "gqa", *flags], data_dir, tmp_path) == 0


def test_training_lowers_the_loss(data_dir, tmp_path):
    run(["--steps=40", "--val-every=40", "--lr=1e-2"], data_dir, tmp_path)
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    for mechanism in MECHANISMS:
        history = runs[mechanism]["history"]
        assert history[-1]["loss"] < history[0]["loss"] - 0.5
        assert history[-1]["val_loss"] < math.log(4096) - 0.5


def test_a_run_that_diverges_says_so(data_dir, tmp_path):
    assert run(["--variants", "mha", "gqa", "--lr=1e30", "--clip=1e30"], data_dir, tmp_path) == 0
    content = json.loads((tmp_path / "ablation_results.json").read_text())
    assert {r["status"] for r in content["runs"].values()} == {"diverged"}
    assert content["best"] == {}
    assert "MHA (diverged)" in (tmp_path / "report.md").read_text()


def test_evaluation_counts_every_target_once(corpus):
    train = TrainConfig(seq_len=32, batch_size=3, val_tokens=320, device="cpu")
    model = build_model("gqa", SMALL, corpus.vocab_size)
    measured = metrics.evaluate(model, corpus, train)
    ids = torch.cat(list(corpus.val.spread(1, 32, 10)))
    with torch.no_grad():
        logits = model(ids)["logits"]
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    size = int(corpus.token_bytes[ids[:, 1:]].sum())
    assert math.isclose(measured["val_loss"], float(nats) / 310, rel_tol=1e-5)
    assert math.isclose(measured["bits_per_byte"], float(nats) / math.log(2) / size, rel_tol=1e-5)


def test_the_schedule_warms_up_holds_and_decays():
    config = TrainConfig(steps=100, warmup_steps=10, decay_fraction=0.2, lr=2.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:80] == [2.0] * 71
    assert rates[90] == pytest.approx(1.0) and rates[99] == pytest.approx(0.1)
    assert learning_rate(0, dataclasses.replace(config, warmup_steps=0)) == 2.0


def test_what_decays():
    model = build_model("mga", SMALL, 50)
    decayed, others = (
        group["params"] for group in make_optimizer(model, TrainConfig()).param_groups
    )
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    assert all(re.search(r"\.(w_\w|out_proj|\w+_proj)\.weight$", names[id(p)]) for p in decayed)
    assert any("log_selection_pressure" in names[id(p)] for p in others)
    assert any("embed_tokens" in names[id(p)] for p in others)


REFUSALS = [
    (["--num-heads=7"], "num_heads: expected a divisor of embed_dim=36, got 7"),
    (["--num-kv-heads=2"], "num_kv_heads: expected a divisor of num_heads=9, got 2"),
    (["--window-size=0"], "window_size: expected >= 1"),
    (["--seq-len=4096"], "seq_len: expected at most max_seq_len=2048, got 4096"),
    (["--seq-len=1"], "seq_len: expected >= 2"),
    (["--steps=0"], "steps: expected > 0, got 0"),
    (["--decay-fraction=1.5"], "decay_fraction: expected between 0 and 1, got 1.5"),
    (["--qk-norm=rms"], "qk_norm: expected 'none' with mga"),
    (["--variants", "mha", "mha"], "variants: expected distinct mechanisms"),
    (["--val-tokens=16"], "val_tokens: expected >= seq_len=32, got 16"),
    (["--device=cuda"], "device: expected 'cpu' or 'auto' (PyTorch sees no GPU), got 'cuda'"),
    (["--corpus=pile"], "corpus: expected one prepared under"),
]


@pytest.mark.parametrize(("flags", "text"), REFUSALS, ids=[flags[0] for flags, _ in REFUSALS])
def test_bad_flags_cost_no_training(flags, text, data_dir, tmp_path, capsys):
    output = tmp_path / "results"
    arguments = [*TINY, f"--data-dir={data_dir}", f"--output-dir={output}", *flags]
    assert study.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {text}")
    assert not list(tmp_path.rglob("*.pt"))


def test_unknown_choices_are_refused_with_the_known_ones(capsys):
    for flags in (["--preset=huge"], ["--norm-strategy=peri"], ["--variants", "mqa"]):
        with pytest.raises(SystemExit) as stop:
            study.parse(flags)
        assert stop.value.code == 2
    assert "pre" in capsys.readouterr().err


def test_presets_are_what_the_readme_says():
    ablation = PRESETS["ablation"]
    assert (ablation.model.num_layers, ablation.model.embed_dim, ablation.model.num_heads) == (
        4,
        576,
        9,
    )
    train = ablation.train
    assert (train.seq_len, train.batch_size, train.steps) == (512, 4, 1000)
    full = PRESETS["smollm2-135m"]
    assert full.train.batch_size * full.train.grad_accum * full.train.seq_len == 1_048_576
    for config in PRESETS.values():
        check_config(config, 100)
    with torch.device("meta"):
        assert build_model("gqa", full.model, 49152).count_parameters() == 134_515_008


@pytest.mark.parametrize("when", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_keeps_the_results_so_far(when, data_dir, tmp_path):
    command = [sys.executable, "train.py", *TINY, "--steps=100000", "--val-every=100000"]
    command += [f"--data-dir={data_dir}", f"--output-dir={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "mha" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.kill(process.pid, when)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. Results so far in" in output
    content = json.loads((tmp_path / "ablation_results.json").read_text())
    assert content["runs"]["mha"]["status"] == "interrupted"
    assert content["runs"]["mha"]["train_loss"] > 0 and content["runs"]["mha"]["val_loss"] is None
    load_model(tmp_path / "mha_model.pt")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="expected a model saved by save_model"):
        load_model(path)
    save_model(path, build_model("mha", SMALL, 50), "mha", SMALL, note="kept")
    assert torch.load(path, weights_only=True)["note"] == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_help_explains_every_flag():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in [*names, *ModelConfig().flags]:
        assert f"--{name.replace('_', '-')}" in done.stdout, name


def test_the_cost_table():
    done = subprocess.run(
        [sys.executable, "-m", "smollm"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for figure in ("134,515,008", "69,120", "23,040", "19,200", "1.02"):
        assert figure in done.stdout


GUIDE = re.findall(
    r"^python train\.py (.*)$", (ROOT / "ABLATION_GUIDE.md").read_text(), re.MULTILINE
)


def test_the_guide_covers_the_study():
    text = "\n".join(GUIDE)
    for flag in ("norm-strategy sandwich", "qk-norm rms", "window-size 1024", "num-kv-heads 1",
                 "latent-dim 432", "num-heads 12", "environment none"):  # fmt: skip
        assert f"--{flag}" in text
    assert len(GUIDE) == len(set(GUIDE)) > 20


@pytest.mark.parametrize("command", GUIDE, ids=[line.split("/")[-1] for line in GUIDE])
def test_every_command_of_the_guide_runs(command, data_dir, tmp_path):
    flags = shlex.split(command)
    for preset in ("cpu", "ablation"):
        config = study.parse([f"--preset={preset}", *flags])
        check_config(config, 4096)
    config = study.parse(["--preset=cpu", *flags])
    short = {
        "steps": 1,
        "seq_len": 16,
        "val_tokens": 16,
        "generate_tokens": 1,
        "data_dir": data_dir,
    }
    config = dataclasses.replace(
        config,
        output_dir=tmp_path,
        train=dataclasses.replace(config.train, **short),
        model=dataclasses.replace(config.model, num_layers=1),
    )
    device, corpus = study.prepare(config)
    assert study.run_study(config, corpus, device, Console(quiet=True)) == 0
