"""One training run: a mechanism, a config, a corpus."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from smollm.attention import MECHANISMS
from smollm.data import Corpus
from smollm.model import SmolLM
from smollm.model.checkpoint import save_model
from smollm.model.config import build_model
from smollm.training import metrics
from smollm.training.config import Config, TrainConfig

UNTIMED_STEPS = 5  # kernels load and allocators fill during the first steps


@dataclass
class Run:
    """What a run has measured so far; None where it did not come to that."""

    mechanism: str
    parameters: int
    flops_per_token: int  # forward and backward
    status: str = "running"  # then "finished", "interrupted" or "diverged"
    steps: int = 0
    tokens: int = 0
    train_loss: float | None = None  # mean of the records of the last tenth
    val_loss: float | None = None  # nats per token
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None  # of the GPU's datasheet bf16 rate
    first_step_seconds: float | None = None  # compilation included
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    gradient_norm_mean: float | None = None
    gradient_norm_max: float | None = None
    generation_tokens_per_second: float | None = None
    cache_bytes_per_token: int | None = None
    sample: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        return MECHANISMS[self.mechanism].title


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, stable, decay: linear up to lr, flat, then linear towards 0 at the last step."""
    decay_steps = round(config.decay_fraction * config.steps)
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = min(1.0, (config.steps - step) / max(1, decay_steps))
    return config.lr * min(warmup, decay)


def make_optimizer(model: SmolLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on projections alone, not on embeddings, norms, biases, pressures."""
    embedding = model.embed_tokens.weight
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim >= 2 and p is not embedding]
    others = [p for p in parameters if p.ndim < 2 or p is embedding]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def train_run(
    mechanism: str,
    config: Config,
    corpus: Corpus,
    device: torch.device,
    progress: Progress,
) -> Run:
    """Train one model; its log and weights are in config.output_dir afterwards.

    Ctrl-C ends the run early with status "interrupted"; a loss that is not finite ends it with
    "diverged". What was measured until then is kept either way.
    """
    train = config.train
    torch.manual_seed(train.seed)
    memory = metrics.PeakMemory(device)
    model = build_model(mechanism, config.model, corpus.vocab_size).to(device)
    run = Run(
        mechanism,
        parameters=model.count_parameters(),
        flops_per_token=3 * model.flops_per_token(train.seq_len),
    )
    folder = config.output_dir / mechanism
    folder.mkdir(parents=True, exist_ok=True)
    display = _Display(progress, run.title, train.steps)
    start = time.perf_counter()
    with metrics.MetricsLog(folder / "metrics.jsonl") as log:
        try:
            for record in _optimise(model, corpus, train, run, device):
                log.write(record)
                run.history.append(record)
                display.show(run, record, memory.bytes())
            if run.status == "running":
                for name, value in metrics.generation(model, corpus, train).items():
                    setattr(run, name, value)
                run.status = "finished"
        except KeyboardInterrupt:
            run.status = "interrupted"
        run.peak_memory_bytes = memory.bytes()
        run.seconds = time.perf_counter() - start
        run.train_loss = _recent_loss(run)
        log.write({name: value for name, value in vars(run).items() if name != "history"})
    display.close()
    save_model(
        config.output_dir / f"{mechanism}_model.pt",
        model,
        mechanism,
        config.model,
        status=run.status,
        steps=run.steps,
        corpus_sha256=corpus.sha256,
    )
    return run


def _optimise(
    model: SmolLM, corpus: Corpus, config: TrainConfig, run: Run, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Take the steps, keeping run up to date; yields a record every log_every steps."""
    optimizer = make_optimizer(model, config)
    network: Callable[..., Any] = torch.compile(model) if config.compile else model
    watch = _Stopwatch(device)
    step_tokens = config.batch_size * config.seq_len * config.grad_accum
    untimed = min(UNTIMED_STEPS, config.steps - 1)
    norms: list[Tensor] = []
    model.train()
    for step in range(config.steps):
        if step == untimed:
            watch.start()
        began = time.perf_counter()
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=device)
        for micro in range(config.grad_accum):
            index = step * config.grad_accum + micro
            batch = corpus.train.batch(index, config.batch_size, config.seq_len, config.seed)
            ids, cu_seqlens = metrics.batch_arguments(
                batch.to(device, non_blocking=True), corpus.eos_id, config.document_mask
            )
            with metrics.autocast(config, device):
                part = network(ids, labels=ids, cu_seqlens=cu_seqlens)["loss"] / config.grad_accum
            part.backward()
            loss += part.detach()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.clip).detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.steps, run.tokens = step + 1, (step + 1) * step_tokens
        if step == 0:
            metrics.synchronize(device)
            run.first_step_seconds = time.perf_counter() - began

        last = step + 1 == config.steps
        validating = last or run.steps % config.val_every == 0
        if not validating and step > 0 and run.steps % config.log_every:
            continue
        record = {
            "step": run.steps,
            "tokens": run.tokens,
            "loss": float(loss),
            "lr": rate,
            "gradient_norm": float(norms[-1]),
        }
        all_norms = torch.stack(norms)
        run.gradient_norm_mean = float(all_norms.mean())
        run.gradient_norm_max = float(all_norms.max())
        if step >= untimed:
            run.tokens_per_second = (run.steps - untimed) * step_tokens / watch.seconds()
            peak = metrics.peak_flops(device)
            if peak is not None:
                run.mfu = run.tokens_per_second * run.flops_per_token / peak
        if not math.isfinite(record["loss"]):
            run.status = "diverged"
            yield record
            return
        if validating:
            with watch.paused():
                measured = metrics.evaluate(model, corpus, config)
            record.update(measured)
            for name, value in measured.items():
                setattr(run, name, value)
        yield record


def _recent_loss(run: Run) -> float | None:
    if not run.history:
        return None
    recorded = run.history[-1]["step"]
    recent = [record["loss"] for record in run.history if record["step"] > 0.9 * recorded]
    return sum(recent) / len(recent)


class _Stopwatch:
    """Seconds of a device's work, validations left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0

    def start(self) -> None:
        metrics.synchronize(self._device)
        self._started = time.perf_counter()

    def seconds(self) -> float:
        metrics.synchronize(self._device)
        return time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        metrics.synchronize(self._device)
        began = time.perf_counter()
        yield
        metrics.synchronize(self._device)
        self._started += time.perf_counter() - began


class _Display:
    """A run's line in the live display; validations are printed above it and stay."""

    def __init__(self, progress: Progress, title: str, steps: int) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task(f"{title:4}", total=steps, facts="")

    def show(self, run: Run, record: dict[str, Any], memory: int) -> None:
        facts = [f"loss {record['loss']:.3f}", f"lr {record['lr']:.1e}"]
        if run.tokens_per_second is not None:
            facts.append(f"{run.tokens_per_second:,.0f} tok/s")
        if run.mfu is not None:
            facts.append(f"MFU {run.mfu:.1%}")
        facts.append(f"{memory / 2**20:,.0f} MiB")
        self._progress.update(self._task, completed=run.steps, facts="  ".join(facts))
        if "val_loss" in record:
            self._progress.console.print(
                f"{run.title:4} step {run.steps:>6,}  train {record['loss']:.3f}  "
                f"validation {record['val_loss']:.3f}  {record['bits_per_byte']:.3f} bits/byte"
            )

    def close(self) -> None:
        self._progress.stop_task(self._task)


def make_progress() -> Progress:
    """The live display of a study."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True),
    )
