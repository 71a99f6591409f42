"""Tuning without a GPU: candidates, their place in the table, and winners of times made up."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from bench import candidates, tune
from kernels.core import tiles
from kernels.core.tiles import Tile, Width

ROOT = Path(__file__).parents[2]
ENTRIES = [
    (arch, direction, widest)
    for arch, directions in candidates.ALTERNATIVES.items()
    for direction, widths in directions.items()
    for widest in widths
]
SLOW, FAST, FASTER = 1.0, 0.975, 0.9


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)


def chosen(direction, columns, like="plain"):
    """The tile of a kernel's launches, of short windows or with a bias where it is like theirs."""
    q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta")
    short, biased = like in tiles.SHORTER.values(), like in tiles.BIASED.values()
    kernel = direction.rpartition("_")[2]
    return tiles.choose(kernel, q, Width(columns, plain=False, short=short, biased=biased))


def test_alternatives_to_every_width_of_the_table():
    for arch, directions in candidates.ALTERNATIVES.items():
        for direction, widths in directions.items():
            assert max(widths) == max(candidates.table(arch)[direction])
            assert set(candidates.table(arch)[direction]) <= set(widths)


@pytest.mark.parametrize(("arch", "direction", "widest"), ENTRIES)
def test_the_first_candidate_is_the_tile_in_use(arch, direction, widest, hopper):
    first, *others = candidates.tiles_to_try(arch, direction, widest)
    assert first == chosen(direction, widest, like=direction)
    assert len(others) >= 2 and first not in others


@pytest.mark.parametrize(("arch", "direction", "widest"), ENTRIES)
def test_a_candidate_is_used_inside_and_not_behind(arch, direction, widest, hopper):
    tile = Tile(16, 16, 1, 1)
    columns = 16, 64, 80, 96, 128, 192, 256
    kinds = "plain", direction
    before = {(c, like): chosen(direction, c, like) for c in columns for like in kinds}
    with candidates.using(arch, direction, widest, tile):
        assert chosen(direction, widest, like=direction) == tile
        others = {(c, like): chosen(direction, c, like) for c, like in before if c > widest}
        assert others == {place: before[place] for place in others}
    assert {(c, like): chosen(direction, c, like) for c, like in before} == before


def test_a_candidate_takes_the_place_of_one_for_a_version_of_triton(hopper, monkeypatch):
    own = {candidates._key(90): {"dq": {64: Tile(32, 32, 4, 1)}}}
    monkeypatch.setattr(tiles, "BY_TRITON", own)
    monkeypatch.setattr(tiles, "listed", tiles.listed.__wrapped__)
    assert candidates.tiles_to_try(90, "dq", 64)[0] == chosen("dq", 64) == Tile(32, 32, 4, 1)
    with candidates.using(90, "dq", 64, Tile(16, 16, 1, 1)):
        assert chosen("dq", 64) == Tile(16, 16, 1, 1)
    assert chosen("dq", 64) == Tile(32, 32, 4, 1)


class Gpu:
    """Times made up: of the table's tile, of the second, third and other candidates."""

    def __init__(self, *factors, wrong=(), seconds=0.0):
        self.factors, self.wrong, self.seconds, self.now = factors, wrong, seconds, 0.0

    def place(self, direction, widest, tile):
        return candidates.tiles_to_try(90, direction, widest).index(tile)

    def check(self, direction, widest, tile):
        self.now += self.seconds
        return "AssertionError: o" if self.place(direction, widest, tile) in self.wrong else ""

    def time(self, direction, widest, tile):
        factor = [*self.factors, *[SLOW] * 9][self.place(direction, widest, tile)]
        return {"causal": 2.0 * factor, "1024": 0.5 * factor}

    def measure(self, budget_s=1e9):
        return list(tune.measure(90, self.check, self.time, budget_s, lambda: self.now))


@pytest.mark.parametrize(
    ("factors", "wrong", "expected"),
    [
        ([SLOW, FAST, FASTER], [], 2),
        ([SLOW, FAST, FASTER], [2], 1),  # the fastest is wrong
        ([SLOW, 0.985], [], None),  # not by enough
        ([SLOW, 1.2], [], None),
        ([SLOW, FASTER], [0], None),  # nothing to compare with
    ],
)
def test_winners(factors, wrong, expected):
    for found in Gpu(*factors, wrong=wrong).measure():
        best = tune.winner(found)
        assert best is (None if expected is None else found[expected])
        for place in wrong:
            assert not found[place].milliseconds and "AssertionError: o" in tune.report([found])


def test_the_slower_case_of_two_counts_as_much():
    today = tune.Measurement("dq", 64, Tile(64, 64, 4, 3), {"a": [4.0], "b": [1.0]})
    other = tune.Measurement("dq", 64, Tile(64, 64, 4, 2), {"a": [2.0], "b": [2.0]})
    assert other.speedup(today) == pytest.approx(1)
    assert tune.winner([today, other]) is None
    noisy = tune.Measurement("dq", 64, other.tile, {"a": [3.0, 3.0, 90.0], "b": [0.9, 0.9, 0.1]})
    assert tune.winner([today, noisy]) is noisy  # of the turns, the median


