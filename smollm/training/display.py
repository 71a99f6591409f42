"""The live display of a study's runs."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from smollm.training.record import Record, Run


class RunDisplay:
    """A run's line in the live display; validations are printed above it and stay."""

    def __init__(self, progress: Progress, run: Run, steps: int) -> None:
        self._progress = progress
        self._run = run
        self._task: TaskID = progress.add_task(f"{run.title:4}", total=steps, facts="")

    def show(self, record: Record) -> None:
        """Bring the line up to date with the newest record."""
        run = self._run
        facts = [f"loss {record.loss:.3f}", f"lr {record.lr:.1e}"]
        if run.tokens_per_second is not None:
            facts.append(f"{run.tokens_per_second:,.0f} tok/s")
        if run.mfu is not None:
            facts.append(f"MFU {run.mfu:.1%}")
        if run.peak_memory_bytes is not None:
            facts.append(f"{run.peak_memory_bytes / 2**20:,.0f} MiB")
        self._progress.update(self._task, completed=run.steps, facts="  ".join(facts))
        if record.val_loss is not None:
            self.say(
                f"step {record.step:>6,}  train {record.loss:.3f}  "
                f"validation {record.val_loss:.3f}  {record.bits_per_byte:.3f} bits/byte"
            )

    def say(self, text: str) -> None:
        """Print a line above the display, where it stays."""
        self._progress.console.print(
            f"{self._run.title:4} {text}", markup=False, highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Stop the line's clock."""
        self._progress.stop_task(self._task)


def make_progress(console: Console) -> Progress:
    """The live display of a study on a console, as quiet as it is."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    )
