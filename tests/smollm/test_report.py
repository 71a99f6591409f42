"""Tables, winners and plots of runs that are made up."""

import itertools
import math
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from study_cases import ROOT

from bench.studies.mga.verdicts import cells_of, gap
from smollm.attention import MECHANISMS
from smollm.studies import plots, report
from smollm.studies.compare import group
from smollm.studies.folder import read_runs
from smollm.training.record import Record, Run

MIB = 2**20


def made(mechanism, *, final=2.0, speed=1000.0, memory=100 * MIB, device="cuda", end=160,
         status="finished", jitter=0.0, seed=0):  # fmt: skip
    """A run of `end` of 160 steps whose loss falls from 8 to final, validated every 40."""
    random = np.random.default_rng(seed)
    run = Run(mechanism, device, status=status, steps=end)
    run.tokens_per_second, run.peak_memory_bytes = speed, memory
    for step in range(5, end + 1, 5):
        loss = final + (8 - final) * math.exp(-step / 30)
        noisy = loss + random.normal(0, 0.15)
        rate = speed * (1 + jitter * (-1) ** (step // 5))
        record = Record(step, 1000 * step, noisy, 1e-3, 1.0, 0.1 * step, tokens_per_second=rate)
        if step % 40 == 0:
            record.val_loss = run.val_loss = loss
        run.history.append(record)
    if status == "diverged":
        run.error = "loss nan"
        run.history.append(Record(end + 1, 1000 * end + 1000, math.nan, 1e-3, math.nan, end))
    return run


@pytest.mark.parametrize(("device", "ours", "theirs", "clear"), [
    ("cuda", 100, 102, True), ("cuda", 100, 100.5, False), ("cuda", 100, 100, False),
    ("cpu", 400, 410, False), ("cpu", 40, 60, False), ("cpu", 400, 600, True),
])  # fmt: skip
def test_memory_has_a_winner_beyond_noise(device, ours, theirs, clear):
    runs = [made("mha", memory=int(theirs * MIB), device=device)]
    runs.append(made("gqa", memory=int(ours * MIB), device=device))
    for order in (runs, runs[::-1]):
        assert report.best(group(order))["memory"] == ("GQA" if clear else None)
    line = "GQA" if clear else "no clear winner, the gap is within noise"
    assert f"Best model by memory: {line}" in report.best_lines(group(runs))


@pytest.mark.parametrize(("device", "ours", "jitter", "clear"), [
    ("cuda", 1050, 0.0, True), ("cuda", 1020, 0.0, False), ("cuda", 1050, 0.1, False),
    ("cpu", 1200, 0.0, False), ("cpu", 1500, 0.0, True), ("cpu", 1500, 0.5, False),
])  # fmt: skip
def test_throughput_has_a_winner_beyond_noise(device, ours, jitter, clear):
    """Beyond a margin, and beyond what its own stretches differ by."""
    runs = [made("mha", device=device, jitter=jitter)]
    runs.append(made("gqa", speed=ours, device=device, jitter=jitter))
    for order in (runs, runs[::-1]):
        assert report.best(group(order))["throughput"] == ("GQA" if clear else None)


def test_few_measurements_name_no_faster_one():
    runs = [made("mha", end=15), made("gqa", end=15, speed=3000.0)]
    assert report.best(group(runs))["throughput"] is None


def test_only_finished_runs_win():
    runs = [made("mha", final=1.0, status="diverged"), made("gqa"), made("mla", final=3.0)]
    assert report.best(group(runs))["loss"] == "GQA"
    assert report.best(group(runs[:1])) == {}


def test_the_table_says_how_runs_ended():
    failed = Run("mla", "cuda")
    failed.fail(MemoryError())
    runs = [made("mha"), made("gqa", status="diverged", end=90), failed]
    runs.append(Run("mga", "cuda", status="interrupted"))
    assert [row[0] for row in report.rows(group(runs))] == [
        "MHA", "GQA (diverged)", "MLA (failed)", "MGA (interrupted)"
    ]  # fmt: skip
    assert report.unfinished_lines(runs) == [
        "GQA diverged after 90 steps: loss nan",
        "MLA failed after 0 steps: MemoryError",
        "MGA interrupted after 0 steps",
    ]


def test_the_cache_names_its_type():
    run = made("mha")
    assert "Cache B/tok" in report.titles(group([run]))
    run.cache_dtype = "bf16"
    assert "Cache B/tok (bf16)" in report.titles(group([run, Run("gqa", "cuda")]))


def test_samples_mark_prompt_and_blank_lines():
    run = made("mha")
    run.prompt, run.sample = "One\n\ntwo", " three\n \n```\n"
    assert report.sample_text(run) == "One\n⏎\ntwo⟫ three\n⏎\n` ` `\n⏎"


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw the loss plot; the axes, and the lines by their labels and markers."""

    def draw(runs):
        kept = []
        monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
        plots.plot_loss(tmp_path / "loss.png", group(runs))
        axes, _ = kept[0].axes
        plots.plt.close(kept[0])
        assert isinstance(axes, Axes)
        return axes

    return draw


def legend(axes):
    """The labels, in a legend that covers no curve."""
    (found,) = axes.figure.legends
    axes.figure.draw_without_rendering()
    for panel in axes.figure.axes:
        assert found.get_window_extent().ymax <= panel.get_tightbbox().ymin
    return [text.get_text() for text in found.get_texts()]


def test_the_loss_plot_shows_the_differences(drawn):
    """Its axis is the second half's: the fall from 8 is cut off, the difference fills it."""
    axes = drawn([made("mha"), made("gqa", final=2.3)])
    low, high = axes.get_ylim()
    assert 1.8 < low < 2.02 and 2.55 < high < 3.0
    faint = [line for line in axes.get_lines() if line.get_alpha()]
    for line in faint:  # single batches jump by 0.15
        late = np.asarray(line.get_ydata())[len(line.get_ydata()) // 2 :]
        assert np.abs(np.diff(late)).max() < 0.15


def test_the_loss_plot_marks_where_a_run_ended(drawn):
    axes = drawn([made("mha", end=90, status="diverged"), made("gqa"),
                  Run("mla", "cpu", status="failed")])  # fmt: skip
    assert legend(axes) == ["MHA (diverged)", "GQA", "MLA (failed)"]
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "X"]
    assert list(cross.get_xdata()) == [90_000]
    assert axes.get_ylim()[0] <= cross.get_ydata()[0] <= axes.get_ylim()[1]


def test_seeds_are_a_band(drawn):
    axes = drawn([made("mha", final=final, seed=final) for final in (2, 3, 4)] + [made("gqa")])
    assert legend(axes) == ["MHA", "GQA"]
    (band,) = axes.collections
    bottom, top = (f(band.get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    assert bottom < 2.05 and top > 4.0
    mean = next(line for line in axes.get_lines() if line.get_label() == "MHA")
    assert mean.get_ydata()[-1] == pytest.approx(3 + 5 * math.exp(-160 / 30))


def test_any_variants_are_told_apart(drawn):
    """Mechanisms by their colors, others by those of a palette; all by lines and markers too."""
    names = [*MECHANISMS, "mha+mga", *(f"mine-{i}" for i in range(19))]
    axes = drawn([made(name, final=2 + i / 20) for i, name in enumerate(names)])
    assert legend(axes)[3:6] == ["MGA", "MHA+MGA", "mine-0"]
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]
    assert [color for color, _, _ in looks[:4]] == [row.color for row in MECHANISMS.values()]
    assert len({color for color, _, _ in looks[:14]}) == 14
    assert len({(color, line) for color, line, _ in looks}) == len(names) == 24
    assert all(one[2] != next_[2] for one, next_ in itertools.pairwise(looks))


def test_a_variant_keeps_its_color_in_all_plots(tmp_path, monkeypatch):
    runs = []
    for name in ("mine", "other"):
        for lr in (1e-3, 2e-3):
            runs.append(made(name, final=2 + lr))
            runs[-1].config, runs[-1].cache_bytes_per_token = {"lr": lr}, 8
    runs[0].status = runs[1].status = "failed"
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    for plot in (plots.plot_loss, plots.plot_trade_offs, plots.plot_rates):
        plot(tmp_path, group(runs))
    for figure in kept:
        plots.plt.close(figure)
        found = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
        assert all(label.startswith(("mine", "other")) for label in found)
        line = next(found[label] for label in found if label.startswith("other"))
        line = line[0] if isinstance(line, tuple) else line
        assert line.get_color() == plots.PALETTE[1]


@pytest.mark.parametrize("runs", [
    [], [Run("mha", "cpu", status="failed")], [made("mha", end=0, status="diverged")],
    [made("mha", end=5)],
], ids=["none", "failed", "diverged-at-once", "one-record"])  # fmt: skip
def test_reports_of_little_are_written(runs, tmp_path):
    report.write_report(tmp_path, runs, {"Corpus": "made up"}, "steps = 160")
    for name in ("loss.png", "speed_and_memory.png", "trade_offs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^\| Model \| Loss \|", (tmp_path / "report.md").read_text(), re.MULTILINE)


STUDIES = ROOT / "bench" / "studies"


def test_the_readme_shows_a_study_that_is_there():
    """Its table and verdicts are made of the committed results, and their records agree."""
    readme = (ROOT / "README.md").read_text()
    runs = list(read_runs(STUDIES / "cpu").values())
    groups = group(runs)
    assert "\n".join(report.markdown(groups)) in readme
    for line in report.verdict_lines(groups):
        assert f"- {line}\n" in readme
    assert len({run.config["seed"] for run in runs}) == 3 and len(runs) == 3 * len(MECHANISMS)
    for run in runs:
        assert run.status == "finished" and run.val_loss == run.history[-1].val_loss


def test_the_readme_says_of_mga_what_its_study_found():
    readme = (ROOT / "README.md").read_text()
    sizes = [cells_of(STUDIES / "mga" / size) for size in ("small", "large")]
    for title, name in (
        ('MGA, `"query"`', "mga"), ('MGA, `"kin"`', "mga-kin"), ('MGA, `"none"`', "mga-none"),
        ('MGA, `"query"`, without fitness', "mga-unfit"), ("MHA", "mha"),
        ("MHA, the same window", "mha-window"), ("MHA, forget gates", "mha-forget"),
        ("MHA, learned decay", "mha-decay"),
        ("MHA, normalised queries and keys, learned decay", "mha-norm-decay"),
    ):  # fmt: skip
        row = f"| {title} |"
        for cells in sizes:
            each = cells[name]
            less = "" if name == "mga" else str(gap(cells, name, "mga"))
            row += f" {each.mean('val_loss'):.4f} | {less} |"
            assert [run.config["seed"] for run in each.runs] == [1, 2, 3, 4, 5]
            assert {run.config["lr"] for run in each.runs} == {each.runs[0].config["lr"]}
        assert f"{row}\n" in readme, name
