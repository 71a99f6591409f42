"""A study's table, verdicts and page."""

import base64
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from rich.table import Table

from smollm.data import BUILTINS
from smollm.files import write_atomically
from smollm.studies import folder as places
from smollm.studies.compare import (
    Difference,
    Group,
    at_their_best,
    differences,
    group,
    speed_ups,
)
from smollm.training.record import Run

Format = Callable[[Any], str]
Noise = dict[str, tuple[float, int]]  # by device
WIDE = 5  # so many groups are columns of the terminal's table, more are rows
MANY_PAIRS = 15  # of six groups; of more not every pair is worth a line


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


COLUMNS: list[tuple[str, str, Format]] = [
    ("Loss", "val_loss", "{:.4f}".format),
    ("Perplexity", "perplexity", "{:,.2f}".format),
    ("Bits/byte", "bits_per_byte", "{:.4f}".format),
    ("Tok/s", "tokens_per_second", "{:,.0f}".format),
    ("Params", "parameters", "{:,.0f}".format),
    ("Peak memory", "peak_memory_bytes", _mib),
    ("Gen tok/s", "generation_tokens_per_second", "{:,.0f}".format),
    ("Cache B/tok", "cache_bytes_per_token", "{:,.0f}".format),
    ("Grad mean", "gradient_norm_mean", "{:.3f}".format),
    ("Grad max", "gradient_norm_max", "{:.3f}".format),
    ("Clipped", "clipped_steps", "{:,.0f}".format),
]
SPREAD = ("val_loss", "bits_per_byte")  # shown with the standard deviation over seeds
NOTE = (
    "Loss is validation's, in nats per token. Peak memory is what the run adds. Gradient norms, "
    "before clipping, and clipped steps are those after the warm-up. A cache row lasts for a "
    "window where there is one."
)
NOTE_OF_SEEDS = " Of several seeds a figure is the mean, ± the standard deviation."

# No winner is named by less than a part of the runner-up's figure or an amount, whichever is more.
# A GPU's allocations repeat exactly, while on a CPU later runs use again what the heap kept of the
# first one's, some 100 MiB. Throughput varies inside a run too; see `_apart`.
NOISE: dict[str, Noise] = {
    "tokens_per_second": {"cuda": (0.03, 0), "cpu": (0.25, 0)},
    "peak_memory_bytes": {"cuda": (0.01, 0), "cpu": (0.25, 128 * 2**20)},
}
ASPECTS = {
    "loss": ("val_loss", False),  # (field, whether more is better)
    "throughput": ("tokens_per_second", True),
    "memory": ("peak_memory_bytes", False),
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:.85em;display:block;overflow-x:auto}"
    "td,th{padding:.3em .7em;border-bottom:1px solid #ddd;white-space:nowrap}"
    "img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow-x:auto}"
)


def headline(about: dict[str, Any]) -> dict[str, str]:
    """The facts that stand above a study's table."""
    corpus, train = about["corpus"], about["config"]["train"]
    several = f"{about['processes']} processes of " if about.get("processes", 1) > 1 else ""
    dtype = f", {about['dtype']}" if "dtype" in about else ""
    lines = {
        "Corpus": f"{corpus['name']} (sha256 {corpus['sha256'][:12]}), "
        f"{corpus['train_tokens']:,} training tokens, vocabulary {corpus['vocab_size']:,}",
        "Run": f"preset {about['config']['preset']}, {train['steps']:,} steps of "
        f"{train['batch_size'] * train['grad_accum']} x {train['seq_len']} tokens, "
        f"seed {', '.join(map(str, about['config']['seeds'] or [train['seed']]))}{dtype}",
        "Device": f"{several}{about['device']}, torch {about['versions']['torch']}",
    }
    if swept := about["config"].get("grid"):
        lines["Swept"] = ", ".join(swept)
    if about["git_commit"] is not None:
        lines["Commit"] = about["git_commit"]
    if corpus["name"] in BUILTINS:
        lines["Note"] = (
            "the built-in corpus proves the pipeline, not an architecture; "
            "`python -m smollm.data --corpus fineweb-edu-dedup --shards 2` prepares a real one"
        )
    return lines


