"""What MGA keeps of the published forms, and how these fail; the README points here."""

from pathlib import Path

import torch
from cases import GeneticCase
from test_attention import random
from test_genetic import seen

import kernels


def test_unscaled_selection_by_the_closed_form_is_the_published_first_form():
    """Weights f_ij / sum_k f_ik with f_ij = <gamma_i, p_j>, against loops over its definition."""
    tokens, window = 40, 7
    g, v = random(1, tokens, 2, 8), random(1, tokens, 2, 5)
    gamma = kernels.gene_fitness(g, window_size=window, environment="none", impl="triton")
    case = GeneticCase("", tokens=tokens, window_size=window)
    f = torch.einsum("bihd,bjhd->bhij", gamma, g.sigmoid()) * seen(case)
    o = torch.einsum("bhij,bjhd->bihd", f / f.sum(-1, keepdim=True), v)
    for head in range(2):
        genes, values = g[0, :, head].double().sigmoid(), v[0, :, head].double()
        for i in range(tokens):
            window_of_i = range(max(0, i - window + 1), i + 1)
            rarity = [1 / (sum(genes[j, d] for j in window_of_i) / len(window_of_i) + 0.5)
                      for d in range(8)]  # fmt: skip
            organisms = {
                j: sum(rarity[d] / sum(rarity) * genes[j, d] for d in range(8)) for j in window_of_i
            }
            selected = sum(organisms[j] / sum(organisms.values()) * values[j] for j in window_of_i)
            torch.testing.assert_close(o[0, i, head].double(), selected, atol=1e-6, rtol=1e-6)


def test_the_example_of_the_readme():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.6, 0.8]], dtype=torch.float64)
    g, identity = torch.logit(p)[None, :, None], torch.eye(4, dtype=torch.float64)[None, :, None]
    e = torch.logit(torch.tensor([0.9, 0.1], dtype=torch.float64)).expand_as(g)
    pressure = torch.full((1,), 4.0, dtype=torch.float64)
    fitness, taken = [], []
    for environment, logits in (("none", None), ("query", e)):
        options = {"window_size": 4, "environment": environment, "impl": "eager"}
        fitness.append(kernels.gene_fitness(g, logits, **options)[0, -1, 0])
        o = kernels.genetic_attention(g, logits, identity, pressure, **options)
        taken.append(o[0, -1, 0])
    genes = torch.cat((p.T, p.mean(0)[:, None], torch.stack(fitness, 1)), 1)
    for name, row in (
        ("gene 1", genes[0]),
        ("gene 2", genes[1]),
        ("taken, eps = 1 ", taken[0]),
        ("taken, eps = (.9, .1)", taken[1]),
    ):
        written = next(line for line in readme.splitlines() if line.startswith(name))
        numbers = [float(x) for x in written.removeprefix(name).split() if x.startswith(".")]
        assert len(numbers) == len(row) and numbers == [round(float(x), 2) for x in row]


def organisms_of(p):
    """Organism fitness [T] under one gene fitness for the whole sequence, p [T, D]."""
    rarity = 1 / (p.mean(0) + 0.5)
    return p @ (rarity / rarity.sum())


def test_a_fitness_normalised_over_the_sequence_reads_the_future():
    p, v = torch.rand(16, 8, dtype=torch.float64), torch.rand(16, 8, dtype=torch.float64)

    def first_row(p):
        fitness = organisms_of(p)
        return (fitness / fitness.sum() * torch.eye(16)[0].double()) @ v

    changed = p.clone()
    changed[-1] = 1 - p[-1]
    assert (first_row(changed) - first_row(p)).abs().max() > 1e-4 * first_row(p).abs().max()


def test_a_softmax_over_shares_of_fitness_is_a_plain_average():
    """Values in [0, 1/T] differ too little; under selection pressure the same organisms do not."""
    tokens = 64
    g = torch.randn(tokens, 16, dtype=torch.float64)
    share = organisms_of(g.sigmoid()) / tokens
    assert share.min() >= 0 and share.max() <= 1 / tokens
    weights = share.softmax(0)
    assert (tokens * weights - 1).abs().max() <= 1 / tokens

    identity = torch.eye(tokens, dtype=torch.float64)[None, :, None]
    options = {"window_size": tokens, "environment": "none", "impl": "eager"}
    pressure = torch.full((1,), 4.0, dtype=torch.float64)
    ours = kernels.genetic_attention(g[None, :, None], None, identity, pressure, **options)
    assert (tokens * ours[0, -1] - 1).abs().max() > 0.5


def test_a_constant_inside_the_softmax_changes_nothing():
    scores, of_query = torch.randn(16, 16).double(), 5 * torch.randn(16, 1).double()
    torch.testing.assert_close((scores + of_query).softmax(-1), scores.softmax(-1))
