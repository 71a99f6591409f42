"""One training run: a mechanism, a config, a corpus."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from smollm.data import Corpus
from smollm.model import SmolLM
from smollm.model.checkpoint import save_model
from smollm.model.config import build_model
from smollm.training import metrics
from smollm.training.config import Config, TrainConfig
from smollm.training.display import RunDisplay
from smollm.training.interrupts import Interrupts
from smollm.training.optim import accumulate_gradients, learning_rate, make_optimizer
from smollm.training.record import Record, Run, log_file, model_file

UNTIMED_STEPS = 5  # kernels load and allocators fill during the first steps


def train_run(
    run: Run,
    config: Config,
    corpus: Corpus,
    device: torch.device,
    progress: Progress,
    interrupts: Interrupts,
    **about: Any,
) -> None:
    """Train one model, keeping `run` up to date; its log and weights are in config.output_dir.

    Whatever ends the run stands in its status, and what was measured until then is kept:

    - "finished";
    - "interrupted" by a signal;
    - "diverged": a loss or gradient norm was not finite. That step is not taken, and no weights
      are saved;
    - "failed": an error, of memory or the disk for example; `run.error` is its text.

    Args:
        run: a fresh one.
        config, corpus, device: what to train, on what, and where.
        progress: the live display.
        interrupts: entered; signals wait while files are written.
        about: further plain values to keep beside the weights.
    """
    began = time.perf_counter()
    display = RunDisplay(progress, run, config.train.steps)
    model = None
    try:
        with interrupts.released():
            memory = metrics.PeakMemory(device)
            torch.manual_seed(config.train.seed)
            model = build_model(run.mechanism, config.model, corpus.vocab_size).to(device)
            run.parameters = model.count_parameters()
            run.flops_per_token = 3 * model.flops_per_token(config.train.seq_len)
            log_path = config.output_dir / log_file(run.mechanism)
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with metrics.MetricsLog(log_path) as log:
                for record in _optimise(model, corpus, config.train, run, device, interrupts):
                    with interrupts.held():
                        log.write(record)
                        run.history.append(record)
                        run.peak_memory_bytes = memory.bytes()
                    display.show(record)
            if run.status == "running":
                run.take(metrics.generation(model, corpus, config.train))
                run.peak_memory_bytes = memory.bytes()
                run.status = "finished"
    except KeyboardInterrupt:
        run.status = "interrupted"
    except Exception as error:  # the other runs, and what this one measured, outlive it
        run.fail(error)
    run.seconds = time.perf_counter() - began
    run.train_loss = _recent_loss(run)
    display.close()
    if model is not None and run.steps and run.status in ("finished", "interrupted"):
        path = config.output_dir / model_file(run.mechanism)
        about |= {"status": run.status, "steps": run.steps, "corpus_sha256": corpus.sha256}
        about |= {"seed": config.train.seed, "config": config.plain}
        try:
            save_model(path, model, run.mechanism, config.model, **about)
        except Exception as error:  # torch.save reports a full disk in several ways
            run.fail(error)


def _optimise(
    model: SmolLM,
    corpus: Corpus,
    config: TrainConfig,
    run: Run,
    device: torch.device,
    interrupts: Interrupts,
) -> Iterator[Record]:
    """Take the steps, keeping run up to date; yields a record every log_every steps."""
    optimizer = make_optimizer(model, config)
    network: Callable[..., Any] = torch.compile(model) if config.compile else model
    watch = metrics.Stopwatch(device)
    step_tokens = config.batch_size * config.seq_len * config.grad_accum
    untimed = min(UNTIMED_STEPS, config.steps - 1)
    timed = 0, 0.0  # steps and seconds up to the record before
    norms: list[float] = []  # after the warm-up
    model.train()
    for step in range(config.steps):
        interrupts.check()
        if step == untimed:
            watch.start()
        began = time.perf_counter()
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [
            corpus.train.batch(index, config.batch_size, config.seq_len, config.seed)
            for index in range(step * config.grad_accum, (step + 1) * config.grad_accum)
        ]
        loss = accumulate_gradients(network, batches, config, corpus.eos_id, device)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        values = torch.stack((loss, norm)).tolist()
        record = Record(step + 1, (step + 1) * step_tokens, values[0], rate, values[1])
        if not record.finite:
            run.diverge(
                f"loss {record.loss} and gradient norm {record.gradient_norm} in step "
                f"{record.step}, which was not taken"
            )
            yield record
            return
        with interrupts.held():  # a step is taken whole
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.steps, run.tokens = record.step, record.tokens
        if step == 0:
            metrics.synchronize(device)
            run.first_step_seconds = time.perf_counter() - began
        if step >= config.warmup_steps:
            norms.append(record.gradient_norm)

        last = run.steps == config.steps
        validating = last or run.steps % config.val_every == 0
        if not validating and step > 0 and run.steps % config.log_every:
            continue
        if norms:
            run.gradient_norm_mean, run.gradient_norm_max = sum(norms) / len(norms), max(norms)
            run.clipped_steps = sum(norm > config.clip for norm in norms)
        if step >= untimed:
            steps, seconds = run.steps - untimed, watch.seconds()
            run.tokens_per_second = steps * step_tokens / seconds
            record.tokens_per_second = (steps - timed[0]) * step_tokens / (seconds - timed[1])
            timed = steps, seconds
            peak = metrics.peak_flops(device)
            if peak is not None and run.flops_per_token is not None:
                run.mfu = run.tokens_per_second * run.flops_per_token / peak
        if validating:
            with watch.paused():
                measured = metrics.evaluate(model, corpus, config)
            record = Record(**vars(record) | measured)
            if not record.finite:
                run.diverge(f"validation loss {record.val_loss} after step {record.step}")
                yield record
                return
            run.take(measured)
        yield record


def _recent_loss(run: Run) -> float | None:
    """Mean training loss of the records of the last tenth of the steps, at least of the last one.

    Not that of a step that was not taken.
    """
    taken = [r for r in run.history if math.isfinite(r.loss)]
    recent = [r.loss for r in taken if r.step > 0.9 * run.steps] or [r.loss for r in taken[-1:]]
    return sum(recent) / len(recent) if recent else None
