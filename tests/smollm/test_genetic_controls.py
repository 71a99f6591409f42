"""MGA without a part of itself: the window's fitness of genes, or pressures that learn."""

import math

import pytest
import torch
from test_modules import WIDTH

from kernels import rotate
from kernels.reference import visible
from smollm import MultiHeadGeneticAttention
from smollm.attention import genetic
from smollm.attention.layers import split_heads
from smollm.attention.rope import token_positions
from smollm.model.build import build_model
from smollm.model.checkpoint import load_model, save_model
from smollm.model.config import ModelConfig
from smollm.training.config import TrainConfig
from smollm.training.optim import Optimizers

each_environment = pytest.mark.parametrize("environment", ["query", "kin", "none"])


def control(window_size=3, num_value_heads=2, **options):
    module = MultiHeadGeneticAttention(
        WIDTH, 6, window_size, num_value_heads, gene_fitness=False, **options
    )
    with torch.no_grad():  # so that heads differ
        module.log_selection_pressure += torch.linspace(-0.5, 0.5, 6)
    return module.double()


def genes_and_fitness(module, x):
    """p and gamma, by their formulas; gamma of each token is of that token alone."""
    p = torch.sigmoid(split_heads(module.w_g(x), 6))
    eps = {"kin": p, "none": torch.ones_like(p)}.get(module.environment)
    if eps is None:
        eps = torch.sigmoid(split_heads(module.w_e(x), 6))
    return p, eps / eps.sum(dim=-1, keepdim=True)


def dense(module, x):
    """The module's output, all scores at once."""
    p, gamma = genes_and_fitness(module, x)
    positions = token_positions(x.shape[1])
    if module.rotation.width:
        tables = module.rotation.tables(positions)
        p, gamma = rotate(p, *tables), rotate(gamma, *tables)
    scores = torch.einsum("bihd,bjhd->bhij", gamma, p) * module.head_dim**0.5
    scores = scores * module.log_selection_pressure.exp()[:, None, None]
    seen = visible(positions, positions, window_size=module.window_size)
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    v = split_heads(module.w_v(x), module.num_value_heads)
    v = v.repeat_interleave(6 // module.num_value_heads, dim=2)
    return module.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))


@pytest.mark.parametrize("rotary", [True, False])
@each_environment
def test_without_fitness_the_environment_alone_weighs_genes(environment, rotary):
    module = control(environment=environment, rotary=rotary)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    outs = [network(x) for network in (module, lambda x: dense(module, x))]
    torch.testing.assert_close(*outs)
    found, expected = (
        torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs
    )
    torch.testing.assert_close(found, expected)


@each_environment
def test_without_fitness_nothing_out_of_sight_changes_a_bit(environment):
    module = control(environment=environment)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    other = x.clone()
    other[:, :3], other[:, 6:] = 1e4, -1e4
    assert torch.equal(module(x)[:, 5], module(other)[:, 5])  # it sees 3, 4 and 5
    assert not torch.allclose(module(x)[:, 4], module(other)[:, 4])


@each_environment
def test_without_fitness_a_window_of_one_takes_its_own_value(environment):
    module = control(window_size=1, num_value_heads=6, environment=environment)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(module(x), module.out_proj(module.w_v(x)))


def test_without_fitness_environment_and_rotation_scores_are_sums_of_genes():
    """So all tokens ask the same: outputs are running means, weighed by each key's own sum."""
    module = control(window_size=9, num_value_heads=6, environment="none", rotary=False)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    genes = torch.sigmoid(split_heads(module.w_g(x), 6)).sum(dim=-1, keepdim=True)
    kappa = module.log_selection_pressure.exp()[:, None]
    weights = (kappa / module.head_dim**0.5 * genes).exp()
    v = split_heads(module.w_v(x), 6)
    o = (weights * v).cumsum(dim=1) / weights.cumsum(dim=1)
    torch.testing.assert_close(module(x), module.out_proj(o.flatten(-2)))


@each_environment
def test_without_fitness_queries_are_rounded_once(environment, monkeypatch):
    taken = []
    monkeypatch.setattr(genetic, "attention", lambda q, k, v, **_: taken.append(q) or v)
    module = control(num_value_heads=6, environment=environment).to(torch.bfloat16)
    x = torch.randn(1, 9, WIDTH, dtype=torch.bfloat16)
    module(x)
    logits = split_heads((module.w_e if environment == "query" else module.w_g)(x), 6).float()
    eps = torch.ones_like(logits) if environment == "none" else torch.sigmoid(logits)
    kappa = module.log_selection_pressure.exp().float()[:, None]
    q = eps / eps.sum(dim=-1, keepdim=True) * kappa * module.head_dim**0.5
    q = rotate(q, *module.rotation.tables(token_positions(9)))
    assert taken[0].dtype == torch.bfloat16
    error = (taken[0].float() - q).abs()
    assert (error <= 2**-8 * q.abs() + 1e-6).all()  # half a bfloat16's last place


SHAPE = {
    "embed_dim": 24, "num_heads": 6, "num_layers": 2, "ffn_hidden_dim": 20, "max_seq_len": 64,
    "genetic_window_size": 5,
}  # fmt: skip


def test_the_controls_are_flags():
    model = build_model("mga", ModelConfig.of(**SHAPE), 31)
    config = ModelConfig.of(**SHAPE, gene_fitness=False, learn_pressure=False)
    other = build_model("mga", config, 31)
    assert all(a.gene_fitness and a.log_selection_pressure.requires_grad for a in model.attentions)
    for attention in other.attentions:
        assert not attention.gene_fitness and not attention.log_selection_pressure.requires_grad
    assert other.count_parameters() == model.count_parameters() - 2 * 6
    assert sum(other.parameters_by_part().values()) == other.count_parameters()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_pressure_that_does_not_learn_keeps_its_start(optimizer):
    config = ModelConfig.of(**SHAPE, learn_pressure=False, selection_pressure=2.5)
    model = build_model("mga", config, 31)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = Optimizers(model, TrainConfig(optimizer=optimizer))
    ids = torch.randint(31, (2, 9))
    model(ids, labels=ids)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizers.step(1e-2)
    kept = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert kept == [f"layers.{i}.attention.log_selection_pressure" for i in range(2)]
    assert all(before[name].eq(math.log(2.5)).all() for name in kept)
    parts = [p for group in optimizers.param_groups for p in group["params"]]
    assert len(parts) == len(before) - 2


@pytest.mark.parametrize("learns", [True, False])
def test_weights_load_whether_pressures_learn_or_not(learns, tmp_path):
    config = ModelConfig.of(**SHAPE, learn_pressure=learns)
    model = build_model("mga", config, 31)
    with torch.no_grad():
        model.attentions[1].log_selection_pressure.fill_(0.3)
    other = build_model("mga", ModelConfig.of(**SHAPE, learn_pressure=not learns), 31)
    other.load_state_dict(model.state_dict())
    save_model(tmp_path / "x.pt", model, "mga", config)
    for loaded, does in ((other, not learns), (load_model(tmp_path / "x.pt"), learns)):
        pressure = loaded.attentions[1].log_selection_pressure
        assert pressure.requires_grad is does and pressure.eq(0.3).all()
