"""Variants of any name: their layers and fields, the files of their runs, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from study_cases import blank_plots, run, tiny

from smollm.model.checkpoint import load_model
from smollm.studies import commands
from smollm.studies.compare import at_their_best, group
from smollm.studies.folder import clear, read_runs
from smollm.studies.plan import cells, parse
from smollm.studies.plan_file import PLAN, write_plan
from smollm.studies.trained import open_run
from smollm.studies.variants import check_variants
from smollm.training.config import PRESETS, Config
from smollm.training.record import title_of

NAMED = [
    "--variants", "mha", "mha-norm", "mga-0.5", "mga+mha", "--override", "mha-norm.layers=mha",
    "mha-norm.qk_norm=rms", "mga-0.5.layers=mga+mha", "mga-0.5.selection-pressure=0.5",
    "mga+mha.lr=1e-3",
]  # fmt: skip
FILE = """
variants = ["mha", "mha-norm", "mga-0.5", "mga+mha"]
[mha-norm]
layers = "mha"
qk_norm = "rms"
["mga-0.5"]
layers = ["mga", "mha"]
selection_pressure = 0.5
["mga+mha"]
lr = 1e-3
"""


def shapes(config):
    found = {}
    for cell in cells(config):
        model = cell.config.model
        layers = [row.name for row, _ in model.layer_arguments(cell.variant)]
        pressure = model.mechanisms["mga"].selection_pressure
        found[cell.name] = layers, model.qk_norm, pressure, cell.config.train.lr
    return found


@pytest.mark.parametrize("given", ["flags", "file"])
def test_a_variant_is_a_name_with_fields_of_its_own(given, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    config = parse(["--preset=cpu", *NAMED] if given == "flags" else ["study", str(path)])
    expected = {
        "mha": (["mha"], "none", 4, 3e-3), "mha-norm": (["mha"], "rms", 4, 3e-3),
        "mga-0.5": (["mga", "mha"], "none", 0.5, 3e-3),
        "mga+mha": (["mga", "mha"], "none", 4, 1e-3),
    }  # fmt: skip
    assert shapes(config) == expected
    write_plan(tmp_path, config)
    again = parse(["study", str(tmp_path / PLAN)])
    assert shapes(again) == expected and again.variants == config.variants
    one = parse(["study", str(tmp_path / PLAN), "--variants", "mha-norm"])
    assert shapes(one) == {"mha-norm": expected["mha-norm"]}


def test_layers_of_one_variant_are_a_flag_or_a_grid():
    for flags in (["--layers", "mha", "mga"], ["--grid", "layers=mha+mga"]):
        found = shapes(parse(["--preset=cpu", "--variants", "mixed", *flags]))
        assert [layers for layers, *_ in found.values()] == [["mha", "mga"]]
    swept = ["--preset=cpu", "--variants", "a", "mha", "--grid", "lr=1e-3,2e-3"]
    swept += ["--override", "a.layers=mha", "--match=flops", "--seeds", "1", "2"]
    assert [c.name for c in cells(parse(swept))] == [
        f"{variant}-lr={lr}-seed={seed}"
        for seed in (1, 2) for lr in ("1e-3", "2e-3") for variant in ("a", "mha")
    ]  # fmt: skip
    alike = ["--preset=cpu", "--variants", "a", "--grid", "layers=mha,mha+mha,mha+mga"]
    assert len(cells(parse(alike))) == 3
    alike[-1] = "layers=mha,mha+mha"
    assert [cell.name for cell in cells(parse(alike))] == ["a"]


def test_titles():
    names = ("mha", "mha+mga", "mha-norm", "mha+mine", "mine")
    assert [title_of(n) for n in names] == ["MHA", "MHA+MGA", "mha-norm", "mha+mine", "mine"]


def test_a_fields_values_matter_wherever_they_do():
    """Biases of attention that are those of all make no difference until these change."""
    flags = ["--preset=cpu", "--variants", "mha", "--grid", "bias=false,true"]
    found = cells(parse([*flags, "attention_bias=auto,none"]))
    assert len({(c.config.model.bias, c.config.model.attention_bias) for c in found}) == 4


@pytest.mark.parametrize(("flags", "text"), [
    (["--variants", "mqa"],
     'variants: expected mha, gqa, mla, mga, several of them joined by "+", or a name that layers '
     "are given to, as by --override mqa.layers=mha, got 'mqa'"),
    (["--variants", "mha+mqa"], "variants: expected mha, gqa, mla, mga, several of them"),
    (["--variants", "a", "--layers", "mqa"], "layers: expected one of ['mha', "),
    (["--layers", "mha", "mga"],
     "layers: expected them of one variant, since all 4 would be alike, got mha+mga; choose it "
     "with --variants NAME, or give them to one with --override NAME.layers=mha+mga"),
    (["--variants", "mga", "--layers", "mha"],
     "layers: expected none of mga, whose name tells them, got mha; --variants takes another name"),
    (["--variants", "mha", "b", "--override", "a.layers=mha"], "variants: expected mha, gqa"),
    (["--override", "mag.lr=1"], "override: expected a field of mha, gqa, mla, mga, in a study's "
     "file a table of that name, got one of 'mag'"),
    (["--override", ".lr=1"], "override: expected VARIANT.FIELD=VALUE, got '.lr=1'"),
    *((["--variants", name], "variants: expected names of letters, digits and _, joined by - or + "
       f"or with . before a digit, none of them a field's, got {name!r}")
      for name in ("../x", "a/b", "a--b", "a-", "report.md", ".x", "a=b", "é", "a b", "grid", "lr",
                   "variants")),
    (["--only-mga", "--variants", "mha"], "only_mga: expected no other variants beside it, got"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_is_no_variant_is_refused(flags, text, data_dir, tmp_path, capsys):
    assert commands.main(tiny(flags, data_dir, tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {text}")


def test_a_misspelt_table_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "cpu"\nvariants = ["mha", "mga"]\n[mag]\nenvironment = "kin"')
    assert commands.main(["study", str(path)]) == 2
    assert "override: expected a field of mha, mga, in a study's" in capsys.readouterr().err


def test_only_mga_is_its_variants():
    only = dataclasses.replace(PRESETS["cpu"], only_mga=True)
    check_variants(only)
    check_variants(dataclasses.replace(only, variants=("mga",)))
    assert Config(only_mga=True).chosen == ("mga",)


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """A study of a named variant and a joined one at two rates, and of one more seed of it."""
    folder = tmp_path_factory.mktemp("named")
    flags = ["--variants", "mine", "mha+mga", "--num-layers=2", "--grid", "lr=1e-3,2e-3"]
    flags += ["--override", "mine.layers=mga+mha", "mine.environment=kin"]
    with pytest.MonkeyPatch.context() as patched:
        blank_plots(patched)
        assert run(flags, data_dir, folder) == 0
    return folder


def test_runs_of_named_variants_are_compared_and_rebuilt(folder, capsys):
    runs = list(read_runs(folder).values())
    assert [each.name for each in runs] == [
        f"{v}-lr={lr}" for lr in ("1e-3", "2e-3") for v in ("mine", "mha+mga")
    ]  # fmt: skip
    best = at_their_best(group(runs))
    assert [each.title.split()[0] for each in best] == ["mine", "MHA+MGA"]
    assert "| mine lr=0.001 |" in (folder / "report.md").read_text()
    trained = open_run(folder, "mine-lr=1e-3", "cpu")
    kinds = [type(attention).__name__ for attention in trained.model.attentions]
    assert kinds == ["MultiHeadGeneticAttention", "MultiHeadAttention"]
    assert trained.model.attentions[0].environment == "kin"
    content = torch.load(folder / "mine-lr=1e-3_model.pt", weights_only=True)
    for name, value in load_model(folder / "mine-lr=1e-3_model.pt").state_dict().items():
        assert torch.equal(value, content["state_dict"][name])
    for command in (["evaluate"], ["sample", "--prompt=It", "--max-new-tokens=2"]):
        argv = [command[0], str(folder), "--variant=mine-lr=2e-3", *command[1:]]
        assert commands.main(argv) == 0
    assert commands.main(["report", str(folder)]) == 0
    assert "mine lr=0.00" in capsys.readouterr().out


def test_a_named_variant_may_join_a_study(folder, capsys):
    before = json.loads((folder / "ablation_results.json").read_text())["runs"]
    flags = ["--variants", "mine", "mha+mga", "mga-kin", "--override", "mine.layers=mga+mha"]
    flags += ["mine.environment=kin", "mga-kin.layers=mga", "mga-kin.environment=kin"]
    assert commands.main(["--resume", str(folder), *flags]) == 0
    after = json.loads((folder / "ablation_results.json").read_text())["runs"]
    assert len(after) == 6 and all(after[name] == before[name] for name in before)
    assert commands.main(["--resume", str(folder), *flags[:-3]]) == 2
    assert "variants: expected mha, gqa" in capsys.readouterr().err


def fill(folder, *names):
    """Files like those of runs, each saying whose."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}, mine")


