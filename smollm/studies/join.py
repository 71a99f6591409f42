"""One report of several studies' folders: `python train.py report FOLDER...`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from smollm.studies import OK, report
from smollm.studies.folder import RESULTS, claimed, read_runs
from smollm.studies.plan_file import PLAN
from smollm.studies.study import Output, say, show
from smollm.training.record import Run


def main(argv: Sequence[str]) -> int:
    """Run `train.py report`; returns its exit status, and raises what `write_joined` does."""
    console = Output()
    folder, runs = write_joined(argv)
    show(console, runs)
    say(console, f"Report in {folder}/")
    return OK


def write_joined(argv: Sequence[str]) -> tuple[Path, list[Run]]:
    """Read `FOLDER... [--output-dir FOLDER] [--overwrite]`, and write the report.

    Of runs that are the same in every field the last one counts.

    Returns:
        Where it was written, and the runs.

    Raises:
        ValueError: folders without results, or with another corpus than the others'; a place that
            holds something. OSError: it cannot be written. SystemExit: flags that are none.
    """
    parser = argparse.ArgumentParser(
        prog="train.py report", description="Join the studies of several folders in one report."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a study")
    parser.add_argument("--output-dir", type=Path, help="default: the one folder that is given")
    parser.add_argument("--overwrite", action="store_true", help="replace a report there")
    given = parser.parse_args(argv)
    folders: list[Path] = given.folders
    if given.output_dir is None and len(folders) > 1:
        raise ValueError("output_dir: expected a folder for the report of several, got none")
    output: Path = given.output_dir or folders[0]
    runs: dict[str, Run] = {}
    facts: dict[str, dict[str, None]] = {}
    for folder in folders:
        found = read_runs(folder)
        if not found:
            raise ValueError(f"{folder}: expected a study's results, got no {RESULTS}")
        for name, value in _headline(folder).items():
            facts.setdefault(name, {})[value] = None
        for name, run in found.items():
            key = json.dumps(run.config, sort_keys=True) if run.config else f"{folder}/{name}"
            runs[key] = run
    corpora = {run.config["corpus_sha256"] for run in runs.values() if run.config}
    if len(corpora) > 1:
        raise ValueError(
            "report: expected studies of one corpus, since losses compare on one alone, got "
            f"{len(corpora)}: {', '.join(sorted(corpus[:12] for corpus in corpora))}"
        )
    in_place = output in folders
    with claimed(output, (), overwrite=given.overwrite, resume=in_place and len(folders) == 1):
        head = {name: "; ".join(values) for name, values in facts.items()}
        report.write_report(output, list(runs.values()), head, _plans(folders))
    return output, list(runs.values())


def _headline(folder: Path) -> dict[str, str]:
    path = folder / RESULTS
    try:
        return report.headline(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a study's results, got {error!r}") from error


def _plans(folders: Sequence[Path]) -> str:
    texts = []
    for folder in folders:
        path = folder / PLAN
        text = path.read_text(encoding="utf-8") if path.is_file() else f"# no {PLAN}\n"
        texts.append(f"# {folder}\n{text}" if len(folders) > 1 else text)
    return "\n".join(texts)
