"""Training against its peers.

Run with `python -m pytest -n 0 bench/bench_attention.py --benchmark-json=FILE`.

Every system is checked against fp64 before it is timed, and a wrong one has no number. Times are
the GPU's, L2 flushed before each round; the systems of a case take turns, several times over.
Without a GPU one tiny case proves the path, and its figures mean nothing.
"""

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from bench.costs import flops
from bench.systems import SYSTEMS, Attention, join, system
from bench.timing import clock, time_training
from tests.cases import AttentionCase, LatentCase

GPU = torch.cuda.is_available()
DEVICE, TURNS, ROUNDS = ("cuda", 3, 10) if GPU else ("cpu", 1, 2)
CHECKED_QUERIES = 128


Case = AttentionCase | LatentCase


def _cases() -> list[Case]:
    if not GPU:
        return [
            AttentionCase("tiny", q_tokens=48, width=16),
            LatentCase("tiny-mla", tokens=48, nope=16, rope=8, v_width=16),
        ]
    causal = [
        AttentionCase(f"causal-{q}-{k}-{t}", 32768 // t, t, q_heads=q, k_heads=k)
        for q, k in ((9, 3), (16, 16))
        for t in (2048, 4096, 8192, 16384)
    ]
    windowed = [
        AttentionCase(f"window-{w}-{q}-{k}-8192", 4, 8192, q_heads=q, k_heads=k, window_size=w)
        for q, k in ((9, 3), (16, 16))
        for w in (256, 1024)
    ]
    latent = [
        LatentCase(f"mla-{h}-{d}+{r}-{t}", 32768 // t, t, h, d, r, d)
        for h, d, r in ((9, 64, 32), (16, 128, 64))
        for t in (2048, 8192)
    ]
    return [*causal, *windowed, *latent]


# In the order in which they run: the systems of a case side by side.
TIMINGS = [
    pytest.param(case, direction, turn, name, id=f"{case.name}-{direction}-{turn}-{name}")
    for case in _cases()
    for direction in ("forward", "backward")
    for turn in range(TURNS)
    for name in SYSTEMS
]


class Setting:
    """The tensors of a case, its truth, and each system that has proved right."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.leaves = [
            x.requires_grad_()
            for x in case.inputs(torch.bfloat16, DEVICE).values()
            if x is not None
        ]
        ours = system("ours", case)
        assert ours is not None
        o = ours(*self.leaves)
        self.do = torch.randn_like(o)
        self.gradients = torch.autograd.grad(o, self.leaves, self.do)
        self.truth = self._of_last_queries(torch.float64)
        self.tolerance = 2 * (self._of_last_queries(torch.bfloat16) - self.truth).abs().max()
        self.systems: dict[str, Attention | str] = {}

    def system(self, name: str) -> Attention:
        """The system, once it has proved right; skips where it does not serve the case."""
        if name not in self.systems:
            self.systems[name] = self._checked(name)
        found = self.systems[name]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    def _checked(self, name: str) -> Attention | str:
        try:
            attention = system(name, self.case)
            if attention is None:
                return "does not serve the case"
            o = attention(*self.leaves)
            gradients = torch.autograd.grad(o, self.leaves, self.do)
        except Exception as failure:  # a peer's own
            return f"failed: {type(failure).__name__}: {failure}"[:200]
        error = (o[:, -CHECKED_QUERIES:].double() - self.truth).abs().max()
        if not error <= self.tolerance + 1e-2:
            return f"wrong by {error:.3g}"
        for ours, theirs in zip(self.gradients, gradients, strict=True):
            if not (ours - theirs).float().norm() <= 0.02 * ours.float().norm():
                return "its gradients are not ours"
        return attention

    def _of_last_queries(self, dtype: torch.dtype) -> Tensor:
        tensors = [x.detach().to(dtype) for x in self.leaves]
        q, k, v = tensors if isinstance(self.case, AttentionCase) else join(*tensors)
        q = q[:, -CHECKED_QUERIES:]
        o = kernels.attention(q, k, v, window_size=self.case.window_size, impl="eager")
        return o.double()


@cache
def setting(case: Case) -> Setting:
    return Setting(case)


@pytest.mark.parametrize(("case", "direction", "turn", "name"), TIMINGS)
@pytest.mark.benchmark(timer=clock, disable_gc=True)
def test_attention(benchmark: Any, case: Case, direction: str, turn: int, name: str) -> None:
    here = setting(case)
    attend = partial(here.system(name), *here.leaves)
    work = flops(case, direction) / 1e12
    about = {"case": case.name, "system": name, "unit": "TFLOP/s", "work": work}
    time_training(benchmark, attend, here.leaves, here.do, direction, about, ROUNDS)
