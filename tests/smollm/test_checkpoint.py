"""Saved models: what loads, and what is refused in words."""

import os
import subprocess
import sys

import pytest
import torch
from study_cases import ROOT, SMALL

from smollm.model.build import build_model
from smollm.model.checkpoint import load_model, save_model


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.pt"
    save_model(path, build_model("mla", SMALL, 50), "mla", SMALL, config={"lr": 1.0}, note="kept")
    return path


def test_a_saved_model_loads_with_what_was_said_of_it(saved):
    content = torch.load(saved, weights_only=True)
    assert content["note"] == "kept" and content["config"] == {"lr": 1.0}
    model = load_model(str(saved))
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])
    assert [p.name for p in saved.parent.iterdir()] == ["x.pt"]


def damage(path, kind):
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        path.write_bytes(whole[:100] + bytes(200) + whole[300:])
    elif kind == "text":
        path.write_text("weights\n" * 100)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other keys":
        torch.save({"weights": 1}, path)
    elif kind == "code":
        torch.save(damage, path)
    elif kind == "other weights":
        torch.save(content | {"state_dict": {"a": torch.ones(1)}}, path)
    elif kind == "unknown mechanism":
        torch.save(content | {"mechanism": "mqa"}, path)
    elif kind == "impossible shape":
        flags = content["model_config"] | {"num_heads": 0}
        torch.save(content | {"model_config": flags}, path)


@pytest.mark.parametrize("kind", ["empty", "truncated", "damaged", "text", "folder", "list",
                                  "other keys", "code", "other weights", "unknown mechanism",
                                  "impossible shape"])  # fmt: skip
def test_a_file_that_is_no_model_is_refused_by_name(kind, saved):
    damage(saved, kind)
    with pytest.raises(ValueError, match="expected a model saved by save_model") as refusal:
        load_model(saved)
    text = str(refusal.value)
    assert text.startswith(f"{saved}: ") and "\n" not in text


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pt"):
        load_model(tmp_path / "x.pt")


@pytest.mark.slow
def test_a_full_disk_is_named(tmp_path):
    code = (
        "import resource, sys, pathlib; from study_cases import SMALL\n"
        "from smollm.model.checkpoint import build_model, save_model\n"
        "model = build_model('mha', SMALL, 500)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "save_model(pathlib.Path(sys.argv[1]), model, 'mha', SMALL)\n"
    )
    path = tmp_path / "x.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'smollm'}"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert last == f"OSError: {path}: expected room for the weights, got [Errno 27] File too large"
    assert not list(tmp_path.iterdir())
