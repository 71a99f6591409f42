"""Tiny studies for the tests, in this process and in others that never outlive their test."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from smollm.model.config import ModelConfig
from smollm.studies import plan, plots, study
from smollm.training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(embed_dim=36, num_layers=1, ffn_hidden_dim=48)
TINY = [
    "--preset=cpu", "--embed-dim=36", "--num-layers=1", "--ffn-hidden-dim=48", "--seq-len=32",
    "--batch-size=2", "--steps=6", "--warmup-steps=2", "--log-every=2", "--val-every=3",
    "--val-tokens=128", "--generate-tokens=4", "--latent-dim=16", "--contexts", "8", "16",
    "--dtype=float32",
]  # fmt: skip
PLOTS = "plot_loss", "plot_bars", "plot_trade_offs", "plot_rates"
# Where this process was started to ignore Ctrl-C, its children are too; they draw nothing.
WITH_CTRL_C = (
    "import runpy, signal, sys, types\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "plots = sys.modules['smollm.studies.plots'] = types.ModuleType('plots')\n"
    f"for name in {PLOTS}: setattr(plots, name, lambda path, _: path.write_bytes(b'PNG'))\n"
    "del sys.argv[0]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def tiny(flags, data_dir, output_dir):
    return [*TINY, f"--data-dir={data_dir}", f"--output-dir={output_dir}", *flags]


def run(flags, data_dir, output_dir, capture=None):
    console = Console(file=capture, width=80) if capture else Console(quiet=True)
    config = plan.parse(tiny(flags, data_dir, output_dir))
    return study.run_study(config, study.prepare(config), ALONE, console)


def blank_plots(monkeypatch):
    """Draw nothing, which takes longer than a tiny study."""
    for name in PLOTS:
        monkeypatch.setattr(plots, name, lambda path, _: path.write_bytes(b"\x89PNG"))


@contextmanager
def train_py(arguments):
    """train.py as a process that Ctrl-C reaches, and that is killed when the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", WITH_CTRL_C, "train.py", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
