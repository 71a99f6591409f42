"""MGA as compilers see it: its operators checked, its graphs whole."""

import pytest
import torch
from cases import GeneticCase
from test_attention import DEVICE, EACH_COMPILED, _outputs_start_as_nan  # noqa: F401 (autouse)
from test_genetic import leaves_of

import kernels


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["query", "none"])  # with e, and without
def test_opcheck(environment):
    case = GeneticCase("", tokens=20, heads=1, width=16, environment=environment, lengths=(7, 13))
    g, e, _, pressure, cu_seqlens = case.inputs(torch.float32, DEVICE).values()
    ops, arguments = torch.ops.smollm_attention, (cu_seqlens, case.window_size, environment)
    excess = torch.rand(1, case.heads, case.tokens, device=DEVICE)
    for of_selection in ((pressure, *case.rope(DEVICE)), (None, None, None)):
        genes = g, e, *of_selection, *arguments
        torch.library.opcheck(ops.fitness.default, genes)
        q, k = (torch.randn_like(x) for x in ops.fitness(*genes))
        upstream = (q, k, excess) if of_selection[0] is not None else (q, None, None)
        torch.library.opcheck(ops.fitness_backward.default, (*genes, *upstream))
    genes, v = (g, e, pressure, *case.rope(DEVICE), *arguments), torch.randn_like(g)
    torch.library.opcheck(ops.select.default, (*genes, v, True))
    o, lse_log2, rest = ops.select(*genes, v, True)
    upstream = torch.rand_like(o)
    torch.library.opcheck(ops.select_backward.default, (*genes, v, o, lse_log2, rest, upstream))


@pytest.mark.slow
@EACH_COMPILED
def test_compiles_as_one_graph(dynamic, impl):
    torch.compiler.reset()
    options = {"window_size": 7, "impl": impl}

    def outputs(g, e, v, selection_pressure, cos, sin):
        o = kernels.genetic_attention(g, e, v, selection_pressure, rope=(cos, sin), **options)
        if dynamic:
            gamma = kernels.gene_fitness(g, environment="kin", **options)
        else:
            gamma = kernels.gene_fitness(g, e, **options)
        return o.square(), gamma.square()

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (20, 33):
        case = GeneticCase("", tokens=tokens, heads=2, v_heads=1, width=16)
        leaves = list(leaves_of(case.inputs(torch.float32, DEVICE)).values())
        results = []
        for call in (compiled, outputs):
            out = call(*leaves, *case.rope(DEVICE))
            results.append((*out, *torch.autograd.grad(sum(x.sum() for x in out), leaves)))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
