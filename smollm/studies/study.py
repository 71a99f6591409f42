"""A study: train every variant on the same tokens in the same order, then compare them."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from smollm.data import Corpus, load_corpus
from smollm.data.tokenizer import write_tokenizer
from smollm.files import write_json
from smollm.studies import INTERRUPTED, OK, UNFINISHED, report
from smollm.studies.compare import at_their_best, group
from smollm.studies.folder import RESULTS, TOKENIZER, claimed, clear, read_runs
from smollm.studies.plan import Cell, cells
from smollm.studies.plan_file import plan_text, write_plan
from smollm.training.config import Config
from smollm.training.display import make_progress
from smollm.training.interrupts import Interrupts
from smollm.training.metrics import check_targets, cpu_name, dtype_name
from smollm.training.parallel import World, joined
from smollm.training.record import Run, checkpoint_folder
from smollm.training.run import train_run
from smollm.training.state import Checkpoints, clear_checkpoints, differences, identity


class Output(Console):
    """Falls silent when what reads it ends, as `head` does; a study is more than its output."""

    def on_broken_pipe(self) -> None:  # noqa: D102
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def begin(config: Config, interrupts: Interrupts, held: ExitStack) -> tuple[World, Corpus]:
    """Meet the processes that share the study, hold its folder, and load what it trains on.

    Args:
        config: a checked one.
        interrupts: entered; they do not part processes from here on.
        held: what is given back at the study's end.

    Raises:
        ValueError, OSError: the folder or the corpus is refused.
    """
    world = held.enter_context(joined(config.train.device))
    interrupts.polled = not world.alone
    return world, claim(config, world, held)


def claim(config: Config, world: World, held: ExitStack) -> Corpus:
    """Hold the study's folder, load the corpus, and clear what an older study left.

    Of several processes the first one does so, and all are told what it refuses.

    Raises:
        ValueError, OSError: the folder or the corpus is refused.
    """
    resume, refusal = config.resume is not None, None
    if world.leads:
        names = [cell.name for cell in cells(config)]
        folder = claimed(config.output_dir, names, overwrite=config.overwrite, resume=resume)
        try:
            held.enter_context(folder)
            corpus = prepare(config)
            if resume:
                check_same(config, corpus, world.device)
            else:
                clear(config.output_dir)
        except (ValueError, OSError) as error:
            refusal = error
    refusal = world.share(refusal)
    if refusal is not None:
        raise refusal
    return corpus if world.leads else prepare(config)


def check_same(config: Config, corpus: Corpus, device: torch.device) -> None:
    """Refuse to resume what differs from what the folder's runs were.

    Raises:
        ValueError: naming the fields that differ.
    """
    planned = cells(config)
    runs = read_runs(config.output_dir)
    if strangers := [name for name in runs if name not in {cell.name for cell in planned}]:
        raise ValueError(
            f"resume: expected all runs of {config.output_dir} in the study, got none for "
            f"{', '.join(strangers)}"
        )
    for cell in planned:
        about = identity(cell.variant, cell.config, corpus, device)
        run = runs.get(cell.name)
        if run is not None and run.done and (other := differences(run.config or {}, about)):
            raise ValueError(
                f"resume: expected what {config.output_dir}'s {cell.name} was, got {other}"
            )
        Checkpoints(config.output_dir / checkpoint_folder(cell.name), 1, about).check()


def prepare(config: Config) -> Corpus:
    """Load the data, and check that there is something to learn in it.

    Raises:
        ValueError, OSError: what is wrong with the corpus.
    """
    corpus = load_corpus(config.train.corpus, config.train.data_dir)
    fields = (
        "seq_len",
        "batch_size",
        "document_mask",
        "val_tokens",
    )  # what its windows follow from
    distinct = {tuple(getattr(c.config.train, f) for f in fields): c for c in cells(config)}
    for cell in distinct.values():
        for split in (corpus.train, corpus.val):
            split.num_windows(cell.config.train.seq_len)
        check_targets(corpus, cell.config.train)
    return corpus


def run_study(
    config: Config,
    corpus: Corpus,
    world: World,
    console: Console,
    interrupts: Interrupts | None = None,
) -> int:
    """Train the variants, keeping results current after each; returns train.py's exit status.

    It may run in any thread. Signals end it early, and wait while results are written. Of several
    processes all call it, and the first one alone prints and writes.

    Args:
        config: a checked one.
        corpus: `prepare`'s.
        world: where it runs.
        console: all output goes there.
        interrupts: entered; the study's own by default.
    """
    if interrupts is None:
        with Interrupts() as own:
            return run_study(config, corpus, world, console, own)
    if not world.leads:
        console = Console(quiet=True)
    study = Study(config, corpus, world, console, interrupts)
    interrupted = study.train()
    return study.conclude(interrupted) if world.leads else INTERRUPTED if interrupted else OK


class Study:
    """The runs of a study and what is known of them so far; the arguments are `run_study`'s."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        world: World,
        console: Console,
        interrupts: Interrupts,
    ) -> None:
        self._config, self._corpus, self._world = config, corpus, world
        self._console, self._interrupts = console, interrupts
        self._cells = cells(config)
        self._about = describe(config, corpus, world)
        leads = world.leads and config.resume is not None
        self._runs = read_runs(config.output_dir) if leads else {}

    def train(self) -> bool:
        """Train what is left to train; whether a signal ended it early."""
        folder, resume = self._config.output_dir, self._config.resume is not None
        for name, value in report.headline(self._about).items():
            say(self._console, f"{name}: {value}")
        if self._world.leads:
            with suppress(OSError):  # the last write of results tells
                folder.mkdir(parents=True, exist_ok=True)
                write_plan(folder, self._config)
                write_tokenizer(folder / TOKENIZER, self._corpus.tokenizer)
        left = self._world.share([c.name for c in self._cells if not self._done(c)])
        commit = self._about["git_commit"]
        with make_progress(self._console) as progress:
            for cell in self._cells:
                if cell.name not in left:
                    self._settle(cell)
                    continue
                if self._world.sum([self._interrupts.requested])[0]:
                    return True
                run = Run(cell.variant, self._world.device.type, cell.name, cell.point, cell.seed)
                self._runs[cell.name] = run
                train_run(
                    run, cell.config, self._corpus, self._world, progress, self._interrupts,
                    resume=resume, git_commit=commit,
                )  # fmt: skip
                with suppress(OSError):
                    self._write_results()
                    self._settle(cell)
                if run.status == "interrupted":
                    return True
                if run.status == "failed" and not self._world.alone:
                    break  # the processes are no longer at one step
        return False

    def conclude(self, interrupted: bool) -> int:
        """Show and write what came of it; returns train.py's exit status."""
        folder, runs = self._config.output_dir, self._ordered
        if not runs:
            say(self._console, "Interrupted. No run had begun, so there are no results.")
            return INTERRUPTED
        show(self._console, runs)
        unwritten = None
        try:
            self._write_results()
            head, text = report.headline(self._about), plan_text(self._config)
            report.write_report(folder, runs, head, text)
        except OSError as error:
            unwritten = error
        interrupted = interrupted or self._interrupts.requested
        ending = "Interrupted. Results so far" if interrupted else "Results"
        if unwritten:
            say(self._console, f"{ending} could not all be written to {folder}/: {unwritten}")
        else:
            say(self._console, f"{ending} in {folder}/")
        if interrupted and not all(self._done(cell) for cell in self._cells):
            say(self._console, f"`python train.py --resume {shlex.quote(str(folder))}` goes on.")
        if interrupted:
            return INTERRUPTED
        finished = len(runs) == len(self._cells) and all(run.status == "finished" for run in runs)
        return OK if finished and not unwritten else UNFINISHED

    @property
    def _ordered(self) -> list[Run]:
        return [self._runs[cell.name] for cell in self._cells if cell.name in self._runs]

    def _done(self, cell: Cell) -> bool:
        return cell.name in self._runs and self._runs[cell.name].done

    def _settle(self, cell: Cell) -> None:
        """Remove the checkpoints of a run that needs none any more."""
        if self._world.leads and self._done(cell):
            clear_checkpoints(self._config.output_dir / checkpoint_folder(cell.name))

    def _write_results(self) -> None:
        if not self._world.leads:
            return
        folder, runs = self._config.output_dir, self._ordered
        folder.mkdir(parents=True, exist_ok=True)  # someone may have removed it since
        best = report.best(at_their_best(group(runs)))
        measured = {run.name: run.plain for run in runs}
        write_json(folder / RESULTS, {**self._about, "runs": measured, "best": best})


def show(console: Console, runs: Sequence[Run]) -> None:
    """Print the table, how runs ended, and what their losses say."""
    groups = group(runs)
    console.print(report.table(groups))
    lines = report.unfinished_lines(runs), report.best_lines(at_their_best(groups))
    for line in (*lines[0], *lines[1], *report.verdict_lines(groups)):
        say(console, line)


def describe(config: Config, corpus: Corpus, world: World) -> dict[str, Any]:
    """Everything that a result depends on, as plain values."""
    packages = ("triton", "numpy", "einops", "tokenizers", "datasets")
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "processes": world.size,
        "device": gpu or f"{cpu_name()}, {torch.get_num_threads()} threads",
        "dtype": dtype_name(config.train, world.device),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # names its build, as its metadata need not
            **{package: _version(package) for package in packages},
        },
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "vocab_size": corpus.vocab_size,
            "train_tokens": corpus.train.tokens,
            "val_tokens": corpus.val.tokens,
        },
        "config": config.plain,
    }


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


def say(console: Console, text: str) -> None:
    """Print plain text, a path or a command of it never broken over lines."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
