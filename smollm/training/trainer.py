"""The steps of a run: taken, measured, saved and taken up again."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from smollm.data import Corpus
from smollm.model import SmolLM
from smollm.model.build import build_model
from smollm.training import metrics
from smollm.training.config import Config
from smollm.training.interrupts import Interrupts
from smollm.training.loader import Batch, Loader
from smollm.training.optim import Optimizers, accumulate_gradients, learning_rate
from smollm.training.parallel import World, distribute, full_states, load_full_states
from smollm.training.record import Record, Run, checkpoint_folder
from smollm.training.state import Checkpoints, identity, origin, seed_step

UNTIMED_STEPS = 5  # kernels load and allocators fill during the first steps


class Trainer:
    """The model and optimizers of a run, and what its steps measured that nobody has read yet.

    A GPU is waited for only when the measurements are read: for records, checkpoints, at an end.

    Args:
        run: a fresh one, which is kept up to date.
        config, corpus, world: what to train, on what, and where.
        interrupts: entered; signals wait while a step is taken or a checkpoint saved.
    """

    def __init__(
        self, run: Run, config: Config, corpus: Corpus, world: World, interrupts: Interrupts
    ) -> None:
        self._run, self._config, self._corpus = run, config.train, corpus
        self._shape, self._world, self._interrupts = config.model, world, interrupts
        self._device = device = world.device
        run.config = identity(run.mechanism, config, corpus, device)
        torch.manual_seed(config.train.seed)
        self._model = build_model(run.mechanism, config.model, corpus.vocab_size).to(device)
        self._model.activation_checkpointing = config.train.activation_checkpointing
        run.parameters = self._model.count_parameters()
        run.flops_per_token = 3 * self._model.flops_per_token(config.train.seq_len)
        compiled = config.train.compile == "on" or (
            config.train.compile == "auto" and device.type == "cuda"
        )
        self._compile_seconds = metrics.compile_seconds if compiled else lambda: 0.0
        network = distribute(self._model, world, fsdp=self._config.fsdp)
        self._network: nn.Module = torch.compile(network) if compiled else network  # type: ignore
        self._optimizers = Optimizers(self._model, config.train)
        self._unread: list[Tensor] = []  # loss and gradient norm of each step
        self._watch = metrics.Stopwatch(device)
        self._watch.start()
        self._seconds_before = 0.0  # of training, in processes before
        folder = config.output_dir / checkpoint_folder(run.name)
        self._about = origin(config, corpus)
        self._checkpoints = Checkpoints(folder, config.train.keep_checkpoints, run.config)

    def restore(self, say: Callable[[str], object]) -> None:
        """Take up the newest checkpoint, if there is one."""
        content = self._world.share(self._checkpoints.newest(say) if self._world.leads else None)
        if content is None:
            return
        states = content["model"], content["optimizers"]
        if self._sharded:
            load_full_states(self._model, self._optimizers.parts, states)
        else:
            self._model.load_state_dict(states[0])
            self._optimizers.load_state_dict(states[1])
        self._run.take(vars(Run.of(content["run"])))
        self._seconds_before = self._run.train_seconds
        say(f"going on after step {self._run.steps:,}")

    def save(self) -> None:
        """Save a checkpoint of where the run stands, unless it diverged."""
        self._read()
        self._run.train_seconds = self._seconds_before + self._watch.seconds()
        if self._run.status == "diverged":
            return
        run = self._run.plain | {"status": "running"}
        model, optimizers = (
            full_states(self._model, self._optimizers.parts)
            if self._sharded
            else (self._model.state_dict(), self._optimizers.state_dict())
        )
        if self._world.leads:
            content = {"model": model, "optimizers": optimizers, "run": run, "about": self._about}
            self._checkpoints.save(self._run.steps, content)

    def whole_model(self) -> SmolLM:
        """The model, or on the first process a copy of all shards."""
        if not self._sharded:
            return self._model
        weights, _ = full_states(self._model, self._optimizers.parts)
        model = build_model(self._run.mechanism, self._shape, self._corpus.vocab_size)
        if self._world.leads:
            model.load_state_dict(weights)
        return model.to(self._device)

    @property
    def _sharded(self) -> bool:
        return self._config.fsdp and not self._world.alone

    def records(self) -> Iterator[Record]:
        """Take the steps that are left, and yield the records that are due."""
        run, config = self._run, self._config
        self._timed_from = min(run.steps + UNTIMED_STEPS, config.steps - 1)
        self._timed = 0, 0.0  # steps and seconds up to the record before, of those that count
        saved = run.steps
        self._watch.start()
        self._model.train()
        with Loader(self._corpus, config, self._world) as loader:
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
        seed_step(config.seed, step, self._world.rank)
        rate = learning_rate(step, config)
        compiling = self._compile_seconds()
        batches: list[Batch] = loader.step(step)
        own = sum(batch.num_targets for batch in batches)
        stop, targets = self._world.sum((self._interrupts.requested, own))
        if stop and not self._world.alone:  # all stop before one step
            raise KeyboardInterrupt
        loss = accumulate_gradients(self._network, batches, config, self._world, targets)
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), config.clip)
        if self._sharded:
            norm = norm.full_tensor()  # type: ignore[attr-defined]
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
        unread = torch.stack(self._unread)
        unread[:, 0] = self._world.add_up(unread[:, 0].clone())
        measured = unread.tolist()
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
                reached = run.tokens_per_second * run.flops_per_token
                run.mfu = reached / (peak * self._world.size)
        if self._validation_due:
            with self._watch.paused():
                measured = metrics.evaluate(self._model, self._corpus, config, self._world)
            record = Record(**vars(record) | measured)
            if not record.finite:
                run.diverge(f"validation loss {record.val_loss} after step {record.step}")
            else:
                run.take(measured)
        return record

    def _tokens(self, steps: int) -> int:
        config = self._config
        return steps * config.batch_size * config.seq_len * config.grad_accum