def titles(groups: Sequence[Group]) -> list[str]:
    """The names of the table's figures, that of the group first."""
    kinds = {run.cache_dtype for g in groups for run in g.runs if run.cache_dtype is not None}
    kind = f" ({kinds.pop()})" if len(kinds) == 1 else ""
    names = [title + (kind if title == "Cache B/tok" else "") for title, _, _ in COLUMNS]
    return ["Model", *names]


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """The table's cells; a dash where nothing was measured."""

    def cell(each: Group, name: str, form: Format) -> str:
        mean, spread = each.mean(name), each.spread(name)
        if mean is None:
            return "-"
        return form(mean) + (f" ± {spread:.4f}" if name in SPREAD and spread is not None else "")

    return [[g.label, *(cell(g, name, form) for _, name, form in COLUMNS)] for g in groups]


def table(groups: Sequence[Group]) -> Table:
    """The comparison for a terminal; few groups are columns, so that it fits 80 characters."""
    view = Table(title="Comparison", caption=note(groups))
    names, cells = titles(groups), rows(groups)
    if len(groups) > WIDE:
        shown = [names.index(name) for name in ("Model", "Loss", "Bits/byte", "Tok/s", "Params")]
        for index in shown:
            view.add_column(names[index], justify="right" if index else "left")
        for row in cells:
            view.add_row(*(row[index] for index in shown))
        return view
    view.add_column(names[0])
    for row in cells:
        view.add_column(row[0], justify="right")
    for index, title in enumerate(names[1:], start=1):
        view.add_row(title, *(row[index] for row in cells))
    return view


