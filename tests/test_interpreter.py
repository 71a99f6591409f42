"""All programs of a launch at once give what they give one after the other."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import kernels
from tests import remembered
from tests.cases import AttentionCase, DecodeCase, GeneticCase

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
ROOT = Path(__file__).parent.parent
FP32, BF16 = torch.float32, torch.bfloat16
CASES = [
    (AttentionCase("", q_tokens=97, q_heads=2, width=48), BF16),
    (AttentionCase("", q_tokens=80, window_size=20, lengths=(40, 1, 39), sinks=True), FP32),
    (GeneticCase("", tokens=70, heads=2, width=16, window_size=40), FP32),
    (GeneticCase("", tokens=50, heads=2, width=12, lengths=(33, 1, 16)), BF16),
    (DecodeCase("", (200, 40, 0), rows=200, width=16, window_size=150), BF16),
]
ONE_BY_ONE = """
import sys
from tests import interpreter
from tests.test_interpreter import results, torch

interpreter.hasten()
torch.save(results(), sys.argv[1])
"""


def results():
    """Outputs and gradients of all ops that have kernels of their own."""
    found = []
    for case, dtype in CASES:
        torch.manual_seed(0)
        inputs, options = case.inputs(dtype), {**case.arguments, "impl": "triton"}
        if isinstance(case, DecodeCase):
            found.append(kernels.attention_decode(**inputs, **options))
            continue
        leaves = [x for x in inputs.values() if x is not None and x.is_floating_point()]
        for x in leaves:
            x.requires_grad_()
        if isinstance(case, AttentionCase):
            o = kernels.attention(**inputs, **options)
        else:
            o = kernels.genetic_attention(**inputs, **options, rope=case.rope())
        found += [o.detach(), *torch.autograd.grad(o, leaves, torch.randn_like(o))]
    return found


@pytest.mark.slow
def test_programs_at_once_give_the_bits_of_one_by_one(tmp_path):
    file = tmp_path / "results.pt"
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ONE_BY_ONE, file]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    remembered.forget()
    for _ in range(2):  # of which the second asks only for what the first one did
        for x, y in zip(results(), torch.load(file), strict=True):
            assert torch.equal(x, y)


@triton.jit
def parting_kernel(x_ptr, bounds_ptr, total_ptr, turns_ptr, block: tl.constexpr):
    """Sums of x from a bound to the next, and what decides what a program does."""
    program = tl.program_id(0)
    begin, end = tl.load(bounds_ptr + program), tl.load(bounds_ptr + program + 1)
    total = tl.zeros([block], tl.float32)
    for start in range(begin, end, block):
        place = start + tl.arange(0, block)
        total += tl.load(x_ptr + place, mask=place < end, other=0.0)
    turns = program * 0
    while begin + turns * block < end:
        turns += 1
    if program % 2 == 0:
        tl.store(total_ptr + program, tl.sum(total))
    else:
        tl.store(total_ptr + program, -tl.max(tl.cumsum(total, 0), 0))
    tl.store(turns_ptr + program, turns)


def test_programs_that_part_do_each_its_own():
    bounds = torch.tensor([0, 5, 5, 9, 13, 30, 31, 64], dtype=torch.int32)
    x = torch.arange(64.0)
    total, turns = torch.full([7], torch.nan), torch.full([7], -1, dtype=torch.int32)
    parting_kernel[(7,)](x, bounds, total, turns, block=4)
    sums = torch.stack([x[i:j].sum() for i, j in pairwise(bounds)])
    assert torch.equal(total, sums * torch.tensor([1, -1, 1, -1, 1, -1, 1]))
    assert torch.equal(turns, bounds.diff().add(3).div(4, rounding_mode="floor").int())


@triton.jit
def product(x, y, plus: tl.constexpr):
    return x * y + tl.full([1], plus, tl.float32)


@triton.jit
def larger(x, y):
    if x > y:
        return x
    return y


@triton.jit
def helped_kernel(x_ptr, out_ptr):
    x, y = tl.load(x_ptr), tl.load(x_ptr + 1)
    lane = tl.arange(0, 1)
    tl.store(out_ptr + lane, product(x, x, 0.0))
    tl.store(out_ptr + 1 + lane, product(x, y, 0.0))
    tl.store(out_ptr + 2 + lane, product(y, y, 1.0))
    tl.store(out_ptr + 3 + lane, product(y, x, 1))
    tl.store(out_ptr + 4, larger(x, y))
    tl.store(out_ptr + 5, larger(y, x))


def test_helpers_are_remembered_by_all_that_decides_what_they_do():
    """Which of their operands are one, constants and their types, and numbers that they look at."""
    out = torch.full([6], torch.nan)
    for x, y in ((2.0, 3.0), (7.0, 5.0)):
        helped_kernel[(1,)](torch.tensor([x, y]), out)
        assert out.tolist() == [x * x, x * y, y * y + 1, x * y + 1, max(x, y), max(x, y)]


@triton.jit
def adding_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def test_what_they_can_not_do_at_once_is_refused():
    with pytest.raises(NotImplementedError, match="all programs can do at once"):
        adding_kernel[(2,)](torch.zeros(1))
