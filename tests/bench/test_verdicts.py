"""The verdicts of the study of genetic attention, of runs whose truth is known."""

import json
import statistics
from pathlib import Path

import pytest

from bench.studies.mga import verdicts
from bench.studies.mga.recall import Bounds
from smollm.studies.compare import group
from smollm.training.record import Record, Run

NOISE = (0.000, 0.004, -0.003, 0.001, -0.002)
BOUNDS = Bounds(floor=1.0, unbound=1.8, guess=2.0)


def runs(variant, loss, noise=NOISE):
    """Of seeds that all cells share, but for a noise of their own."""
    made = []
    for seed, own in enumerate(noise, 1):
        run = Run(variant, "cpu", name=f"{variant}-seed={seed}", seed=seed, status="finished")
        run.config, run.parameters = {"lr": 4e-3, "seed": seed}, 1000
        run.tokens, run.val_loss = 100, loss + 0.05 * seed + own
        made.append(run)
    return made


def cells(**losses):
    """Cells by name, "_" for "-"; each with a noise that differs from the others'."""
    found = {}
    for shift, (name, loss) in enumerate(losses.items()):
        noise = NOISE[shift % 5 :] + NOISE[: shift % 5]
        (found[name.replace("_", "-")],) = group(runs(name.replace("_", "-"), loss, noise))
    return found


def test_a_gap_is_told_seed_by_seed():
    """Seeds differ by 0.05, cells by less."""
    both = cells(mha=3.0, mga=3.02)
    found = verdicts.gap(both, "mga", "mha")
    assert found.mean == pytest.approx(0.02) and found.above and not (found.below or found.equal)
    assert 0 < found.low < found.mean < found.high < 0.04
    other = verdicts.gap(both, "mha", "mga")
    assert other == pytest.approx([-found.mean, -found.high, -found.low]) and other.below
    close = verdicts.gap(cells(mha=3.0, mga=3.0), "mga", "mha")
    assert close.equal and not (close.above or close.below)
    alone = verdicts.gap({n: group(runs(n, x, (0.0,)))[0] for n, x in (("mha", 3), ("mga", 4))},
                         "mga", "mha")  # fmt: skip
    assert alone.mean == 1.0 and not (alone.above or alone.below or alone.equal)
    small = verdicts.Gap(0.005, 0.004, 0.006)  # certain, and too small to matter
    assert small.equal and not small.above


def test_mga_has_to_be_below_all_three_at_both_sizes():
    near = {"mha_decay": 3.0, "mha_forget": 3.0, "mha_window": 3.0}
    better = cells(mga=2.9, mga_kin=3.1, **near)
    one = cells(mga=2.9, mga_kin=3.1, **near | {"mha_forget": 2.9})
    assert verdicts.against_locality([better, better]) == "better"
    assert verdicts.against_locality([better, one]) == "undecided"
    worse = cells(mga=3.1, mga_kin=3.2, **near | {"mha_window": 3.3, "mha_forget": 3.3})
    assert verdicts.against_locality([worse, worse]) == (
        "not better: mha-decay is clearly below both"
    )
    level = cells(mga=3.1, mga_kin=3.0, **near | {"mha_window": 3.3, "mha_forget": 3.3})
    assert verdicts.against_locality([level, level]) == (
        "not better: mha-decay is equal to the better one"
    )
    assert verdicts.against_locality([worse, better]) == "undecided"


def test_an_environment_is_dropped_if_another_is_better_and_it_recalls_no_more():
    sizes = [cells(mga=3.1, mga_kin=3.0, mga_none=3.0)] * 2
    assert verdicts.kept("mga-kin", sizes, {}) and verdicts.kept("mga-none", sizes, {})
    assert not verdicts.kept("mga", sizes, {})
    assert not verdicts.kept("mga", sizes, {"mga": 0.95, "mga-kin": 0.9, "mga-none": 0.1})
    assert verdicts.kept("mga", sizes, {"mga": 0.95, "mga-kin": 0.4, "mga-none": 0.1})
    once = [sizes[0], cells(mga=3.0, mga_kin=3.0, mga_none=3.0)]
    assert verdicts.kept("mga", once, {})


