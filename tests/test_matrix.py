"""The versions that the project asks for are those that `make matrix` tries, all of them."""

import tomllib

import pytest
from packaging.requirements import Requirement

from tests import matrix

PAIRS = list(matrix.PAIRS.items())


def test_the_bounds_admit_what_is_tried():
    project = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
    asked = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, versions in zip(("torch", "triton"), zip(*PAIRS, strict=True), strict=True):
        assert f">={versions[0]}" in str(asked[name])
        assert all(asked[name].contains(f"{version}.1") for version in versions)
        major, minor = map(int, versions[-1].split("."))
        assert not asked[name].contains(f"{major}.{minor + 1}.0")


def test_ci_has_one_of_the_pairs():
    constraints = (matrix.ROOT / ".ci" / "constraints.txt").read_text().split()
    assert constraints in [[f"torch=={a}.*", f"triton=={b}.*"] for a, b in PAIRS]


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        (None, "1.0 2.0 fine fine fine"),
        ("install", "2.13 3.7 not installed: a fault"),
        ("-c", "2.13 3.7 not installed: a fault"),
        ("pytest", "1.0 2.0 a fault fine fine"),
        ("bench.resources", "1.0 2.0 fine a fault a fault"),
        ("--packed", "1.0 2.0 fine fine a fault"),
    ],
)
def test_one_environment_fails_and_the_others_go_on(fault, row, monkeypatch, capsys):
    wanted, copies = [], set()

    def run(*command, cwd):
        copies.add(cwd)
        assert (cwd / "pyproject.toml").exists()
        assert "pytest" not in command or "slow or not slow" in command  # all of the suite
        wanted.extend(word for word in map(str, command) if word.startswith("torch=="))
        if fault in command and wanted[-1] == "torch==2.13.*":
            return False, "a fault"
        return True, "1.0 2.0" if "-c" in command else "fine"

    monkeypatch.setattr(matrix, "run", run)
    assert matrix.main([]) == (1 if fault else 0)
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert rows == ["1.0 2.0 fine fine fine", row, *["1.0 2.0 fine fine fine"] * 2]
    assert wanted == [f"torch=={torch}.*" for torch in matrix.PAIRS]
    assert len(copies) == 4 and not any(copy.exists() for copy in copies)


def test_a_command_is_judged_by_its_status_and_quoted_by_its_last_line(tmp_path, capfd):
    assert matrix.run("sh", "-c", "echo one; echo two >&2; echo", cwd=tmp_path) == (True, "two")
    assert matrix.run("sh", "-c", "echo $PIP_CONSTRAINT; exit 3", cwd=tmp_path) == (
        False,
        "/dev/null",
    )
    assert capfd.readouterr().out == "one\ntwo\n\n/dev/null\n"
