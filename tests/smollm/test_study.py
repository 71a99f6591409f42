"""train.py's whole path on tiny models, and what it leaves behind."""

import dataclasses
import functools
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from study_cases import ALONE, ROOT, TINY, run, tiny

from smollm.attention import MECHANISMS
from smollm.model.build import build_model
from smollm.model.checkpoint import load_model
from smollm.model.config import ModelConfig
from smollm.studies import commands, plan, report, study
from smollm.training.checks import check_config
from smollm.training.config import PRESETS, TrainConfig


@pytest.fixture(scope="module")
def results(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with (folder / "console.txt").open("w") as capture:
        assert run([], data_dir, folder, capture) == 0
    return folder


def test_the_results_are_all_there(results):
    names = {path.name for path in results.iterdir()}
    expected = {"ablation_results.json", "report.md", "loss.png", "speed_and_memory.png"}
    expected |= {"study.toml", "report.html", "trade_offs.png", "tokenizer.json"}
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
            assert value is not None or name in ("mfu", "error", "traceback", "seed"), name
        lines = (results / mechanism / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert records == run_["history"]
        assert [r["step"] for r in records] == [1, 2, 3, 4, 6]
        assert [r["step"] for r in records if r["val_loss"] is not None] == [3, 6]
        assert len({tuple(r) for r in records}) == 1
        assert records[-1]["val_loss"] == run_["val_loss"]


def test_the_console_ends_with_table_and_winners(results):
    text = (results / "console.txt").read_text()
    for title, _, _ in report.COLUMNS:
        assert title in text
    assert re.search(
        r"Best model by loss: \w{3}, of one seed each\nBest model by throughput: ", text
    )
    assert "No spread is known of one seed: `--seeds 1 2 3`" in text
    assert text.endswith(f"Results in {results}/\n")
    command = "`python -m smollm.data --corpus fineweb-edu-dedup --shards 2`"
    assert any(command in line for line in text.splitlines())


def test_the_report_holds_table_and_plots(results):
    text = (results / "report.md").read_text()
    compared, inference = text.split("| Model |")[1:]
    assert compared.count("\n| ") == 4 and inference.count("\n| ") == 8
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (results / image).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"!\[", text)) == 3
    page = (results / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and "<td" in page and ".png" not in page


def test_the_report_says_the_type(results):
    content = json.loads((results / "ablation_results.json").read_text())
    assert {run_["config"]["dtype"] for run_ in content["runs"].values()} == {content["dtype"]}
    for name in ("report.md", "console.txt"):
        text = (results / name).read_text()
        assert re.search(rf"Run: preset .*seed 8, {content['dtype']}\n", text), name


def test_saved_models_load(results):
    about = json.loads((results / "ablation_results.json").read_text())
    for mechanism in MECHANISMS:
        path = results / f"{mechanism}_model.pt"
        content = torch.load(path, weights_only=True)
        assert content["mechanism"] == mechanism and content["steps"] == 6
        assert content["seed"] == 8 and content["config"]["train"]["beta2"] == 0.95
        assert content["git_commit"] == about["git_commit"]
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
    flags = ["--variants", "gqa", "--steps=2", "--clip=inf", "--document-mask"]
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


@pytest.mark.parametrize("flags", [
    ["--document-mask"], ["--dtype=bfloat16"], ["--compile=on"], ["--optimizer=muon"],
    ["--schedule=cosine"], ["--activation-checkpointing"],
], ids=lambda flags: flags[0])  # fmt: skip
def test_options_train(flags, data_dir, tmp_path, monkeypatch):
    """Compilation goes as far as the captured graph; generating code would take a minute."""
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    assert run(["--variants", "gqa", *flags], data_dir, tmp_path) == 0
    result = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]["gqa"]
    assert (result["compile_seconds"] > 0) == (flags == ["--compile=on"])


def test_inference_is_measured_at_each_context(data_dir, tmp_path):
    flags = ["--variants", "mga", "--contexts", "8", "100", "2047", "--steps=1", "--warmup-steps=0"]
    assert run(flags, data_dir, tmp_path) == 0
    result = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]["mga"]
    assert [measured["context"] for measured in result["inference"]] == [8, 100]
    for measured in result["inference"]:
        assert measured["prefill_tokens_per_second"] > 0
        assert measured["decode_tokens_per_second"] > 0
    assert "| MGA | 100 |" in (tmp_path / "report.md").read_text()


