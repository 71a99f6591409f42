"""What Triton's compiler takes, of which the interpreter knows nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_compiler_takes_every_variant_of_every_kernel():
    done = subprocess.run(
        [sys.executable, "tests/front_end.py"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *refused, met = done.stdout.splitlines()
    assert not refused, done.stdout
    assert len(met.split()) == 11, met
