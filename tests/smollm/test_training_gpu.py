"""What a training run does to a GPU."""

import json

import pytest
import torch
from study_cases import tiny

from smollm.studies import commands
from smollm.training.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("flags", [[], ["--document-mask"], ["--optimizer=muon"]],
                         ids=["plain", "document-mask", "muon"])  # fmt: skip
@pytest.mark.parametrize("mechanism", ["gqa", "mga"])
def test_no_step_waits_for_the_gpu(mechanism, flags, data_dir, tmp_path, monkeypatch):
    """But those that are logged, and the first ones, in which kernels load."""
    step = Trainer._step

    def watched(self, loader):
        torch.cuda.set_sync_debug_mode("error" if self._run.steps > 3 else "default")
        try:
            step(self, loader)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)
    flags = [f"--variants={mechanism}", "--steps=20", "--log-every=10", "--val-every=20",
             "--compile=off", *flags]  # fmt: skip
    assert commands.main(tiny(flags, data_dir, tmp_path)) == 0


def test_a_compiled_run_is_bf16_and_learns(data_dir, tmp_path):
    flags = ["--steps=60", "--val-every=60", "--lr=1e-2", "--variants", "gqa", "mga"]
    assert commands.main(tiny(flags, data_dir, tmp_path)) == 0
    runs = json.loads((tmp_path / "ablation_results.json").read_text())["runs"]
    for run in runs.values():
        assert run["compile_seconds"] > 0 and run["cache_dtype"] == "bf16" and run["mfu"] != 0
        assert run["history"][-1]["loss"] < run["history"][0]["loss"] - 0.5