def test_training_lowers_the_loss(data_dir, tmp_path):
    run(["--steps=25", "--val-every=25", "--lr=1e-2"], data_dir, tmp_path)
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    for mechanism in MECHANISMS:
        history = runs[mechanism]["history"]
        assert history[-1]["loss"] < history[0]["loss"] - 0.5
        assert history[-1]["val_loss"] < math.log(4096) - 0.5


REFUSALS = [
    (["--num-heads=7"], "num_heads: expected a divisor of embed_dim=36, got 7"),
    (["--num-kv-heads=2"], "num_kv_heads: expected a divisor of num_heads=9, got 2"),
    (["--window-size=0"], "window_size: expected in [1, 1e+09], got 0"),
    (["--seq-len=4096"], "seq_len: expected at most max_seq_len=2048, got 4096"),
    (["--seq-len=1"], "seq_len: expected in [2, 1e+09], got 1"),
    (["--contexts", "128", "0"], "contexts: expected in [1, 1e+09], got 0"),
    (["--steps=0"], "steps: expected in [1, 1e+09], got 0"),
    (["--decay-fraction=1.5"], "decay_fraction: expected in [0, 1], got 1.5"),
    (["--num-heads=0"], "num_heads: expected in [1, 1e+06], got 0"),
    (["--lr=nan"], "lr: expected in (0, inf), got nan"),
    (["--seed=18446744073709551616"], "seed: expected in [0, 9.22337e+18], got 184467440737"),
    (["--warmup-steps=7"], "warmup_steps: expected at most steps=6, got 7"),
    (["--only-mga", "--variants", "mha"], "only_mga: expected no other variants beside it, got"),
    (["--qk-norm=rms"], "qk_norm: expected 'none' with mga"),
    (["--variants", "mha", "mha"], "variants: expected distinct ones, got mha mha"),
    (["--val-tokens=16"], "val_tokens: expected >= seq_len=32, got 16"),
    (["--device=cuda"], "device: expected 'cpu' or 'auto' (PyTorch sees no GPU), got 'cuda'"),
    (["--corpus=pile"], "corpus: expected one prepared under"),
]


@pytest.mark.parametrize(("flags", "text"), REFUSALS, ids=[flags[0] for flags, _ in REFUSALS])
def test_bad_flags_cost_no_training(flags, text, data_dir, tmp_path, capsys):
    output = tmp_path / "results"
    arguments = [*TINY, f"--data-dir={data_dir}", f"--output-dir={output}", *flags]
    assert commands.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {text}")
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("results", ".lock")]


def test_a_study_keeps_out_of_an_older_ones_folder(data_dir, tmp_path, capsys):
    assert commands.main(tiny(["--variants", "mha"], data_dir, tmp_path)) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "mha" / "notes.txt").write_text("mine")
    (tmp_path / "my_model.pt").write_text("mine")
    (tmp_path / "mla").write_text("mine")
    capsys.readouterr()
    again = tiny(["--variants", "gqa"], data_dir, tmp_path)
    assert commands.main(again) == 2
    words = capsys.readouterr().err
    assert words.startswith("train.py: output_dir: expected a folder without another study's files")
    assert "mha_model.pt" in words and "--overwrite" in words and "--output-dir" in words
    assert all(path.stat().st_mtime_ns == t for path, t in before.items() if path.suffix)
    assert commands.main([*again, "--overwrite"]) == 0
    assert json.loads((tmp_path / "ablation_results.json").read_text())["runs"].keys() == {"gqa"}
    assert not (tmp_path / "mha_model.pt").exists() and (tmp_path / "gqa_model.pt").exists()
    assert [path.name for path in (tmp_path / "mha").iterdir()] == ["notes.txt"]
    assert (tmp_path / "my_model.pt").read_text() == (tmp_path / "mla").read_text() == "mine"


@pytest.mark.parametrize("left", ["ablation_results.json", "mla_model.pt", "mga/metrics.jsonl"])
def test_any_file_of_another_study_counts(left, data_dir, tmp_path, capsys):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("older")
    assert commands.main(tiny(["--variants", "mha"], data_dir, tmp_path)) == 2
    assert f"with {left};" in capsys.readouterr().err
    assert (tmp_path / left).read_text() == "older"


