"""What the ops cost the host before a GPU has anything to do, measured with no GPU at hand.

`python -m bench.bench_host [--rounds 300]` calls them on CPU tensors in place of CUDA ones, through
Triton's own launcher onto a driver whose launches do nothing, and prints the least microseconds of
processor time of a call over many rounds, in which all cases take turns, and its ratio to a bare
launch of a kernel with five arguments.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import kernels
from kernels import checks

ARCH = 90
CALLS = 10  # of a round
BATCH, TOKENS, HEADS, KEY_HEADS, WIDTH = 2, 64, 9, 3, 64  # few, for CPU tensors are computed with
BARE = "launch of five arguments"
BARE_BLOCK = 128
Case = Callable[[], object]


@triton.jit  # type: ignore[untyped-decorator]
def bare_kernel(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, scale * tl.load(x_ptr + at, mask=at < n), mask=at < n)


class _Launcher:
    """Takes the arguments of a launch, and does nothing."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Driver:
    """Stands in for the CUDA driver."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        load_binary=lambda *binary: (0, 0, 0, 0, 1024),
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def _tensor(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _training(name: str, op: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Case]:
    """An op of these tensors without gradients, and forward and backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    do = torch.zeros_like(op(*inputs))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*leaves), leaves, do)

    return {f"{name} forward": lambda: op(*inputs), f"{name} forward + backward": both}


def cases() -> dict[str, Case]:
    """Every timed call by name; each compiles its kernels when it is first made."""
    q, k = _tensor(BATCH, TOKENS, HEADS, WIDTH), _tensor(BATCH, TOKENS, KEY_HEADS, WIDTH)
    rope, shared_rope = _tensor(BATCH, TOKENS, HEADS, WIDTH // 2), k[:, :, 0, : WIDTH // 2]
    pressure, y = torch.ones(HEADS), torch.zeros_like(q)
    tables = torch.ones(TOKENS, WIDTH // 2), torch.zeros(TOKENS, WIDTH // 2)
    lengths = torch.full((BATCH,), TOKENS, dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, impl="triton")

    def attend_latent(*inputs: Tensor) -> Tensor:
        return kernels.latent_attention(*inputs, impl="triton")

    def select(g: Tensor, e: Tensor, v: Tensor, pressure: Tensor) -> Tensor:
        return kernels.genetic_attention(
            g, e, v, pressure, window_size=16, rope=tables, impl="triton"
        )

    def decode() -> Tensor:
        return kernels.attention_decode(q[:, 0], k, k, lengths, impl="triton")

    def decode_latent() -> Tensor:
        return kernels.latent_decode(
            q[:, 0], rope[:, 0], k[:, :, 0], shared_rope, lengths, scale=0.1, impl="triton"
        )

    def decode_genes() -> Tensor:
        g = q[:, -1:]
        cos, sin = (table[:1].expand(BATCH, 1, -1) for table in tables)
        return kernels.genetic_decode(
            g, g, pressure, q, q, k, lengths, window_size=16, rope=(cos, sin), impl="triton"
        )

    def launch() -> None:
        bare_kernel[(1,)](q, y, q.numel(), 2.0, BARE_BLOCK)

    return {
        BARE: launch,
        **_training("attention", attend, q, k, k),
        **_training("latent_attention", attend_latent, q, rope, q, shared_rope, q),
        **_training("genetic_attention", select, q, q, k, pressure),
        "attention_decode": decode,
        "latent_decode": decode_latent,
        "genetic_decode": decode_genes,
    }


def microseconds(timed: dict[str, Case], rounds: int) -> dict[str, float]:
    """The least microseconds of a call by name, of its thread, over rounds of `CALLS` of each."""
    least = dict.fromkeys(timed, float("inf"))
    for call in timed.values():
        call()
    gc.disable()
    for _ in range(rounds):
        for name, call in timed.items():
            call()  # what it needs the cases before it have pushed out of the processor's caches
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.thread_time() - start) / CALLS * 1e6)
    gc.enable()
    return least


def report(least: dict[str, float]) -> str:
    """The times as a table, and their ratios to the bare launch."""
    lines = [f"{'':40}{'us':>8}{'launches':>10}"]
    lines += [f"{name:40}{us:8.1f}{us / least[BARE]:10.1f}" for name, us in least.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("expected Triton's launcher, got TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sums of what no kernel has written must not take longer
    driver.set_active(_Driver())
    with mock.patch.object(checks, "_interpreting", lambda: True):  # lets CPU tensors pass
        least = microseconds(cases(), arguments.rounds)
    print(f"torch {torch.__version__}, triton {triton.__version__}, driver stubbed")
    print(report(least))
    return 0


if __name__ == "__main__":
    sys.exit(main())
