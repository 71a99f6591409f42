"""One training run: a mechanism, a config, a corpus."""

import math
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.progress import Progress

from smollm.data import Corpus
from smollm.model.checkpoint import save_model
from smollm.training import metrics
from smollm.training.config import Config
from smollm.training.display import RunDisplay
from smollm.training.interrupts import Interrupts
from smollm.training.parallel import World
from smollm.training.record import Run, log_file, model_file
from smollm.training.state import origin
from smollm.training.trackers import open_tracker
from smollm.training.trainer import Trainer


def train_run(
    run: Run,
    config: Config,
    corpus: Corpus,
    world: World,
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

    Of several processes all call it, and the first one alone writes files.

    Args:
        run: a fresh one.
        config, corpus, world: what to train, on what, and where.
        progress: the live display.
        interrupts: entered; signals wait while files are written.
        resume: go on from the newest checkpoint, if there is one. On a CPU the weights and all but
            the times are then, to the bit, those of a run that nothing stopped.
        about: further plain values to keep beside the weights.
    """
    began = time.perf_counter()
    display = RunDisplay(progress, run, config.train.steps)
    trainer = None
    try:
        with interrupts.released():
            memory = metrics.PeakMemory(world.device)
            trainer = Trainer(run, config, corpus, world, interrupts)
            if resume:
                trainer.restore(display.say)
            began -= run.seconds or 0.0
            memory.earlier = run.peak_memory_bytes
            log_path = config.output_dir / log_file(run.name) if world.leads else Path(os.devnull)
            log_path.parent.mkdir(parents=True, exist_ok=True)
            tracker = config.train.log if world.leads else "none"
            with (
                metrics.MetricsLog(log_path, run.history) as log,
                closing(open_tracker(tracker, config.output_dir, run)) as sink,
            ):
                for record in trainer.records():
                    with interrupts.held():
                        log.write(record)
                        sink.log(record)
                        run.history.append(record)
                        run.peak_memory_bytes = memory.bytes()
                        run.seconds = time.perf_counter() - began
                    display.show(record)
            if run.status == "running":
                model = trainer.whole_model()
                if world.leads:
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
    if trainer is None:
        return
    try:
        if run.status == "interrupted":
            trainer.save()
        if run.steps and run.status in ("finished", "interrupted"):
            model = trainer.whole_model()
            path = config.output_dir / model_file(run.name)
            about |= {"status": run.status, "steps": run.steps} | origin(config, corpus)
            if world.leads:
                save_model(path, model, run.mechanism, config.model, **about)
    except Exception as error:  # torch.save reports a full disk in several ways
        run.fail(error)


def _recent_loss(run: Run) -> float | None:
    """Mean training loss of the records of the last tenth of the steps, at least of the last one.

    Not that of a step that was not taken.
    """
    taken = [r for r in run.history if math.isfinite(r.loss)]
    recent = [r.loss for r in taken if r.step > 0.9 * run.steps] or [r.loss for r in taken[-1:]]
    return sum(recent) / len(recent) if recent else None