@pytest.mark.parametrize(("losses", "recalled", "found"), [
    ((3.1, 3.1), (0.5, 0.5), "works"), ((3.1, 3.0), (0.5, 0.5), "unknown"),
    ((3.0, 3.0), (0.5, 0.52), "idle"), ((3.0, 2.9), (0.5, 0.5), "idle"),
    ((3.0, 3.0), (0.8, 0.95), "works"), ((3.0, 3.0), (0.8, 0.88), "unknown"),
    ((3.0, 3.0), None, "unknown"),
])  # fmt: skip
def test_a_part_works_if_what_lacks_it_is_worse(losses, recalled, found):
    sizes = [cells(mga_unfit=loss, mga=3.0) for loss in losses]
    shares = dict(zip(("mga-unfit", "mga"), recalled, strict=True)) if recalled else {}
    assert verdicts.worth("mga-unfit", "mga", sizes, shares) == found


def write(folder, found):
    folder.mkdir()
    content = {"runs": {run.name: run.plain for run in found}}
    (folder / "ablation_results.json").write_text(json.dumps(content))
    return str(folder)


def test_command_line(tmp_path, capsys, monkeypatch):
    bounds = tmp_path / "recall.json"
    bounds.write_text(json.dumps(vars(BOUNDS) | {"keys": 8}))
    monkeypatch.setattr(verdicts, "RESULTS", bounds)
    losses = {"mha": 3.3, "mha-decay": 3.0, "mha-forget": 3.0, "mha-window": 3.0, "mga": 3.2,
              "mga-kin": 3.0, "mga-none": 3.3, "mga-unfit": 3.2, "mga-uniform": 3.4,
              "mga-pressure": 3.2, "mga-still": 3.5}  # fmt: skip
    small = [run for name, loss in losses.items() for run in runs(name, loss)]
    recall = [run for name in losses for run in runs(name, 1.0 if name == "mga" else 1.9, (0, 0))]
    recall[8].history = [Record(step=100, tokens=1, loss=2.0, lr=1.0, gradient_norm=1.0,
                                seconds=1.0, tokens_per_second=1.0, val_loss=1.08)]  # fmt: skip
    folders = [write(tmp_path / name, found) for name, found in (
        ("small", small), ("large", small), ("recall", recall))]  # fmt: skip
    figure = tmp_path / "cells.png"
    assert verdicts.main([*folders, "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert text.count("| `mha-decay` | 1,000 | 0.004 | 3.15") == 2
    assert "- MGA against MHA with locality: not better: mha-decay is equal to the better" in text
    assert "- environment of `mga`: " in text and "- environment of `mga-none`: dropped" in text
    assert "- fitness (`mga` less it is `mga-unfit`): works" in text  # as it recalls less
    with pytest.raises(SystemExit):
        verdicts.main([*folders[:2], "--figure", str(figure)])
    assert verdicts.main(folders[:1]) == 0
    assert "MGA against" not in capsys.readouterr().out
    small[0].config["lr"] = 2e-3
    assert verdicts.main([write(tmp_path / "mixed", small)]) == 2
    assert "expected mha at one point, got MHA lr=" in capsys.readouterr().err
    assert verdicts.main([str(tmp_path / "none")]) == 2
    assert "expected finished runs, got none" in capsys.readouterr().err


def test_the_plan_names_the_cells_that_the_files_have():
    folder = Path(verdicts.__file__).parent
    plan = (folder / "plan.md").read_text(encoding="utf-8")
    for name in {*verdicts.NEAR, *verdicts.ENVIRONMENTS, *sum(verdicts.PARTS.values(), ())}:
        assert f"| `{name}` |" in plan


def test_the_findings_are_what_the_runs_say(capsys):
    """Every mean with its spread, every interval below the subject, and the table of recall."""
    folder = Path(verdicts.__file__).parent
    found = (folder / "findings.md").read_text(encoding="utf-8")
    sizes = [verdicts.cells_of(folder / size) for size in ("small", "large")]
    for name in sizes[1]:
        row = f"| `{name}` |"
        for cells in sizes:
            losses = cells[name].by_seed("val_loss").values()
            less = "" if name == "mga" else str(verdicts.gap(cells, name, "mga"))
            row += f" {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f} | {less} |"
        assert f"{row}\n" in found, name
    assert verdicts.main([str(folder / name) for name in ("small", "large", "recalled")]) == 0
    printed = capsys.readouterr().out
    assert printed[printed.index("| cell | rate |") : printed.index("\n- MGA against")] in found