def test_width_64_first_and_what_no_time_was_left_for_is_said():
    measured = Gpu(SLOW, FASTER, seconds=1.0).measure(budget_s=8)
    done = [m for found in measured for m in found if m.milliseconds]
    assert len(done) == 8 and {m.widest for m in done} == {64}
    late = [m for found in measured for m in found if m.refused]
    assert {m.refused for m in late} == {tune.NOT_MEASURED}
    assert len(done) + len(late) == sum(len(candidates.tiles_to_try(*entry)) for entry in ENTRIES)
    assert tune.NOT_MEASURED in tune.report(measured)
    assert not any(tune.winner(found) for found in measured if found[0].refused)


def test_what_is_written_can_be_read(tmp_path):
    measured = Gpu(SLOW, FASTER, wrong=[2]).measure()
    tune.write(tmp_path, 90, measured)
    winners = {(m.direction, m.widest): m.tile for m in map(tune.winner, measured)}
    assert len(winners) == len(ENTRIES)
    ((arch, table),) = runpy.run_path(str(tmp_path / "tiles.py"))["HALF_PRECISION"].items()
    assert arch == 90 and set(table) == {direction for _, direction, _ in ENTRIES}
    assert all(table[direction][widest] == tile for (direction, widest), tile in winners.items())
    written = json.loads((tmp_path / "tiles.json").read_text())
    assert {"gpu", "driver", "torch", "triton", "ptxas", "commit", "arch", "rows"} == set(written)
    rows = written["rows"]
    assert len(rows) == sum(map(len, measured)) and sum(row["wins"] for row in rows) == len(winners)
    assert {row["refused"] for row in rows} == {"", "AssertionError: o"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiles.json", "tiles.py"]


def test_a_table_without_winners_is_the_one_in_use():
    table = tune.with_winners(90, Gpu().measure())
    in_use = candidates.table(90)
    assert table == {direction: in_use[direction] for direction in table}


@pytest.mark.parametrize("direction", candidates.ALTERNATIVES[90])
def test_cases_reach_the_tile(direction):
    """Windows long or short, with a bias or not, widths as padded."""
    for widest in candidates.ALTERNATIVES[90][direction]:
        for case in tune.checked_cases(direction, widest) + tune.timed_cases(direction, widest):
            window, rotary = case.window_size, isinstance(case, tune.LatentCase)
            short = window is not None and window <= tiles.SHORT
            assert short == (direction == "short_forward")
            assert ("biased" in direction) == (getattr(case, "bias", None) is not None)
            widths = case.nope + case.rope if rotary else case.width
            assert widths == widest


def test_a_tuner_checks_and_times(monkeypatch):
    """On the CPU, whose tiles are its own: a right op passes, a wrong or failing one is refused."""
    case = tune.AttentionCase("tiny", q_tokens=8, q_heads=1, width=16)
    latent = tune.LatentCase("tiny-mla", nope=16, rope=8, v_width=16)
    monkeypatch.setattr(tune, "checked_cases", lambda *_: [case, latent])
    monkeypatch.setattr(tune, "timed_cases", lambda *_: [case])
    monkeypatch.setattr(tune, "ROUNDS", 1)
    tuner, tile = tune.Tuner(90, "cpu"), Tile(64, 64, 4, 3)
    assert tuner.check("dq", 64, tile) == ""
    assert tuner.time("forward", 64, tile)["tiny"] > 0 < tuner.time("dkdv", 64, tile)["tiny"]
    with monkeypatch.context() as patched:  # what is timed: o, or the gradients of q, k and v
        patched.setattr(tune, "median_seconds", lambda call, _: float(len(call())))
        ran = [tuner.time(direction, 64, tile)["tiny"] for direction in ("forward", "dkdv")]
        assert ran == [1e3 * case.batch, 3e3]
    attend = tune.attend
    monkeypatch.setattr(
        tune, "attend", lambda *a, **k: attend(*a, **k) * (1.01 if "triton" in a else 1)
    )
    assert tuner.check("dq", 64, tile).startswith("AssertionError: o: element")
    monkeypatch.setattr(tune, "attend", lambda *_, **__: 1 / 0)
    assert tuner.check("dq", 64, tile).startswith("ZeroDivisionError")


def test_what_is_done_is_written_when_patience_ends(tmp_path, monkeypatch, hopper, capsys):
    class Impatient(Gpu):
        def check(self, direction, widest, tile):
            if direction == "dkdv":
                raise KeyboardInterrupt
            return ""

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "machine", dict)
    monkeypatch.setattr(tune, "Tuner", lambda arch: Impatient(SLOW, FASTER))
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--output", str(tmp_path)])
    rows = json.loads((tmp_path / "tiles.json").read_text())["rows"]
    before = list(candidates.ALTERNATIVES[90])[:-1]
    assert [row["direction"] for row in rows if row["wins"]] == before
    assert capsys.readouterr().out.count(" wins\n") == len(before)


@pytest.mark.parametrize("parts", ["parity bench tune", "bench tune", "tune"])
def test_parts_of_make_gpu_share_nine_minutes(parts):
    """With ten seconds to stop in, and so many for what is started without a limit."""
    limits = []
    for part in parts.split():
        command = ["make", "-n", f"gpu-{part}", f"PARTS={parts}"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        limits += [int(n) + 10 for n in re.findall(r"timeout -s INT -k 10 (\d+)", printed.stdout)]
        if budget := re.search(r"--budget-s (\d+)", printed.stdout):
            assert 100 < int(budget[1]) <= limits[-1] - 40
    assert len(limits) == len(parts.split())
    assert 480 < sum(limits) <= 530


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert tune.main(["--output", str(tmp_path)]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
