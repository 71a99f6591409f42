"""From pytest-benchmark's JSON to a result file, and from that file alone to table and plot.

`python -m bench.results collect RAW.json` writes bench/results/<gpu>.json and prints its table;
`python -m bench.results render bench/results/<gpu>.json` writes the table into README.md, between
its markers, and the plot beside the file.
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
MARKERS = "<!-- attention on a GPU -->", "<!-- end -->"


def collect(raw: dict[str, Any]) -> dict[str, Any]:
    """One row per case, direction and system: the median of its turns' medians."""
    seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    flops: dict[tuple[str, str], float] = {}
    for entry in raw["benchmarks"]:
        about = entry["extra_info"]
        seconds[about["case"], about["direction"], about["system"]].append(entry["stats"]["median"])
        flops[about["case"], about["direction"]] = about["flops"]
    rows = [
        {
            "case": case,
            "direction": direction,
            "system": system,
            "milliseconds": 1e3 * statistics.median(turns),
            "spread": max(turns) / min(turns) - 1,
            "tflops": flops[case, direction] / statistics.median(turns) / 1e12,
        }
        for (case, direction, system), turns in seconds.items()
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


def table(results: dict[str, Any]) -> str:
    """TFLOP/s as Markdown, a row per case and direction, a column per system."""
    systems = list(dict.fromkeys(row["system"] for row in results["rows"]))
    figures: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in results["rows"]:
        figures[row["case"], row["direction"]][row["system"]] = f"{row['tflops']:.3g}"
    lines = [f"| TFLOP/s | | {' | '.join(systems)} |", "|:--|:--|" + "--:|" * len(systems)]
    lines += [
        f"| {case} | {direction} | {' | '.join(found.get(s, '-') for s in systems)} |"
        for (case, direction), found in figures.items()
    ]
    about = "{gpu}, driver {driver}, torch {torch}, triton {triton}, commit {commit}"
    return "\n".join([*lines, "", about.format(**results) + ", bf16, width 64."])


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of TFLOP/s, one panel per direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    systems = list(dict.fromkeys(row["system"] for row in results["rows"]))
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    figure, panels = plt.subplots(2, 1, figsize=(max(6, len(cases)), 8), layout="constrained")
    for panel, direction in zip(panels, ("forward", "backward"), strict=True):
        for index, system in enumerate(systems):
            rows = [
                row
                for row in results["rows"]
                if (row["system"], row["direction"]) == (system, direction)
            ]
            width = 0.8 / len(systems)
            places = [cases.index(row["case"]) + width * index for row in rows]
            panel.bar(places, [row["tflops"] for row in rows], width, label=system)
        panel.set(title=f"{direction}, {results['gpu']}", ylabel="TFLOP/s")
        panel.set_xticks([n + 0.4 for n in range(len(cases))], cases, rotation=30, ha="right")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def into_readme(text: str, readme: Path) -> None:
    """Put a table between the README's markers."""
    first, last = MARKERS
    before, _, rest = readme.read_text().partition(first)
    _, found, after = rest.partition(last)
    if not found:
        raise ValueError(f"{readme}: expected the markers {first} and {last}, got none")
    readme.write_text(f"{before}{first}\n{text}\n{last}{after}")


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
        name = re.sub(r"\W+", "-", results["gpu"].lower())
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        print(table(results))
    else:
        results = json.loads(arguments.results.read_text())
        into_readme(table(results), arguments.readme)
        plot(results, arguments.results.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
