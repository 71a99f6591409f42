"""What losses are worth, where it is known."""

import json
import math

import pytest
from test_verdicts import runs

from bench.studies.mga import equal_time
from bench.studies.mga.equal_time import Curve

MILLISECONDS = {"mha": 10.0, "mga": 15.0, "mla": 20.0}


def loss(tokens):
    """Half a nat for each doubling."""
    return 10.0 - 0.5 * math.log2(tokens)


def of_tokens(variant, tokens, mean):
    made = runs(variant, mean, noise=(0.0, 0.0, 0.0))
    for run in made:
        run.tokens = tokens
    return made


def folder_of(path, made):
    path.mkdir()
    plain = {f"{run.name}-{run.tokens}": run.plain for run in made}
    (path / "ablation_results.json").write_text(json.dumps({"runs": plain}))
    return path


@pytest.fixture
def small(tmp_path):
    made = of_tokens("mha", 1000, loss(1000)) + of_tokens("mga", 1000, loss(1500))
    return folder_of(tmp_path / "small", made + of_tokens("mla", 1000, 2.5))


@pytest.fixture
def other(tmp_path):
    made = of_tokens("mha", 500, loss(500))[:2] + of_tokens("mha", 2000, loss(2000))[:2]
    return folder_of(tmp_path / "other", made)


def test_tokens_between_budgets_and_beyond():
    curve = Curve([500, 1000, 2000], [loss(500), loss(1000), loss(1500)])
    for tokens in (500, 700, 1000):
        assert curve.reaches(loss(tokens)) == pytest.approx(tokens)
    assert curve.reaches((loss(1000) + loss(1500)) / 2) == pytest.approx(2**0.5 * 1000)
    assert curve.reaches(loss(1501)) == math.inf and math.isnan(curve.reaches(loss(499)))


def test_a_cell_is_worth_what_mha_needs_for_its_loss(small, other, tmp_path, capsys):
    """Also where the other budgets have fewer seeds."""
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps({"milliseconds": MILLISECONDS}))
    assert equal_time.main(["table", str(small), str(other), "--steps", str(steps)]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert rows == [
        "| `mla` | 20 | inf | inf |",
        "| `mga` | 15 | 1.50 | 1.00 |",
        "| `mha` | 10 | 1.00 | 1.00 |",
    ]


def test_other_budgets_are_refused(small, tmp_path):
    cells = equal_time.cells_of(small)
    with pytest.raises(ValueError, match=r"expected other budgets of the same seeds, got \[1000\]"):
        equal_time.curve_of(cells, tmp_path / "absent")
    rising = folder_of(tmp_path / "rising", of_tokens("mha", 2000, loss(900)))
    with pytest.raises(ValueError, match="expected losses that fall with tokens"):
        equal_time.curve_of(cells, rising)


def test_a_cell_without_a_time_is_named(small, other, tmp_path, capsys):
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps({"milliseconds": {"mha": 1.0, "mla": 2.0}}))
    assert equal_time.main(["table", str(small), str(other), "--steps", str(steps)]) == 2
    assert "steps: expected a time of every cell, got none of mga" in capsys.readouterr().err


def test_steps_of_a_file_are_timed(tmp_path):
    path, output = tmp_path / "tiny.toml", tmp_path / "steps.json"
    path.write_text(
        'preset = "cpu"\nvariants = ["mha", "near"]\nseeds = [1, 2]\nmatch = "params"\n'
        "seq_len = 16\nbatch_size = 1\nembed_dim = 24\nnum_heads = 2\nffn_hidden_dim = 32\n"
        'num_layers = 1\n[near]\nlayers = "mha"\ndecay = "learned"\n'
    )
    arguments = ["steps", str(path), "--rounds", "1", "--output", str(output)]
    assert equal_time.main(arguments) == 0
    found = json.loads(output.read_text())
    assert set(found["milliseconds"]) == {"mha", "near"} and found["threads"] >= 1
    assert all(each > 0 for each in found["milliseconds"].values())
    assert equal_time.main(["steps", str(tmp_path / "none.toml")]) == 2
