"""A study: train every variant on the same tokens in the same order, then compare them."""

import argparse
import dataclasses
import importlib.metadata
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import torch
import tyro
from rich.console import Console

from smollm.data import Corpus, load_corpus
from smollm.files import write_json
from smollm.studies import report
from smollm.training.config import PRESETS, Config, Preset, check_config
from smollm.training.run import Run, make_progress, train_run

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py's command line; returns its exit status."""
    console = Console()
    config = parse(sys.argv[1:] if argv is None else argv)
    try:
        device, corpus = prepare(config)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return run_study(config, corpus, device, console)


def parse(argv: Sequence[str]) -> Config:
    """Read the flags; the preset among them sets the others' defaults."""
    chooser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", choices=get_args(Preset))
    preset = chooser.parse_known_args(list(argv))[0].preset
    if preset is None:
        preset = "ablation" if torch.cuda.is_available() else "cpu"
    return tyro.cli(
        Config,
        prog="train.py",
        args=list(argv),
        default=PRESETS[preset],
        config=(tyro.conf.OmitArgPrefixes,),
    )


def prepare(config: Config) -> tuple[torch.device, Corpus]:
    """Check everything that could fail later, and load the data.

    Raises:
        ValueError, OSError: what is wrong with the flags, the corpus or the output folder.
    """
    check_config(config, vocab_size=1)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    train = config.train
    corpus = load_corpus(train.corpus, train.data_dir)
    for split in (corpus.train, corpus.val):
        split.num_windows(train.seq_len)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if train.device == "auto" else train.device), corpus


def run_study(config: Config, corpus: Corpus, device: torch.device, console: Console) -> int:
    """Train the variants, keeping results current after each; returns the exit status."""
    folder = config.output_dir
    about = describe(config, corpus, device)
    for name, value in headline(about).items():
        console.print(f"{name}: {value}", highlight=False)
    runs: list[Run] = []
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        progress = make_progress()
        with progress:
            for mechanism in config.mechanisms:
                runs.append(train_run(mechanism, config, corpus, device, progress))
                write_json(folder / "ablation_results.json", _results(runs, about))
                if runs[-1].status == "interrupted":
                    break
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
    finished = len(runs) == len(config.mechanisms) and runs[-1].status != "interrupted"
    if runs:
        report.write_report(folder, runs, headline(about))
        console.print(report.table(runs))
        for line in report.best_lines(runs):
            console.print(line)
    where = f"in {folder}/" if runs else "were written: no run had begun"
    console.print(f"Results {where}" if finished else f"Interrupted. Results so far {where}")
    return 0 if finished else INTERRUPTED


def describe(config: Config, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """Everything that a result depends on, as plain values."""
    packages = ("torch", "triton", "numpy", "einops", "tokenizers", "datasets")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "device": gpu or f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "vocab_size": corpus.vocab_size,
            "train_tokens": corpus.train.tokens,
            "val_tokens": corpus.val.tokens,
        },
        "config": dataclasses.asdict(config) | {"model": config.model.flags},
    }


def headline(about: dict[str, Any]) -> dict[str, str]:
    """The facts that stand above a study's table."""
    corpus, train = about["corpus"], about["config"]["train"]
    lines = {
        "Corpus": f"{corpus['name']} (sha256 {corpus['sha256'][:12]}), "
        f"{corpus['train_tokens']:,} training tokens, vocabulary {corpus['vocab_size']:,}",
        "Run": f"preset {about['config']['preset']}, {train['steps']:,} steps of "
        f"{train['batch_size'] * train['grad_accum']} x {train['seq_len']} tokens, "
        f"seed {train['seed']}",
        "Device": f"{about['device']}, torch {about['versions']['torch']}",
    }
    if corpus["name"] == "builtin":
        lines["Note"] = (
            "the built-in corpus proves the pipeline, not an architecture; "
            "`python -m smollm.data --corpus fineweb-edu-dedup --shards 2` prepares a real one"
        )
    return lines


def git_commit() -> str | None:
    """The source's commit, with "-dirty" when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _results(runs: list[Run], about: dict[str, Any]) -> dict[str, Any]:
    measured = {run.mechanism: dataclasses.asdict(run) for run in runs}
    return {**about, "runs": measured, "best": report.best(runs)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
