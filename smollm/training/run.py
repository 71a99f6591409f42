"""One training run: a mechanism, a config, a corpus."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from smollm.data import Corpus
from smollm.model.checkpoint import save_model
from smollm.model.config import build_model
from smollm.training import metrics
from smollm.training.config import Config
from smollm.training.display import RunDisplay
from smollm.training.interrupts import Interrupts
from smollm.training.loader import Batch, Loader
from smollm.training.optim import Optimizers, accumulate_gradients, learning_rate
from smollm.training.record import Record, Run, checkpoint_folder, log_file, model_file
from smollm.training.state import Checkpoints, identity, seed_step

UNTIMED_STEPS = 5  # kernels load and allocators fill during the first steps


def train_run(
    run: Run,
    config: Config,
    corpus: Corpus,
    device: torch.device,
    progress: Progress,
    interrupts: Interrupts,
    *,
    resume: bool = False,
    **about: Any,
) -> None:
    """Train one model, keeping `run` up to date; its log and weights are in config.output_dir.

    Whatever ends the run stands in its status, and what was measured until then is kept:

    - "finished";
    - "interrupted" by a signal; a checkpoint of where it stood is saved;
    - "diverged": a loss or gradient norm was not finite. The run ends before that step; those that
      a GPU took before the CPU looked do not count, and no weights are saved;
    - "failed": an error, of memory or the disk for example; `run.error` is its text.

    Args:
        run: a fresh one.
        config, corpus, device: what to train, on what, and where.
        progress: the live display.
        interrupts: entered; signals wait while files are written.
        resume: go on from the newest checkpoint, if there is one. On a CPU the weights and all but
            the times are then, to the bit, those of a run that nothing stopped.
        about: further plain values to keep beside the weights.
    """
    began = time.perf_counter()
    display = RunDisplay(progress, run, config.train.steps)
    training = None
    try:
        with interrupts.released():
            memory = metrics.PeakMemory(device)
            training = _Training(run, config, corpus, device, interrupts)
            if resume:
                training.restore(display.say)
            began -= run.seconds or 0.0
            memory.earlier = run.peak_memory_bytes
            log_path = config.output_dir / log_file(run.name)
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with metrics.MetricsLog(log_path, run.history) as log:
                for record in training.records():
                    with interrupts.held():
                        log.write(record)
                        run.history.append(record)
                        run.peak_memory_bytes = memory.bytes()
                        run.seconds = time.perf_counter() - began
                    display.show(record)
            if run.status == "running":
                run.take(metrics.generation(training.model, corpus, config.train))
                run.peak_memory_bytes = memory.bytes()
                run.status = "finished"
    except KeyboardInterrupt:
        run.status = "interrupted"
    except Exception as error:  # the other runs, and what this one measured, outlive it
        run.fail(error)
    run.seconds = time.perf_counter() - began
    run.train_loss = _recent_loss(run)
    display.close()
    if training is None:
        return
    try:
        if run.status == "interrupted":
            training.save()
        if run.steps and run.status in ("finished", "interrupted"):
            path = config.output_dir / model_file(run.name)
            about |= {"status": run.status, "steps": run.steps, "corpus_sha256": corpus.sha256}
            about |= {"seed": config.train.seed, "config": config.plain}
            save_model(path, training.model, run.mechanism, config.model, **about)
    except Exception as error:  # torch.save reports a full disk in several ways
        run.fail(error)


class _Training:
    """The model and optimizer of a run, and what its steps measured that nobody has read yet.

    A GPU is waited for only when the measurements are read: for records, checkpoints, at an end.
    """

    def __init__(
        self, run: Run, config: Config, corpus: Corpus, device: torch.device, interrupts: Interrupts
    ) -> None:
        self._run, self._config, self._corpus, self._device = run, config.train, corpus, device
        self._interrupts = interrupts
        run.config = identity(run.mechanism, config, corpus, device)
        torch.manual_seed(config.train.seed)
        self.model = build_model(run.mechanism, config.model, corpus.vocab_size).to(device)
        self.model.activation_checkpointing = config.train.activation_checkpointing
        compiled = config.train.compile == "on" or (
            config.train.compile == "auto" and device.type == "cuda"
        )
        self._compile_seconds = metrics.compile_seconds if compiled else lambda: 0.0
        self._network: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self._optimizers = Optimizers(self.model, config.train)
        self._unread: list[Tensor] = []  # loss and gradient norm of each step
        self._watch = metrics.Stopwatch(device)
        self._watch.start()
        self._seconds_before = 0.0  # of training, in processes before
        run.parameters = self.model.count_parameters()
        run.flops_per_token = 3 * self.model.flops_per_token(config.train.seq_len)
        folder = config.output_dir / checkpoint_folder(run.name)
        self._checkpoints = Checkpoints(folder, config.train.keep_checkpoints, run.config)

    def restore(self, say: Callable[[str], object]) -> None:
        """Take up the newest checkpoint, if there is one."""
        content = self._checkpoints.newest(say)
        if content is not None:
            self.model.load_state_dict(content["model"])
            self._optimizers.load_state_dict(content["optimizers"])
            self._run.take(vars(Run.of(content["run"])))
            self._seconds_before = self._run.train_seconds
            say(f"going on after step {self._run.steps:,}")

    def save(self) -> None:
        """Save a checkpoint of where the run stands, unless it diverged."""
        self._read()
        self._run.train_seconds = self._seconds_before + self._watch.seconds()
        if self._run.status != "diverged":
            run = self._run.plain | {"status": "running"}
            states = {"model": self.model.state_dict(), "optimizers": self._optimizers.state_dict()}
            self._checkpoints.save(self._run.steps, {**states, "run": run})

    def records(self) -> Iterator[Record]:
        """Take the steps that are left, and yield the records that are due."""
        run, config = self._run, self._config
        self._timed_from = min(run.steps + UNTIMED_STEPS, config.steps - 1)
        self._timed = 0, 0.0  # steps and seconds up to the record before, of those that count
        saved = run.steps
        self._watch.start()
        self.model.train()
        with Loader(self._corpus, config, self._device) as loader:
            while True:
                if self._record_due:
                    yield self._record()
                if run.status != "running" or run.steps == config.steps:
                    return
                if run.steps % config.save_every == 0 and run.steps > saved:
                    with self._interrupts.held(), self._watch.paused():
                        self.save()
                    saved = run.steps
                else:
                    self._interrupts.check()
                    self._step(loader)

    def _step(self, loader: Loader) -> None:
        run, config = self._run, self._config
        step, waited = run.steps, loader.seconds_waited
        if step == self._timed_from:
            self._timed = step, self._watch.seconds()
        began = time.perf_counter()
        seed_step(config.seed, step)
        rate = learning_rate(step, config)
        compiling = self._compile_seconds()
        batches: list[Batch] = loader.step(step)
        loss = accumulate_gradients(self._network, batches, config, self._device)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        with self._interrupts.held():  # a step is taken whole
            self._optimizers.step(rate)
            self._unread.append(torch.stack((loss, norm)))
            run.steps, run.tokens = step + 1, self._tokens(step + 1)
            run.compile_seconds += self._compile_seconds() - compiling
            run.loader_seconds += loader.seconds_waited - waited
        if step == 0:
            metrics.synchronize(self._device)
            run.first_step_seconds = time.perf_counter() - began

    def _read(self) -> None:
        """Read what steps measured; the first that is not finite ends the run before it."""
        if not self._unread:
            return
        run, config = self._run, self._config
        measured = torch.stack(self._unread).tolist()
        self._unread.clear()
        for step, (loss, norm) in enumerate(measured, start=run.steps - len(measured) + 1):
            run.loss, run.gradient_norm = loss, norm
            if not (math.isfinite(loss) and math.isfinite(norm)):
                run.steps, run.tokens = step - 1, self._tokens(step - 1)
                run.diverge(f"loss {loss} and gradient norm {norm} in step {step}")
                return
            if step > config.warmup_steps:
                run.count_norm(norm, step - config.warmup_steps, config.clip)

    @property
    def _validation_due(self) -> bool:
        steps = self._run.steps
        return steps == self._config.steps or steps % self._config.val_every == 0

    @property
    def _record_due(self) -> bool:
        run, diverged = self._run, self._run.status == "diverged"
        logged = run.steps == 1 or run.steps % self._config.log_every == 0 or self._validation_due
        last = run.history[-1].step if run.history else 0
        return (logged or diverged) and run.steps + diverged > last

    def _record(self) -> Record:
        self._read()
        run, config = self._run, self._config
        step = run.steps + (run.status == "diverged")
        rate = learning_rate(step - 1, config)
        seconds = self._watch.seconds()
        run.train_seconds = self._seconds_before + seconds
        record = Record(
            step, self._tokens(step), run.loss, rate, run.gradient_norm, run.train_seconds
        )
        if run.status == "diverged":
            return record
        if run.steps > self._timed_from:
            passed, took = run.steps - self._timed[0], seconds - self._timed[1]
            self._timed = run.steps, seconds
            run.timed_steps, run.timed_seconds = run.timed_steps + passed, run.timed_seconds + took
            record.tokens_per_second = self._tokens(passed) / took
            run.tokens_per_second = self._tokens(run.timed_steps) / run.timed_seconds
            peak = metrics.peak_flops(self._device, config)
            if peak is not None and run.flops_per_token is not None:
                run.mfu = run.tokens_per_second * run.flops_per_token / peak
        if self._validation_due:
            with self._watch.paused():
                measured = metrics.evaluate(self.model, self._corpus, config)
            record = Record(**vars(record) | measured)
            if not record.finite:
                run.diverge(f"validation loss {record.val_loss} after step {record.step}")
            else:
                run.take(measured)
        return record

    def _tokens(self, steps: int) -> int:
        config = self._config
        return steps * config.batch_size * config.seq_len * config.grad_accum


def _recent_loss(run: Run) -> float | None:
    """Mean training loss of the records of the last tenth of the steps, at least of the last one.

    Not that of a step that was not taken.
    """
    taken = [r for r in run.history if math.isfinite(r.loss)]
    recent = [r.loss for r in taken if r.step > 0.9 * run.steps] or [r.loss for r in taken[-1:]]
    return sum(recent) / len(recent) if recent else None
