"""From pytest-benchmark's JSON to a result file, and from that file alone to table and plot.

`python -m bench.results collect RAW.json` writes bench/results/<gpu>.json and prints its table;
`python -m bench.results render FILE` writes the table of that, or of what `bench.bench_cpu` wrote,
into README.md, between its markers, and the plot beside the file.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKERS = {
    "gpu": "<!-- on a GPU -->",
    "cpu": "<!-- on a CPU -->",
}  # in the README, each with an end
END = "<!-- end -->"


def collect(raw: dict[str, Any]) -> dict[str, Any]:
    """One row per case, direction and system: the median of its turns' medians."""
    seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    work: dict[tuple[str, str, str], tuple[float, str]] = {}
    for entry in raw["benchmarks"]:
        about = entry["extra_info"]
        key = about["case"], about["direction"], about["system"]
        seconds[key].append(entry["stats"]["median"])
        work[key] = about["work"], about["unit"]
    rows = [
        {
            **dict(zip(("case", "direction", "system"), key, strict=True)),
            "milliseconds": 1e3 * statistics.median(turns),
            "spread": max(turns) / min(turns) - 1,
            "rate": work[key][0] / statistics.median(turns),
            "unit": work[key][1],
        }
        for key, turns in seconds.items()
    ]
    return {**machine(), "rows": rows}


def machine() -> dict[str, str]:
    """What the figures were measured on and with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def by_unit(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each unit: TFLOP/s of training, GB/s of decoding."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        groups[row["unit"]].append(row)
    return groups


def table(results: dict[str, Any]) -> str:
    """Rates as Markdown, a table per unit, a row per case and direction, a column per system."""
    lines = []
    for unit, rows in by_unit(results).items():
        systems = list(dict.fromkeys(row["system"] for row in rows))
        figures: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        for row in rows:
            figures[row["case"], row["direction"]][row["system"]] = f"{row['rate']:.3g}"
        lines += [f"| {unit} | | {' | '.join(systems)} |", "|:--|:--|" + "--:|" * len(systems)]
        lines += [
            f"| {case} | {direction} | {' | '.join(found.get(s, '-') for s in systems)} |"
            for (case, direction), found in figures.items()
        ]
        lines.append("")
    about = "{gpu}, driver {driver}, torch {torch}, triton {triton}, commit {commit}, bf16."
    if device(results) == "cpu":
        about = "{cpu}, {threads} threads, torch {torch}, commit {commit}, fp32 where not said."
    return "\n".join([*lines, about.format(**results)])


def plot(results: dict[str, Any], path: Path) -> None:
    """Rates on a logarithmic axis, so that ratios are distances; a panel per unit and direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    parts: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for unit, rows in by_unit(results).items():
        for row in rows:
            parts[unit, row["direction"]].append(row)
    cases = {part: list(dict.fromkeys(row["case"] for row in rows)) for part, rows in parts.items()}
    systems = list(dict.fromkeys(row["system"] for rows in parts.values() for row in rows))
    heights = [1 + 0.3 * len(names) for names in cases.values()]
    figure, panels = plt.subplots(
        len(parts),
        figsize=(9, 1 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    marks = {}
    for panel, ((unit, direction), rows) in zip(panels[:, 0], parts.items(), strict=True):
        names = cases[unit, direction]
        for index, system in enumerate(systems):
            shown = [row for row in rows if row["system"] == system]
            rates, places = [r["rate"] for r in shown], [names.index(r["case"]) for r in shown]
            if shown:
                style = "s" if system.startswith("ours") else "o"
                (marks[system],) = panel.plot(rates, places, style, color=f"C{index}", alpha=0.8)
        panel.set(title=direction, xlabel=unit, xscale="log", ylim=(len(names) - 0.5, -0.5))
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_yticks(range(len(names)), names)
        panel.grid(alpha=0.3)
    figure.suptitle(results[device(results)])
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def into_readme(text: str, readme: Path, first: str) -> None:
    """Put a table between a marker of the README's and the next end."""
    before, _, rest = readme.read_text().partition(first)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{readme}: expected the markers {first} and {END}, got none")
    readme.write_text(f"{before}{first}\n{text}\n{END}{after}")


def named(hardware: str) -> str:
    """The name of a GPU or CPU as files have it."""
    return re.sub(r"\W+", "-", hardware.lower()).strip("-")


def device(results: dict[str, Any]) -> str:
    """What the figures are of: "gpu" or "cpu"."""
    return "cpu" if "cpu" in results else "gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.results", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("collect")
    command.add_argument("raw", type=Path, help="what --benchmark-json wrote")
    command.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    command = commands.add_parser("render")
    command.add_argument("results", type=Path, help="what collect wrote")
    command.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args(argv)
    if arguments.command == "collect":
        results = collect(json.loads(arguments.raw.read_text()))
        arguments.output.mkdir(parents=True, exist_ok=True)
        output = arguments.output / f"{named(results['gpu'])}.json"
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results))
    else:
        results = json.loads(arguments.results.read_text())
        into_readme(table(results), arguments.readme, MARKERS[device(results)])
        plot(results, arguments.results.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
