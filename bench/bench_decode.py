"""Decoding at the memory's speed.

Run with `python -m pytest -n 0 bench/bench_decode.py --benchmark-json=FILE`.

One token per sequence against a full cache, in GB/s of the rows that ours must read. "copy" is
the same bytes copied, whose rate is the measured bandwidth. SDPA reads the cache of the same
sequences as it would have to keep it: for MLA, keys and values expanded for every head, and its
figure, over the latent's bytes too, compares times.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.costs import cache_bytes
from bench.timing import WARM_UP, clock, flush_l2
from tests.cases import DecodeCase

GPU = torch.cuda.is_available()
DEVICE, TURNS, ROUNDS = ("cuda", 2, 10) if GPU else ("cpu", 1, 2)
HEAD = 64  # width of MLA's expanded keys and values


def _cases() -> list[DecodeCase]:
    kinds = {
        "gqa-9-3": {"q_heads": 9, "k_heads": 3, "width": 64},
        "mla-9-288+32": {"q_heads": 9, "width": 288, "rope": 32, "latent": True},
    }
    sizes = [(batch, rows) for batch in (1, 8, 64, 128) for rows in (1024, 4096, 16_384, 65_536)]
    return [
        DecodeCase(f"{name}-{batch}-{rows}", (rows,) * batch, rows, **kind)  # type: ignore[arg-type]
        for name, kind in kinds.items()
        for batch, rows in (sizes if GPU else [(2, 40)])
    ]


TIMINGS = [
    pytest.param(case, name, id=f"{case.name}-{turn}-{name}")
    for case in _cases()
    for turn in range(TURNS)
    for name in ("ours", "sdpa", "copy")
]


@cache
def systems(case: DecodeCase) -> dict[str, Callable[[], Tensor]]:
    """What to time; ours has proved right on the first and last sequence."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    inputs: dict[str, Any] = case.inputs(dtype, DEVICE)
    options: dict[str, Any] = case.arguments
    op: Callable[..., Tensor] = kernels.latent_decode if case.latent else kernels.attention_decode

    def ours() -> Tensor:
        return op(**inputs, **options, impl="triton")

    twin, truth = (
        op(**_ends(inputs, kind), **options, impl="eager") for kind in (dtype, torch.float64)
    )
    error, tolerance = (x.double().sub(truth).abs().max() for x in (ours()[[0, -1]], twin))
    if not error <= 2 * tolerance + 1e-2:
        pytest.fail(f"ours is wrong by {float(error):.3g}")

    batch, rows, heads = len(case.lengths), case.rows, case.q_heads
    if case.latent:
        widths = HEAD + case.rope, HEAD
        q = torch.randn(batch, heads, 1, widths[0], device=DEVICE, dtype=dtype)
        k, v = (torch.randn(batch, rows, heads, d, device=DEVICE, dtype=dtype) for d in widths)
    else:
        q, k, v = (inputs[name] for name in ("q", "k_cache", "v_cache"))
        q = q[:, :, None]

    def sdpa() -> Tensor:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=not case.latent)

    source = torch.empty(cache_bytes(case), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return {"ours": ours, "sdpa": sdpa, "copy": lambda: target.copy_(source)}


def _ends(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs of the first and the last sequence, in a type."""
    ends = {name: None if x is None else x[[0, -1]] for name, x in inputs.items()}
    return {
        name: x.to(dtype) if x is not None and x.is_floating_point() else x
        for name, x in ends.items()
    }


@pytest.mark.parametrize(("case", "name"), TIMINGS)
@pytest.mark.benchmark(timer=clock, disable_gc=True)
def test_decode(benchmark: Any, case: DecodeCase, name: str) -> None:
    call = systems(case)[name]
    moved = cache_bytes(case) * (2 if name == "copy" else 1)  # a copy reads and writes
    benchmark.group = case.name
    benchmark.extra_info.update(
        case=case.name, direction="decode", system=name, unit="GB/s", work=moved / 1e9
    )
    benchmark.pedantic(call, setup=flush_l2, rounds=ROUNDS, warmup_rounds=WARM_UP)
