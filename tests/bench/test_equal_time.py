"""What losses are worth, by a law that is known."""

import json
import math

import pytest
from test_verdicts import runs

from bench.studies.mga import equal_time
from bench.studies.mga.equal_time import Law
from smollm.studies.compare import group

TRUTH = Law(3.0, 40.0, 0.25)
MILLISECONDS = {"mha": 10.0, "mga": 15.0, "mla": 20.0}


def loss(tokens):
    return TRUTH.floor + TRUTH.scale * tokens**-TRUTH.power


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
def law(tmp_path):
    made = of_tokens("mha", 500, loss(500)) + of_tokens("mha", 2000, loss(2000))
    return folder_of(tmp_path / "law", made)


def test_three_losses_give_the_law_back():
    law = Law.through(500, [loss(500), loss(1000), loss(2000)])
    assert law == pytest.approx(TRUTH)
    assert law.tokens(loss(1234)) == pytest.approx(1234)
    assert TRUTH.tokens(3.0) == TRUTH.tokens(2.9) == math.inf
    for wrong in ([3.0, 2.0, 0.9], [3.0, 2.0, 2.0], [3.0, 3.1, 3.0], [math.nan, 2.0, 1.0]):
        with pytest.raises(ValueError, match="fall ever slower"):
            Law.through(500, wrong)


def test_a_cell_is_worth_what_mha_needs_for_its_loss(small, law, tmp_path, capsys):
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps({"milliseconds": MILLISECONDS}))
    arguments = ["table", str(small), str(law), "--steps", str(steps)]
    assert equal_time.main(arguments) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    found = equal_time.law_of(equal_time.cells_of(small), law)
    shift = 0.1  # the seeds', in every loss alike
    assert found == pytest.approx(TRUTH._replace(floor=TRUTH.floor + shift))
    assert rows == [
        "| `mla` | 20 | inf (extrapolated) | inf |",
        "| `mga` | 15 | 1.50 | 1.00 |",
        "| `mha` | 10 | 1.00 | 1.00 |",
    ]


def test_other_budgets_are_refused(small, tmp_path, capsys):
    other = folder_of(tmp_path / "other", of_tokens("mha", 400, 5.0) + of_tokens("mha", 2000, 4.0))
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps({"milliseconds": MILLISECONDS}))
    assert equal_time.main(["table", str(small), str(other), "--steps", str(steps)]) == 2
    assert "expected three budgets, each twice the last, got [400, 1000, 2000]" in (
        capsys.readouterr().err
    )
    cells = {"mha": group(of_tokens("mha", 1000, 4.0))[0]}
    with pytest.raises(ValueError, match="three budgets"):
        equal_time.law_of(cells, tmp_path / "absent")


def test_a_cell_without_a_time_is_named(small, law, tmp_path, capsys):
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps({"milliseconds": {"mha": 1.0, "mla": 2.0}}))
    assert equal_time.main(["table", str(small), str(law), "--steps", str(steps)]) == 2
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