def markdown(groups: Sequence[Group]) -> list[str]:
    """The comparison as lines of markdown."""
    names = titles(groups)
    lines = ["| " + " | ".join(names) + " |", "|:--" + "|--:" * (len(names) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows(groups)]


def note(groups: Sequence[Group]) -> str:
    """What the table's figures are."""
    return NOTE + NOTE_OF_SEEDS * any(len(each.runs) > 1 for each in groups)


def best(groups: Sequence[Group]) -> dict[str, str | None]:
    """The title of each aspect's winner among those that finished, None where noise decides it."""
    winners: dict[str, str | None] = {}
    for aspect, (name, more) in ASPECTS.items():
        measured = [
            (value, g) for g in groups if g.finished and (value := g.mean(name)) is not None
        ]
        ranked = sorted(measured, key=lambda pair: pair[0], reverse=more)
        if ranked:
            clear = len(ranked) == 1 or _clear(name, *ranked[0], *ranked[1])
            winners[aspect] = ranked[0][1].title if clear else None
    return winners


def _clear(name: str, first: float, winner: Group, second: float, runner_up: Group) -> bool:
    if name == "val_loss":
        found = differences([winner, runner_up])  # none at different tokens, where more are better
        return all(f.clear or (f.low is None and first < second) for f in found)
    part, amount = NOISE.get(name, {}).get(winner.runs[0].device, (0.0, 0))
    if abs(first - second) <= max(part * second, amount):
        return False
    return name != "tokens_per_second" or _apart(winner, runner_up)


def _apart(winner: Group, runner_up: Group) -> bool:
    """Whether 3 in 4 stretches between two records are faster than 3 in 4 of the runner-up's."""
    slow, fast = (
        sorted(
            record.tokens_per_second
            for run in each.finished
            for record in run.history
            if record.tokens_per_second is not None
        )
        for each in (winner, runner_up)
    )
    if min(len(slow), len(fast)) < 4:
        return False
    return slow[len(slow) // 4] > fast[-1 - len(fast) // 4]


def best_lines(groups: Sequence[Group]) -> list[str]:
    """One sentence per aspect."""
    one_seed = max((len(g.finished) for g in groups), default=0) < 2
    lines = []
    for aspect, title in best(groups).items():
        caveat = ", of one seed each" if aspect == "loss" and one_seed and title else ""
        lines.append(
            f"Best model by {aspect}: {title or 'no clear winner, the gap is within noise'}{caveat}"
        )
    return lines


def verdict_lines(groups: Sequence[Group]) -> list[str]:
    """What the losses say: each pair with the seeds to tell it, and the speed-ups.

    Of many pairs those of the best, at its tokens, and those of the first group's mechanism.
    """
    chosen = at_their_best(groups)
    pairs = [pair for pair in differences(chosen) if pair.low is not None]
    told = _foremost(pairs, groups[0].mechanism) if len(pairs) > MANY_PAIRS else pairs
    lines = [str(pair) for pair in told]
    if len(told) > 1:
        of_all = f" of {len(pairs)}" if len(told) < len(pairs) else ""
        lines.append(
            f"Each of these {len(told)}{of_all} intervals holds by itself, not all at once"
        )
    if not pairs and sum(bool(each.finished) for each in chosen) > 1:
        lines.append("No spread is known of one seed: `--seeds 1 2 3` tells differences from luck")
    law, found = speed_ups(groups)
    if law is not None and found:
        lines.append(f"{groups[0].title.split()[0]}'s law: {law}")
        lines += [f"Effective speed-up against it, {speed_up}" for speed_up in found]
    return lines


def _foremost(pairs: Sequence[Difference], baseline: str) -> list[Difference]:
    best = {pair.ours.mean("tokens"): pair.ours for pair in reversed(pairs)}
    return [
        pair
        for pair in pairs
        if pair.ours is best[pair.ours.mean("tokens")]
        or baseline in (pair.ours.mechanism, pair.theirs.mechanism)
    ]


def unfinished_lines(runs: Sequence[Run]) -> list[str]:
    """One sentence per run that did not finish: how it ended, and why."""
    return [
        f"{run.title} {run.status} after {run.steps:,} steps" + (f": {run.error}" * bool(run.error))
        for run in runs
        if run.status != "finished"
    ]


def write_report(folder: Path, runs: Sequence[Run], about: dict[str, str], repeat: str) -> None:
    """Write report.md with its plots into folder, and report.html, one page that holds it all.

    Args:
        folder: an existing folder.
        runs: the runs in table order.
        about: facts for the head of the report, by name.
        repeat: what repeats the study, as text.
    """
    from smollm.studies import plots  # matplotlib takes half a second

    groups = group(runs)
    chosen = at_their_best(groups)
    images = {
        "Loss against tokens and time": (places.LOSS_PLOT, plots.plot_loss, chosen),
        "Loss against throughput and cache": (places.TRADE_OFF_PLOT, plots.plot_trade_offs, chosen),
        "Throughput and memory": (places.BARS_PLOT, plots.plot_bars, chosen),
        "Loss against learning rate": (places.RATES_PLOT, plots.plot_rates, groups),
    }
    if not any("lr" in each.point for each in groups):
        del images["Loss against learning rate"]
        (folder / places.RATES_PLOT).unlink(missing_ok=True)
    for path, plot, drawn in images.values():
        plot(folder / path, drawn)
    lines = ["# Attention ablation", ""]
    verdicts = (*unfinished_lines(runs), *best_lines(chosen), *verdict_lines(groups))
    lines += [f"- {line}" for line in verdicts]
    lines += ["", *markdown(groups), "", note(groups)]
    lines += _inference(chosen)
    for title, (path, _, _) in images.items():
        lines += ["", f"![{title}]({path})"]
    sampled = [each.finished[0] for each in chosen if each.finished and each.finished[0].sample]
    if sampled:
        lines += ["", "## Samples", "", SAMPLES]
    for run in sampled:
        lines += ["", f"{run.title}:", "", "```text", sample_text(run), "```"]
    lines += ["", "## To repeat it", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "```toml", repeat.strip(), "```"]
    text = "\n".join(lines) + "\n"
    write_atomically(folder / places.REPORT, lambda file: file.write(text.encode()))
    page = _page(text, folder)
    write_atomically(folder / places.PAGE, lambda file: file.write(page.encode()))


SAMPLES = (
    "Greedy continuations of one held-out prompt, which ends at `⟫`; `⏎` stands for a blank line."
)


def sample_text(run: Run) -> str:
    """A run's prompt and continuation, with marks where the prompt ends and for blank lines."""
    text = f"{run.prompt}⟫{run.sample}".replace("```", "` ` `")
    return "\n".join(line if line.strip() else "⏎" for line in text.split("\n"))


def _inference(groups: Sequence[Group]) -> list[str]:
    """A table of prefill and decoding at each context, of the first run that finished."""
    names = ("prefill_tokens_per_second", "decode_tokens_per_second")
    lines = []
    for each in groups:
        for measured in each.finished[0].inference if each.finished else ():
            cells = ("-" if (rate := measured[name]) is None else f"{rate:,.0f}" for name in names)
            lines.append(f"| {each.title} | {measured['context']:,} | {' | '.join(cells)} |")
    if not lines:
        return []
    return ["", "| Model | Context | Prefill tok/s | Decode tok/s |", "|:--|--:|--:|--:|", *lines]


def _page(markdown: str, folder: Path) -> str:
    """The report as one HTML file, its images inside."""

    def inside(found: re.Match[str]) -> str:
        content = base64.b64encode((folder / html.unescape(found[1])).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r'src="([\w.]+\.png)"', inside, body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        f"<!doctype html><html lang=en><head>{head}<title>Attention ablation</title>"
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
