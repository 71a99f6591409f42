"""Verdicts, sweeps and speed-ups of runs whose truth is known."""

import json
import math
import statistics

import numpy as np
import pytest
from study_cases import blank_plots, run, tiny

from smollm.studies import commands, report
from smollm.studies.compare import (
    at_their_best,
    differences,
    group,
    power_law,
    speed_ups,
    student_t,
)
from smollm.training.record import Run


def made(mechanism, loss, seed=1, tokens=1000, rate=100.0, **config):
    config = {"lr": 1e-3, "steps": tokens // 10} | config
    plain = {"mechanism": mechanism, "seed": seed, "corpus_sha256": "abc"} | config
    done = Run(mechanism, "cpu", config=plain, status="finished", tokens=tokens, val_loss=loss)
    done.tokens_per_second, done.bits_per_byte = rate, loss / 2
    return done


def seeds(mechanism, mean, noise, **config):
    return [made(mechanism, mean + n, seed, **config) for seed, n in enumerate(noise)]


def test_runs_that_differ_in_their_seed_alone_are_a_group():
    runs = seeds("mha", 3.0, (0.0, 0.1, 0.2)) + seeds("mga", 2.0, (0.0, 0.1), lr=2e-3)
    runs += [made("mha", 2.5, lr=3e-3), Run("mla", "cpu", status="failed")]
    found = group(runs)
    assert [(g.title, len(g.runs)) for g in found] == [
        ("MHA lr=0.001", 3), ("MGA", 2), ("MHA lr=0.003", 1), ("MLA", 1),
    ]  # fmt: skip
    assert found[0].mean("val_loss") == pytest.approx(3.1)
    assert found[0].spread("val_loss") == pytest.approx(statistics.stdev([3.0, 3.1, 3.2]))
    assert found[2].spread("val_loss") is None and found[3].mean("val_loss") is None


def test_groups_that_differ_in_the_items_of_a_field():
    patterns = ([], [8, "full"])
    runs = [made("mha", 3.0, seed, window_pattern=p) for seed in (1, 2) for p in patterns]
    found = [(each.title, len(each.runs)) for each in at_their_best(group(runs))]
    assert found == [("MHA window_pattern=None", 2), ("MHA window_pattern=8+full", 2)]


def test_a_group_tells_how_its_runs_ended():
    runs = seeds("mha", 3.0, (0.0, 0.1, 0.2))
    runs[1].status, runs[1].val_loss = "diverged", 9.0
    (found,) = group(runs)
    assert found.label == "MHA (1 diverged of 3)"
    assert found.mean("val_loss") == pytest.approx(3.1)


def test_each_mechanism_is_compared_at_its_best_rate():
    runs = [made("mha", 3 + abs(math.log10(lr / 1e-3)), seed, lr=lr)
            for lr in (1e-4, 1e-3, 1e-2) for seed in (1, 2)]  # fmt: skip
    runs += [made("gqa", 3 + abs(math.log10(lr / 1e-2)), seed, lr=lr, window_size=w)
             for lr in (1e-4, 1e-3, 1e-2) for seed in (1, 2) for w in (8, 9)]  # fmt: skip
    best = at_their_best(group(runs))
    assert [g.title for g in best] == [
        "MHA lr=0.001", "GQA lr=0.01 window_size=8", "GQA lr=0.01 window_size=9",
    ]  # fmt: skip
    runs[2].status = runs[3].status = "diverged"
    assert at_their_best(group(runs))[0].title in ("MHA lr=0.0001", "MHA lr=0.01")


@pytest.mark.parametrize(("level", "freedom", "t"), [
    (0.95, 1, 12.706), (0.95, 2, 4.3027), (0.95, 4, 2.7764), (0.99, 2, 9.9248), (0.95, 1000, 1.9623)
])  # fmt: skip
def test_students_distribution_is_the_tables(level, freedom, t):
    assert student_t(level, freedom) == pytest.approx(t, rel=1e-4)


def test_a_difference_is_taken_seed_by_seed():
    """The seeds' own level is no noise; what is left of it once they are paired is."""
    level = (0.0, 0.5, 1.0)
    runs = seeds("mha", 3.0, level) + seeds("mga", 2.9, [x + n for x, n in zip(level, (0, 0.01, 0.02), strict=True)])  # noqa: E501  # fmt: skip
    (found,) = differences(group(runs))
    assert found.clear and found.ours.title == "MGA" and found.seeds == 3
    paired = [0.1, 0.09, 0.08]
    reach = 4.3027 * statistics.stdev(paired) / math.sqrt(3)
    assert found.mean == pytest.approx(0.09) and found.low == pytest.approx(0.09 - reach, rel=1e-4)
    assert str(found).startswith("MGA is better than MHA by 0.0900 (95% interval 0.0652 to 0.1148")
    (other,) = differences(group(runs[:3] + seeds("mga", 2.9, level[::-1])))
    assert not other.clear
    assert str(other).startswith("MGA and MHA are within the spread: 0.1000 apart (95% interval -")


def test_other_seeds_make_welchs_interval():
    ours = [made("mga", loss, seed) for seed, loss in enumerate((2.0, 2.1, 2.2))]
    theirs = [made("mha", loss, 10 + seed) for seed, loss in enumerate((3.0, 3.2, 3.4, 3.6))]
    (found,) = differences(group(theirs + ours))
    # scipy.stats.ttest_ind(theirs, ours, equal_var=False): 4.9 degrees of freedom; here 4
    error = math.sqrt(0.01 / 3 + statistics.variance((3.0, 3.2, 3.4, 3.6)) / 4)
    assert found.mean == pytest.approx(1.2)
    assert found.high == pytest.approx(1.2 + 2.7764 * error, rel=1e-3)


def test_one_seed_gives_no_verdict():
    (found,) = differences(group([made("mha", 3.0), made("mga", 2.0)]))
    assert found.low is None and not found.clear
    assert str(found) == "MGA ends 1.0000 below MHA; one seed says nothing of spread"
    assert differences(group([made("mha", 3.0), Run("mga", "cpu", status="failed")])) == []
    assert differences(group([made("mha", 3.0), made("mga", 2.0, tokens=2000)])) == []


def test_intervals_hold_the_truth_as_often_as_they_say():
    """2000 studies of three seeds whose true difference is 0.02; 1 in 20 may miss it."""
    random = np.random.default_rng(0)
    inside = clear = 0
    for _ in range(2000):
        noise = random.normal(0, 0.05, (2, 3)) + random.normal(0, 1, 3)
        found = group(seeds("mha", 3.02, noise[0]) + seeds("mga", 3.0, noise[1]))
        (difference,) = differences(found)
        sign = 1 if difference.ours.mechanism == "mga" else -1
        inside += difference.low <= sign * 0.02 <= difference.high
        clear += difference.clear
    assert 0.935 < inside / 2000 < 0.965
    assert clear / 2000 < 0.2


def test_the_power_law_of_exact_points_is_found():
    law = power_law([(t, 1.7 + 40 * t**-0.31) for t in (1e6, 4e6, 2e6, 16e6)])
    assert (law.floor, law.exponent) == (
        pytest.approx(1.7, rel=1e-3),
        pytest.approx(0.31, rel=1e-3),
    )
    assert law.tokens(1.7 + 40 * 3e6**-0.31) == pytest.approx(3e6, rel=1e-3)
    assert law.tokens(1.0) == math.inf
    assert "5.1" in str(law).split("fitted to ")[0] or str(law).count(" at ") == 4
    assert power_law([(1, 3.0), (2, 2.0)]) is None
    assert power_law([(1, 3.0), (2, 2.0), (4, 2.5)]) is None


def test_an_effective_speed_up_is_how_much_more_the_baseline_needs():
    """A variant that learns as the baseline with 1.5 times the tokens, at 4/5 of the speed."""
    law = lambda tokens: 2 + 50 * tokens**-0.3  # noqa: E731
    runs = [made("mha", law(t), seed, t, lr=lr) if lr == 1e-3 else made("mha", 9.0, seed, t, lr=lr)
            for t in (1000, 2000, 4000) for seed in (1, 2) for lr in (1e-3, 1e-2)]  # fmt: skip
    runs += [made("mga", law(1.5 * t), seed, t, rate=80.0) for t in (2000, 4000) for seed in (1, 2)]
    found, (small, large) = speed_ups(group(runs))
    assert [tokens for tokens, _ in found.points] == [1000, 2000, 4000]
    assert small.tokens == pytest.approx(1.5, rel=1e-3) and not small.extrapolated
    assert small.time == pytest.approx(1.2, rel=1e-3)
    assert large.tokens == pytest.approx(1.5, rel=1e-3) and large.extrapolated
    lines = report.verdict_lines(group(runs))
    assert any(line.startswith("MHA's law: loss = 2.0000 + 50 tokens^-0.3000, fitted to ")
               for line in lines)  # fmt: skip
    assert (
        "Effective speed-up against it, MGA steps=200: 1.50x at equal tokens, 1.20x at equal time"
        in lines
    )
    assert speed_ups(group([r for r in runs if r.tokens != 1000])) == (None, [])


@pytest.mark.parametrize(("count", "told"), [(6, "15"), (7, "11 of 21")])
def test_of_many_variants_the_best_and_the_first_are_compared_with_each(count, told):
    losses = {"mha": 3.5} | {f"mha-{n}": 3 + n / 10 for n in range(count - 1)}
    runs = [run for name, loss in losses.items() for run in seeds(name, loss, (0.0, 0.1))]
    *pairs, last = report.verdict_lines(group(runs))
    assert last == f"Each of these {told} intervals holds by itself, not all at once"
    assert len(pairs) == int(told.split()[0])
    of_others = [pair for pair in pairs if "MHA" not in pair and not pair.startswith("mha-0 ")]
    assert bool(of_others) == (count == 6)


@pytest.fixture(scope="module")
def joined(data_dir, tmp_path_factory):
    """Two studies: a sweep over rates of which one diverges, and one more seed of it."""
    root = tmp_path_factory.mktemp("joined")
    sweep = ["--variants", "mha", "gqa", "--grid", "lr=1e-3,1e30", "--clip=inf"]
    flags = ["--variants", "mha", "gqa", "--lr=1e-3", "--clip=inf", "--seeds", "2", "3"]
    with pytest.MonkeyPatch.context() as patched:
        blank_plots(patched)
        assert commands.main(tiny([*sweep, "--seeds", "1"], data_dir, root / "one")) == 1
        assert run(flags, data_dir, root / "two") == 0
    return root


def test_a_sweep_of_which_one_diverges(joined):
    content = json.loads((joined / "one" / "ablation_results.json").read_text())
    assert {name: r["status"] for name, r in content["runs"].items()} == {
        "mha-lr=1e-3-seed=1": "finished", "gqa-lr=1e-3-seed=1": "finished",
        "mha-lr=1e30-seed=1": "diverged", "gqa-lr=1e30-seed=1": "diverged",
    }  # fmt: skip
    text = (joined / "one" / "report.md").read_text()
    assert "- MHA lr=1e30 seed 1 diverged after " in text
    assert "Swept: lr=1e-3,1e30\n" in text
    assert "Swept: " not in (joined / "two" / "report.md").read_text()
    assert text.index("Best model by loss") < text.index("| Model |") < text.index("## To repeat")
    assert "![Loss against learning rate](learning_rates.png)" in text
    assert (joined / "one" / "learning_rates.png").exists()


def test_several_folders_make_one_report(joined, capsys):
    folders = [str(joined / name) for name in ("one", "two")]
    assert commands.main(["report", *folders, f"--output-dir={joined / 'both'}"]) == 0
    said = capsys.readouterr().out
    assert f"Report in {joined / 'both'}/" in said
    text = (joined / "both" / "report.md").read_text()
    runs = [r for name in ("one", "two") for r in json.loads(
        (joined / name / "ablation_results.json").read_text())["runs"].values()]  # fmt: skip
    for mechanism, title in (("mha", "MHA"), ("gqa", "GQA")):
        losses = []
        for r in runs:  # from the records alone
            if r["mechanism"] == mechanism and r["status"] == "finished":
                losses.append([h["val_loss"] for h in r["history"] if h["val_loss"]][-1])
        cell = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
        assert len(losses) == 3 and f"| {title} lr=0.001 | {cell} |" in text
    assert "3 seeds)" in text and "MHA lr=0.001" in said
    assert text.count("```toml") == 1 and text.count("lr = [") == 1
    both = ["report", *folders, f"--output-dir={joined / 'both'}"]
    assert commands.main(both) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert commands.main([*both, "--overwrite"]) == 0


def test_what_makes_no_report_is_refused(joined, tmp_path, capsys):
    one, two = joined / "one", joined / "two"
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((two / "ablation_results.json").read_text())
    for r in content["runs"].values():
        r["config"]["corpus_sha256"] = "f" * 64
    (other / "ablation_results.json").write_text(json.dumps(content))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "ablation_results.json").write_text(json.dumps(content | {"config": None}))
    for argv, text in [
        ([one, two], "output_dir: expected a folder for the report of several, got none"),
        ([tmp_path], f"{tmp_path}: expected a study's results, got no ablation_results.json"),
        ([damaged], f"{damaged / 'ablation_results.json'}: expected a study's results, got TypeE"),
        ([one, other, "--output-dir", tmp_path / "new"], "report: expected studies of one corpus"),
        ([one, two, "--output-dir", two], "output_dir: expected a folder without another study's"),
    ]:
        assert commands.main(["report", *map(str, argv)]) == 2
        assert capsys.readouterr().err.startswith(f"train.py: {text}")
    before = (one / "ablation_results.json").read_bytes()
    (one / "report.md").unlink()
    assert commands.main(["report", str(one)]) == 0
    assert (one / "report.md").exists() and (one / "ablation_results.json").read_bytes() == before