STRANGERS = [
    "best_model.pt", "mine2_model.pt", "best/metrics.jsonl", "mine-x/metrics.jsonl",
    "best/checkpoints/step_000000040.pt", "mine-lr=1/notes.txt", "mine.bak_model.pt",
    "..mine_model.pt",
]  # fmt: skip
OURS = [
    "mine_model.pt", "mine-lr=1e-3-seed=1_model.pt", "mine/metrics.jsonl", "mha+mga_model.pt",
    "mine-lr=1/checkpoints/step_000000040.pt", "gqa-lr=1/metrics.jsonl",
]  # fmt: skip
NAMES_IT = {
    "study.toml": 'variants = ["mine", 3]',
    "ablation_results.json": '{"config": {"variants": ["mine", "../x"]}}',
}


@pytest.mark.parametrize("named", NAMES_IT)
def test_only_what_a_study_there_names_is_overwritten(named, data_dir, tmp_path, capsys):
    """By study.toml, or by the results where that is damaged."""
    folder = tmp_path / "results"
    fill(folder, *STRANGERS, *OURS, *NAMES_IT)
    fill(tmp_path, "x_model.pt")
    (folder / named).write_text(NAMES_IT[named])
    mine = tiny(["--variants=mha", "--steps=1", "--warmup-steps=0"], data_dir, folder)
    assert commands.main(mine) == 2
    assert "output_dir: expected a folder without another study's files" in capsys.readouterr().err
    assert commands.main([*mine, "--overwrite"]) == 0
    assert [name for name in OURS if (folder / name).exists()] == []
    for name in STRANGERS:
        assert (folder / name).read_text() == f"{name}, mine"
    assert (tmp_path / "x_model.pt").exists()