def test_a_folder_that_cannot_be_written_is_refused(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "load_corpus", None)  # nothing is loaded before
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "gqa").write_text("mine")
    (tmp_path / "folder" / "gqa_model.pt").mkdir(parents=True)
    allowed = os.access
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and allowed(path, mode))
    for output in ("file", "file/below", "taken", "folder", "closed"):
        assert commands.main(tiny(["--overwrite"], data_dir, tmp_path / output)) == 2
        words = capsys.readouterr().err
        assert words.startswith("train.py: output_dir: expected a folder that can be written, got ")
        assert words.count("\n") == 1
    assert (tmp_path / "taken" / "gqa").read_text() == "mine"


def test_unknown_choices_are_refused_with_the_known_ones(capsys):
    for flags in (["--preset=huge"], ["--norm-strategy=peri"]):
        with pytest.raises(SystemExit) as stop:
            plan.parse(flags)
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


def test_gradient_norms_leave_out_the_warm_up(data_dir, tmp_path):
    flags = ["--variants", "gqa", "--log-every=1", "--clip=2.75"]
    run(flags, data_dir, tmp_path)
    result = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]["gqa"]
    norms = [r["gradient_norm"] for r in result["history"]][2:]
    assert len(norms) == 4
    assert math.isclose(result["gradient_norm_mean"], sum(norms) / 4)
    assert result["gradient_norm_max"] == max(norms)
    assert result["clipped_steps"] == sum(norm > 2.75 for norm in norms)


def help_of(*command):
    """What a command says of itself, with no library loaded that takes long to."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "tyro" in loaded
    assert not loaded & {"torch", "numpy", "matplotlib", "datasets", "pyarrow", "tokenizers"}
    return done


def test_help_explains_every_flag_and_loads_little():
    done = help_of("train.py")
    assert re.search(r"Defaults shown are those of --preset (cpu|ablation)\.", done.stdout)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in [*names, *ModelConfig().flags]:
        assert f"--{name.replace('_', '-')}" in done.stdout, name
    assert "--data-files" in help_of("-m", "smollm.data").stdout


@pytest.mark.parametrize(
    ("command", "flag"), [("sample", "--prompt"), ("evaluate", "--corpus"), ("export", "--to")]
)
def test_help_for_a_trained_run_loads_little(command, flag):
    done = help_of("train.py", command)
    assert f"train.py {command} [-h]" in done.stdout
    assert flag in done.stdout and "--variant" in done.stdout


def test_the_cost_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smollm"])
    runpy.run_module("smollm", run_name="__main__")
    printed = capsys.readouterr().out
    for figure in ("134,515,008", "69,120", "23,040", "19,200", "103,680", "2,048", "1.02"):
        assert figure in printed


GUIDE = re.findall(
    r"^python train\.py (.*)$", (ROOT / "ABLATION_GUIDE.md").read_text(), re.MULTILINE
)


FIRST = {  # of commands that differ in numbers alone
    re.sub(r"--output-dir .*|\d+", "", command): command for command in reversed(GUIDE)
}.values()


def test_the_guide_covers_the_study():
    text = "\n".join(GUIDE)
    for flag in ("norm-strategy sandwich", "qk-norm rms", "window-size 1024", "num-kv-heads 1",
                 "latent-dim 432", "num-heads 12", "environment none",
                 "window-pattern 256", "nope-every 4", "sinks"):  # fmt: skip
        assert f"--{flag}" in text
    assert len(GUIDE) == len(set(GUIDE)) > 20


@pytest.mark.parametrize("command", GUIDE, ids=[line.split("/")[-1] for line in GUIDE])
def test_every_command_of_the_guide_runs(command, data_dir, tmp_path, monkeypatch):
    """Or is one of those that differ in numbers alone from one that runs, and is accepted."""
    monkeypatch.setattr(report, "write_report", lambda *_: None)  # its plots take longer
    flags = shlex.split(command)
    for preset in ("ablation", "cpu"):
        config = plan.parse([f"--preset={preset}", *flags])
        plan.check(config)
    if command not in FIRST:
        return
    short = {
        "steps": 1,
        "seq_len": 16,
        "val_tokens": 16,
        "generate_tokens": 1,
        "contexts": (8,),
        "data_dir": data_dir,
    }
    config = dataclasses.replace(
        config,
        output_dir=tmp_path,
        train=dataclasses.replace(config.train, **short),
        model=dataclasses.replace(config.model, num_layers=1),
    )
    assert study.run_study(config, study.prepare(config), ALONE, Console(quiet=True)) == 0
