"""MGA against plain attention, FlexAttention and its own oracle.

Run with `python -m pytest -n 0 bench/bench_genetic.py --benchmark-json=FILE`.

"ours" and "eager" go from g, e and v to o. "attention", ours too, and "flex" start from the q and
k that MGA forms: what "ours" takes longer than "attention" is the price of fitness. Every system's
o is checked against fp64 and its dv against ours before it is timed. Fitness alone is timed in
GB/s of its inputs and outputs, beside a copy that moves as many bytes.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from bench.costs import fitness_bytes, flops
from bench.systems import SYSTEMS
from bench.timing import WARM_UP, clock, flush_l2, time_training
from kernels.core.problem import Genes
from tests.cases import GeneticCase

GPU = torch.cuda.is_available()
DEVICE, TURNS, ROUNDS = ("cuda", 3, 10) if GPU else ("cpu", 1, 2)
CHECKED_QUERIES = 128
EAGER_TOKENS = 4096  # beyond, T x T does not fit
CORES = {"attention": "ours", "flex": "flex"}  # systems over q and k


def _cases() -> list[GeneticCase]:
    if not GPU:
        return [GeneticCase("tiny-mga", tokens=48, width=16)]
    return [
        GeneticCase(f"mga-{w}-{t}", 32768 // t, t, heads=9, window_size=w)
        for w in (256, 1024)
        for t in (2048, 4096, 8192, 16384)
    ]


def _timings(*names: str) -> list[Any]:
    """In the order in which they run: the systems of a case side by side."""
    return [
        pytest.param(case, direction, name, id=f"{case.name}-{direction}-{turn}-{name}")
        for case in _cases()
        for direction in ("forward", "backward")
        for turn in range(TURNS)
        for name in names
        if (name != "flex" or GPU) and (name != "eager" or case.tokens <= EAGER_TOKENS)
    ]


class Setting:
    """The tensors of a case, and its truth."""

    def __init__(self, case: GeneticCase) -> None:
        torch.manual_seed(0)
        self.case, self.rope = case, case.rope(DEVICE)
        inputs = case.inputs(torch.bfloat16, DEVICE).values()
        self.genes = [x.requires_grad_() for x in inputs if x is not None]  # g, e, v, pressure
        self.fit = [x.requires_grad_() for x in (*self.fitness(), self.genes[2].detach())]
        self.do = torch.randn_like(self.genes[2])
        self.truth = self._of_last_queries(torch.float64)
        twin = self._of_last_queries(torch.bfloat16)
        self.tolerance = 2 * (twin - self.truth).abs().max() + 1e-2

    def fitness(self) -> tuple[Tensor, Tensor]:
        """q and k."""
        q, k = torch.ops.smollm_attention.fitness(*self._given())
        return q, k

    def fitness_backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """dg, de and dpressure, had q and k themselves for gradients."""
        given = self._given()
        q, k, _ = (x.detach() for x in self.fit)
        excess = torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=DEVICE)
        op = torch.ops.smollm_attention.fitness_backward
        dg, de, dpressure = op(*given, q, k, excess)
        return dg, de, dpressure

    def _given(self) -> Genes:
        g, e, _, pressure = (x.detach() for x in self.genes)
        cos, sin = self.rope or (None, None)
        return Genes(g, e, pressure, cos, sin, None, self.case.window_size, self.case.environment)

    def system(self, name: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """A function of no arguments, and what it is differentiated by."""
        if name not in CORES:
            impl = "triton" if name == "ours" else "eager"
            return partial(self._attend, self.genes, self.rope, impl), self.genes
        attention = SYSTEMS[CORES[name]](self.case.selection)
        assert attention is not None
        return partial(attention, *self.fit), self.fit

    def _attend(self, genes: list[Tensor], rope: Any, impl: Any) -> Tensor:
        return kernels.genetic_attention(*genes, rope=rope, **self.case.arguments, impl=impl)

    def _of_last_queries(self, dtype: torch.dtype) -> Tensor:
        met = CHECKED_QUERIES + self.case.window_size
        *genes, pressure = self.genes
        ends = [x.detach()[:, -met:].to(dtype) for x in genes]
        rope = None if self.rope is None else tuple(x[-met:] for x in self.rope)
        o = self._attend([*ends, pressure.detach()], rope, "eager")
        return o[:, -CHECKED_QUERIES:].double()


@cache
def setting(case: GeneticCase) -> Setting:
    return Setting(case)


@cache
def checked_system(case: GeneticCase, name: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A system of a case that has proved right, its dv beside that of ours."""
    here = setting(case)
    attend, leaves = here.system(name)
    o = attend()
    error = (o[:, -CHECKED_QUERIES:].double() - here.truth).abs().max()
    if not error <= here.tolerance:
        pytest.fail(f"{name} is wrong by {float(error):.3g}")
    ours = torch.autograd.grad(here.system("ours")[0](), here.genes[2], here.do)[0].float()
    theirs = torch.autograd.grad(o, leaves[2], here.do)[0].float()
    if not (ours - theirs).norm() <= 0.02 * ours.norm():
        pytest.fail(f"the dv of {name} is not ours")
    return attend, leaves


@pytest.mark.parametrize(
    ("case", "direction", "name"), _timings("ours", "attention", "flex", "eager")
)
@pytest.mark.benchmark(timer=clock, disable_gc=True)
def test_selection(benchmark: Any, case: GeneticCase, direction: str, name: str) -> None:
    attend, leaves = checked_system(case, name)
    work = flops(case, direction) / 1e12
    about = {"case": case.name, "system": name, "unit": "TFLOP/s", "work": work}
    time_training(benchmark, attend, leaves, setting(case).do, direction, about, ROUNDS)


@pytest.mark.parametrize(("case", "direction", "name"), _timings("ours", "copy"))
@pytest.mark.benchmark(timer=clock, disable_gc=True)
def test_fitness(benchmark: Any, case: GeneticCase, direction: str, name: str) -> None:
    here, moved = setting(case), fitness_bytes(case, direction)
    if name == "copy":
        source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)  # read, then written
        call: Callable[[], Any] = partial(torch.empty_like(source).copy_, source)
    else:
        call = here.fitness if direction == "forward" else here.fitness_backward
    benchmark.group = f"{case.name} fitness {direction}"
    benchmark.extra_info.update(
        case=f"{case.name} fitness", direction=direction, system=name, unit="GB/s", work=moved / 1e9
    )
    benchmark.pedantic(call, setup=flush_l2, rounds=ROUNDS, warmup_rounds=WARM_UP)