@pytest.mark.parametrize("damage", ["", "[[", '{"config": 3}', '{"runs": []}', "variants = 'm'"])
def test_damaged_names_make_nothing_ours(damage, data_dir, tmp_path, capsys):
    """What may be someone's is neither removed nor written over."""
    fill(tmp_path, *OURS, *STRANGERS)
    for name in NAMES_IT:
        (tmp_path / name).write_text(damage)
    left = [name for name in (*OURS, *STRANGERS) if not name.startswith(("mha+mga", "gqa"))]
    flags = tiny(
        ["--variants=mine", "--override=mine.layers=mha", "--overwrite"], data_dir, tmp_path
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert commands.main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "train.py: output_dir: expected no files but a study's where mine go, got"
    )
    assert "mine_model.pt, mine/metrics.jsonl, which no study there names; move them" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = tiny(["--only-mga", "--steps=1", "--warmup-steps=0", "--overwrite"], data_dir, tmp_path)
    assert commands.main(other) == 0
    assert all((tmp_path / name).read_text() == f"{name}, mine" for name in left)
    assert not (tmp_path / "mha+mga_model.pt").exists()


def test_what_names_the_runs_is_removed_last(tmp_path, monkeypatch):
    """So that a removal that ends early can be taken up."""
    fill(tmp_path, *OURS)
    for name, text in NAMES_IT.items():
        (tmp_path / name).write_text(text)
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda path: removed.append(path.name))
    clear(tmp_path)
    assert removed[-2:] == ["study.toml", "ablation_results.json"] and len(removed) == len(OURS) + 2


def test_a_copy_of_weights_needs_no_study(folder, tmp_path):
    for name in ("mine-lr=1e-3_model.pt", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    assert open_run(tmp_path, None, "cpu").mechanism == "mine"
