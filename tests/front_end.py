"""Print the variants of kernels that Triton's compiler refuses, among all that the cases launch.

The interpreter runs Python, and takes what the compiler does not: names without a value, `None` in
a tuple. A variant is a kernel with some arguments absent and some switches on; each goes through
the front end alone, which has all that can be wrong with the language, in a process of its own
where kernels are compiled.
"""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from cases import ATTENTION_CASES, DECODE_CASES, GENETIC_CASES, GENETIC_DECODE_CASES, LATENT_CASES
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import kernels
from bench import compiled
from kernels import checks
from kernels.core import decode, tiles

ARCH = 90


class FrontEndPassed(BaseException):
    """Ends a compilation behind the front end, which takes exceptions for errors of the kernel."""


@contextlib.contextmanager
def checking() -> Iterator[dict[tuple, str | None]]:
    """Launches inside run nothing and leave what is wrong with each new variant, or None."""
    found: dict[tuple, str | None] = {}
    run, make_ir = JITFunction.run, ASTSource.make_ir

    def stop_behind(*args, **kwargs):
        make_ir(*args, **kwargs)
        raise FrontEndPassed

    def check(self, *args, grid, warmup, **kwargs):
        given = zip(self.arg_names, args, strict=True)
        variant = self.__name__, *(
            (name, x) for name, x in given
            if x is None or isinstance(x, bool) or name.endswith("PARTS")
        )  # fmt: skip
        if "D_SECOND" in self.arg_names:
            variant += (args[self.arg_names.index("D_SECOND")] == 0,)
        if variant in found:
            return
        try:
            run(self, *args, grid=grid, warmup=True, **kwargs)
        except FrontEndPassed:
            found[variant] = None
        except triton.CompilationError as error:
            while error.__cause__:
                error = error.__cause__
            found[variant] = str(error)

    with (
        triton.knobs.compilation.scope(),
        mock.patch.object(driver, "_active", compiled.Target(ARCH)),
        mock.patch.object(JITFunction, "run", check),
        mock.patch.object(ASTSource, "make_ir", stop_behind),
        mock.patch.object(checks, "_interpreting", lambda: True),  # takes tensors of a CPU
        mock.patch.object(tiles, "architecture", lambda device: ARCH),
        mock.patch.object(decode, "multiprocessors", lambda device: 132),
    ):
        triton.knobs.compilation.always_compile = True
        yield found


def call(op, inputs, **arguments):
    """Launch the kernels of an op, and of its backward where it has one."""
    leaves = [x for x in inputs.values() if x is not None and x.is_floating_point()]
    with torch.set_grad_enabled(op in DIFFERENTIABLE):
        for x in leaves:
            x.requires_grad_(op in DIFFERENTIABLE)
        outputs = op(**inputs, **arguments, impl="triton")
    if op in DIFFERENTIABLE:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])


DIFFERENTIABLE = (
    kernels.attention, kernels.latent_attention, kernels.genetic_attention, kernels.gene_fitness,
)  # fmt: skip


def call_all(dtype: torch.dtype) -> None:
    """Every op at every case."""
    for case in ATTENTION_CASES:
        for return_lse in (False, True):
            call(kernels.attention, case.inputs(dtype), **case.arguments, return_lse=return_lse)
    for case in LATENT_CASES:
        call(kernels.latent_attention, case.inputs(dtype), **case.arguments)
    for case in DECODE_CASES:
        op = kernels.latent_decode if case.latent else kernels.attention_decode
        call(op, case.inputs(dtype), **case.arguments)
    for case in GENETIC_CASES:
        inputs = case.inputs(dtype)
        call(kernels.genetic_attention, inputs, **case.arguments, rope=case.rope())
        del inputs["v"], inputs["selection_pressure"]
        call(kernels.gene_fitness, inputs, **case.arguments)
    for case in GENETIC_DECODE_CASES:
        call(kernels.genetic_decode, case.inputs(dtype), **case.arguments, rope=case.tables())


if __name__ == "__main__":
    with checking() as found:
        call_all(torch.bfloat16)
    for (kernel, *switches), error in found.items():
        if error:
            print(kernel, *switches, error, "", sep="\n")
    print(*sorted({kernel for kernel, *_ in found}))
