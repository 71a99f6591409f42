"""What a study runs: flags, files, and the runs that follow from them."""

import dataclasses
import json

import pytest
import torch
from study_cases import tiny

from smollm.attention import MECHANISMS
from smollm.model.build import build_model
from smollm.studies import commands, plan
from smollm.studies.plan import cells, parse
from smollm.studies.plan_file import PLAN, write_plan
from smollm.training.config import PRESETS


def names(*flags):
    return [cell.name for cell in cells(parse(["--preset=cpu", *flags]))]


def written(folder, config):
    write_plan(folder, config)
    return folder / PLAN


@pytest.mark.parametrize(("gpu", "driver"), [(True, False), (False, True)], ids=["gpu", "driver"])
def test_pytorch_chooses_the_preset(gpu, driver, tmp_path, monkeypatch, capsys):
    """The driver only suggests whose defaults help shows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(plan, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    preset = PRESETS["ablation" if gpu else "cpu"]
    train = dataclasses.replace(preset.train, lr=0.5)
    assert parse(["--lr=0.5"]) == dataclasses.replace(preset, train=train)
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    said, shown = capsys.readouterr().out, "ablation" if driver else "cpu"
    assert stop.value.code == 0 and f"Defaults shown are those of --preset {shown}." in said
    assert f"(default: {PRESETS[shown].train.steps})" in said


def test_what_is_refused_waits_for_no_pytorch(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("PyTorch was asked"))
    assert commands.main(["--lr=-1"]) == 2
    assert capsys.readouterr().err == "train.py: lr: expected in (0, inf), got -1.0\n"
    for flag in ("--nothing", "--seq-len=many"):
        with pytest.raises(SystemExit) as stop:
            commands.main([flag])
        assert stop.value.code == 2


def test_a_study_is_one_run_a_variant():
    assert names() == list(MECHANISMS)
    assert names("--only-mga") == ["mga"]
    config = parse(["--preset=cpu"])
    assert all(cell.config == config for cell in cells(config))


def test_seeds_and_a_grid_multiply_the_runs():
    assert names("--variants", "mha", "mga", "--seeds", "1", "2") == [
        "mha-seed=1", "mga-seed=1", "mha-seed=2", "mga-seed=2",
    ]  # fmt: skip
    flags = ["--variants", "mha", "--grid", "lr=1e-3,3e-3", "document-mask=true,false"]
    found = cells(parse([*flags, "--seeds", "5"]))
    assert [cell.name for cell in found] == [
        f"mha-lr={lr}-document_mask={mask}-seed=5" for lr in ("1e-3", "3e-3")
        for mask in ("true", "false")
    ]  # fmt: skip
    made = [(c.config.train.lr, c.config.train.document_mask, c.config.train.seed) for c in found]
    assert made == [(1e-3, True, 5), (1e-3, False, 5), (3e-3, True, 5), (3e-3, False, 5)]


def test_a_field_multiplies_those_alone_that_it_changes():
    assert names("--grid", "window_size=64,None", "latent_dim=36,72", "num_kv_heads=1,3") == [
        "mha-window_size=64", "gqa-window_size=64-num_kv_heads=1",
        "mla-window_size=64-latent_dim=36", "mga",
        "gqa-window_size=64-num_kv_heads=3", "mla-window_size=64-latent_dim=72",
        "mha-window_size=None", "gqa-window_size=None-num_kv_heads=1",
        "mla-window_size=None-latent_dim=36", "gqa-window_size=None-num_kv_heads=3",
        "mla-window_size=None-latent_dim=72",
    ]  # fmt: skip
    (cell,) = cells(parse(["--preset=cpu", "--only-mga", "--grid", "lr=0.5", "num_heads=3"]))
    assert (cell.config.train.lr, cell.config.model.num_heads, cell.name) == (0.5, 3, "mga")
    assert names("--variants", "mha", "--grid", "embed_dim=144,288") == [
        "mha-embed_dim=144", "mha-embed_dim=288",
    ]  # fmt: skip


def test_an_override_is_one_variants_own():
    flags = ["--override", "mga.lr=2e-3", "mga.selection-pressure=2", "--grid", "clip=1,inf"]
    for cell in cells(parse(flags)):
        mga = cell.variant == "mga"
        assert cell.config.train.lr == (2e-3 if mga else 3e-3)
        pressure = cell.config.model.mechanisms["mga"].selection_pressure
        assert pressure == (2 if mga else 4) and cell.config.train.clip in (1, float("inf"))
    swept = cells(parse(["--override", "mga.lr=2e-3", "--grid", "lr=1e-3,4e-3"]))
    assert {cell.config.train.lr for cell in swept if cell.variant == "mga"} == {1e-3, 4e-3}


ITEMS = [
    ("window_pattern", "128+64+full", (128, 64, "full")), ("window_pattern", "full", ("full",)),
    ("window_pattern", "None", ()), ("contexts", "16+32", (16, 32)),
    ("rope_scaling", "8+1+4+1e4", (8, 1, 4, 1e4)), ("rope_scaling", "None", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "items"), ITEMS, ids=[f"{n}={t}" for n, t, _ in ITEMS])
def test_items_of_a_field_are_joined(name, text, items):
    (cell,) = cells(
        parse(["--preset=cpu", "--variants", "gqa", "--override", f"gqa.{name}={text}"])
    )
    assert (vars(cell.config.train) | cell.config.model.flags)[name] == items


def test_a_grid_over_a_field_of_several_items():
    flags = ["--variants", "mha", "mga", "--grid", "window_pattern=None,128+full"]
    assert names(*flags) == [
        "mha-window_pattern=None", "mga", "mha-window_pattern=128+full",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        names("--grid", "window_pattern=128+half")


def test_lists_in_tables(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'variants = ["mha", "gqa"]\n[grid]\nwindow_pattern = [[8, "full"], "full"]\n'
        "[gqa]\ncontexts = []\nrope_scaling = [8.0, 1.0, 4.0, 1e16]"
    )
    config = parse(["study", str(path)])
    for again in (config, parse(["study", str(written(tmp_path, config))])):
        found = {cell.name: cell.config for cell in cells(again)}
        assert list(found) == [
            f"{m}-window_pattern={w}" for w in ("8+full", "full") for m in ("mha", "gqa")
        ]
        gqa = found["gqa-window_pattern=8+full"]
        assert gqa.train.contexts == () and gqa.model.window_pattern == (8, "full")
        assert gqa.model.rope_scaling == (8, 1, 4, 1e16)


@pytest.mark.parametrize("what", ["params", "flops"])
@pytest.mark.parametrize("preset", ["cpu", "smollm2-135m"])
def test_variants_are_matched_to_the_first(what, preset):
    flags = [f"--preset={preset}", f"--match={what}", "--grid", "window_size=64,None"]
    costs = {}
    for cell in cells(parse(flags)):
        with torch.device("meta"):
            model = build_model(cell.variant, cell.config.model, 4096)
        flops = model.flops_per_token(cell.config.train.seq_len)
        cost = model.count_parameters() if what == "params" else flops
        costs.setdefault(cell.point.get("window_size"), []).append(cost)
        if cell.variant == "mha":
            assert cell.config.model.ffn_hidden_dim == parse(flags).model.ffn_hidden_dim
    for found in costs.values():
        assert max(found) / min(found) < 1.01 or len(found) == 1
    assert len(costs["64"]) == len(costs["None"]) == 3


def test_matching_needs_room(data_dir, tmp_path, capsys):
    flags = ["--match=params", "--variants", "gqa", "mha", "--override", "gqa.ffn_hidden_dim=1"]
    assert commands.main(tiny(flags, data_dir, tmp_path)) == 2
    assert "match: expected room for a feed-forward layer in mha" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "text"), [
    (["--match=params", "--grid", "ffn_hidden_dim=8,9"], "match: expected no grid over ffn_hidden"),
    (["--grid", "lr"], "grid: expected FIELD=VALUE, got 'lr'"),
    (["--grid", "speed=1,2"], "grid: expected a field of training or of the model, but ["),
    (["--grid", "seed=1,2"], "grid: expected a field of training or of the model, but ["),
    (["--grid", "output_dir=a"], "grid: expected a field of training or of the model, but ["),
    (["--grid", "lr=1e-3,"], "grid: expected lr=VALUE, got lr="),
    (["--grid", "optimizer=../x"], "grid: expected optimizer=VALUE, got optimizer=../x"),
    (["--grid", "corpus=a,b"], "grid: expected a field of training or of the model, but ['corp"),
    (["--override", "mga.device=cpu"], "override: expected a field of training or of the model, "),
    (["--grid", "seq_len=32,10000000"], "seq_len: expected at most max_seq_len=2048, got 10000000"),
    (["--grid", "seq_len=32,2000000", "--max-seq-len=3000000", "--val-tokens=2000000"],
     "seq_len: expected at most the tokens of a shard"),
    (["--match=params", "--override", "mga.embed_dim=72"], "match: expected mha's embed_dim=36"),
    (["--grid", "lr=1,1"], "grid: expected distinct values of lr, got 1,1"),
    (["--grid", "lr=1", "lr=2"], "grid: expected each field once, got lr=1 lr=2"),
    (["--grid", "lr=1e-3,nan"], "lr: expected in (0, inf), got nan"),
    (["--grid", "num_heads=9,7"], "num_heads: expected a divisor of embed_dim=36, got 7"),
    (["--override", "lr=1"], "override: expected VARIANT.FIELD=VALUE, got 'lr=1'"),
    (["--override", "mqa.lr=1"], "override: expected a field of mha, gqa, mla, mga, in a"),
    (["--override", "mga.speed=1"], "override: expected a field of training or of the model, but"),
    (["--seeds", "1", "1"], "seeds: expected distinct ones, got (1, 1)"),
    (["--seeds", "-1"], "seeds: expected in [0, 9.22337e+18], got -1"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_makes_no_study_is_refused(flags, text, data_dir, tmp_path, capsys):
    assert commands.main(tiny(flags, data_dir, tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {text}")


@pytest.mark.parametrize("flags", [
    [], ["--preset=ablation"], ["--preset=smollm2-135m", "--clip=inf", "--document-mask"],
    ["--seeds", "1", "2", "--grid", "lr=1e-3,3e-3", "window_size=64,None", "bias=true,false",
     "--match=params", "--override", "gqa.num_kv_heads=1", "mga.lr=1e-3", "--window-size=5",
     "--num-kv-heads=9"],
], ids=["default", "ablation", "135m", "all"])  # fmt: skip
def test_a_study_is_a_file_that_runs_again(flags, tmp_path):
    config = parse(flags)
    write_plan(tmp_path, config)
    assert parse(["study", str(tmp_path / PLAN)]) == config
    changed = parse(["study", str(tmp_path / PLAN), "--lr=0.5", "--variants", "mha"])
    train = dataclasses.replace(config.train, lr=0.5)
    assert changed == dataclasses.replace(config, train=train, variants=("mha",))


def test_a_file_by_hand(data_dir, tmp_path):
    path, folder = tmp_path / "mine.toml", tmp_path / "results"
    flags = [x[2:].split("=") for x in tiny([], data_dir, folder) if "=" in x]
    lines = [f"{n.replace('-', '_')} = {v if v.isdigit() else json.dumps(v)}" for n, v in flags]
    lines += ['variants = ["mha", "gqa"]', "generate_tokens = 0", "document_mask = true"]
    lines += ["[grid]", "steps = [2, 3]", "[gqa]", "num_kv_heads = 1"]
    lines = [line for line in lines if line not in ("steps = 6", "generate_tokens = 4")]
    path.write_text("\n".join(lines))
    assert commands.main(["study", str(path), "--log-every=1"]) == 0
    runs = json.loads((folder / "ablation_results.json").read_text())["runs"]
    assert {name: run["steps"] for name, run in runs.items()} == {
        "mha-steps=2": 2, "gqa-steps=2": 2, "mha-steps=3": 3, "gqa-steps=3": 3,
    }  # fmt: skip
    assert all(len(run["history"]) == run["steps"] for run in runs.values())
    assert runs["gqa-steps=2"]["parameters"] < runs["mha-steps=2"]["parameters"]
    assert (folder / "gqa-steps=3" / "metrics.jsonl").exists()
    assert (folder / "mha-steps=2_model.pt").exists()


@pytest.mark.parametrize(("content", "text"), [
    ("steps = ", "expected a study's file, got Invalid value"),
    ("grid = 3", "grid: expected a table, got 3"),
], ids=["not-toml", "no-table"])  # fmt: skip
def test_a_file_that_is_no_study_is_refused(content, text, tmp_path, capsys):
    path = tmp_path / "study.toml"
    path.write_text(content)
    assert commands.main(["study", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {path}: {text}")
    assert commands.main(["study"]) == 2
    assert "study: expected the path of a study's file" in capsys.readouterr().err
    path.write_text("speed = 3")
    with pytest.raises(SystemExit):
        commands.main(["study", str(path)])
    assert "speed" in capsys.readouterr().err
