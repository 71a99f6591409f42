"""What falls with distance is measured as what it was made to be."""

import pytest
import torch
from torch import nn

from bench.studies.mga import distance
from smollm.model.build import build_model
from smollm.model.config import ModelConfig

TOKENS = 80


def build(mechanism, **flags):
    shape = {"embed_dim": 24, "num_layers": 2, "num_heads": 2, "ffn_hidden_dim": 16}
    return build_model(mechanism, ModelConfig.of(**shape, **flags), 50)


def test_alibi_alone_falls_by_its_slopes():
    """Without queries a score is its bias alone, 1/16 and 1/256 a token for two heads."""
    model = build("mha", decay="alibi")
    for block in model.layers:
        nn.init.zeros_(block.attention.q_proj.weight)
    found = distance.falls(model, torch.randint(50, (2, TOKENS)))
    slope = (1 / 16 + 1 / 256) / 2
    torch.testing.assert_close(found, -slope * torch.tensor(distance.DISTANCES).double())


def test_scores_are_those_before_the_softmax():
    model = build("gqa", num_kv_heads=1)
    ids = torch.randint(50, (1, TOKENS))
    found, means = distance.falls(model, ids), []

    def scores(module, _inputs, out):
        x = kept.pop()
        q, k = (f(x).unflatten(-1, (-1, 12)) for f in (module.q_proj, module.k_proj))
        rope = distance.grouped.rotate, tables.pop()
        q, k = (rope[0](y, *rope[1]) for y in (q, k))
        s = torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]).double() / 12**0.5
        means.append(torch.stack([s.diagonal(-d, 2, 3).mean() for d in distance.DISTANCES]))

    kept, tables = [], []
    for block in model.layers:
        attention, heads = block.attention, block.attention.heads

        def keep(x, rope, *rest, heads=heads):
            kept.append(x)
            tables.append(rope)
            return heads(x, rope, *rest)

        attention.heads = keep
        attention.register_forward_hook(scores)
    with torch.no_grad():
        model(ids)
    expected = torch.stack(means).mean(dim=0)
    torch.testing.assert_close(found, expected - expected[0], atol=1e-5, rtol=1e-4)


def test_models_that_call_no_attention_are_refused():
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    distance.falls(build("mga", genetic_window_size=16, gene_fitness=False), ids)
    for model in (build("mga", genetic_window_size=16), build("mla", latent_dim=8, rope_dim=4)):
        with pytest.raises(ValueError, match="expected 2 layers that call attention"):
            distance.falls(model, ids)
    with pytest.raises(ValueError, match="over 63 tokens"):
        distance.falls(model, ids[:, :63])


def test_a_figure_is_drawn(tmp_path):
    falls = torch.linspace(0, -3, len(distance.DISTANCES))
    distance.draw({"mha": (falls, falls)}, tmp_path / "distance.png")
    assert (tmp_path / "distance.png").stat().st_size > 1000
