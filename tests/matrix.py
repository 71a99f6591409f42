"""Run the tests and the resource report under every pair of PyTorch and Triton that is supported.

`make matrix`, or `python tests/matrix.py --torch 2.15` for some. Each pair gets a copy of the
project and a virtual environment, up to 7 GB in a temporary folder that goes before the next comes.
Exits with 1 unless all passed in all of them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAIRS = {"2.11": "3.6", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}  # Triton by PyTorch
NOT_COPIED = ".git", ".venv", ".data", "*.egg-info", "__pycache__", "ablation_results"
TITLES = "torch", "triton", "tests", "kernels of the SmolLM shape", "packed on Hopper"


def run(*command: str | Path, cwd: Path) -> tuple[bool, str]:
    """Whether a command succeeded, and the last line of what it said, all of which is shown."""
    environment = os.environ | {"PIP_CONSTRAINT": os.devnull}  # the machine's may forbid a version
    last = ""
    with subprocess.Popen(
        command, cwd=cwd, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode == 0, last


def check(torch: str, triton: str, copy: Path, environment: Path) -> tuple[bool, Sequence[str]]:
    """Whether all is well with a copy of the project in a new environment; a row of the table."""
    python = environment / "bin" / "python"
    wanted = f"torch=={torch}.*", f"triton=={triton}.*", "-e", ".[test]"
    for command in (
        (sys.executable, "-m", "venv", environment),
        (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *wanted),
        (python, "-c", "import torch, triton; print(torch.__version__, triton.__version__)"),
    ):
        done, said = run(*command, cwd=copy)
        if not done:
            return False, (torch, triton, f"not installed: {said}", "", "")
    tested, tests = run(python, "-m", "pytest", "-m", "slow or not slow", cwd=copy)
    report = python, "-m", "bench.resources", "--width", "64"
    compiled, kernels = run(*report, cwd=copy)
    also, packed = run(*report, "--packed", "--arch", "90", "--dtype", "bfloat16", cwd=copy)
    return tested and compiled and also, (*said.split(), tests, kernels, packed)


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", nargs="+", choices=PAIRS, default=PAIRS)
    rows, passed = [TITLES], True
    for torch in parser.parse_args(argv).torch:
        print(f"\ntorch {torch}, triton {PAIRS[torch]}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, "copy")
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
            well, row = check(torch, PAIRS[torch], copy, Path(scratch, "environment"))
        rows.append(row)
        passed = passed and well
    print(f"\n{table(rows)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
