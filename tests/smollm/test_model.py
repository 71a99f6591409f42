"""The whole model: parameters, causality, labels, padding, packing, norms."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from test_modules import MODULES, WIDTH, every_module
from torch import nn

from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
    create_smollm_with_attention,
)
from smollm.attention import Rotation
from smollm.model.model import visible_pairs

VOCAB = 31


def build(prototype, **changes):
    shape = {
        "vocab_size": VOCAB,
        "embed_dim": WIDTH,
        "num_layers": len(prototype) if isinstance(prototype, list) else 2,
        "ffn_hidden_dim": 40,
        "max_seq_len": 64,
    }
    return create_smollm_with_attention(prototype, **(shape | changes))


def mixed():
    """A prototype for each of four layers: windows, rotations and rows in the cache differ."""
    return [
        MultiHeadAttention(WIDTH, 6, use_sliding_window=True, window_size=3),
        MultiHeadLatentAttention(WIDTH, 6, 10, 4),
        MultiHeadGeneticAttention(WIDTH, 6, 5),
        GroupedQueryAttention(WIDTH, 6, 2, rotary=False),
    ]


every_model = pytest.mark.parametrize("make", [*MODULES.values(), mixed], ids=[*MODULES, "mixed"])


def test_smollm2_has_its_published_size():
    prototype = GroupedQueryAttention(576, 9, num_kv_heads=3, bias=False, is_causal=True)
    with torch.device("meta"):
        model = create_smollm_with_attention(prototype)
    assert model.count_parameters() == 134_515_008
    parts = model.parameters_by_part()
    assert sum(parts.values()) == 134_515_008
    assert parts["embedding"] == 134_515_008 - 106_203_456
    # 2 per weight; 30 layers of 9 heads score and sum 64 features over (T + 1) / 2 keys.
    expected = 2 * (134_515_008 - parts["norms"]) + 30 * 2 * 2 * 576 * 2049 // 2
    assert model.flops_per_token(2048) == expected


@pytest.mark.parametrize("norm_strategy", ["pre", "post", "sandwich"])
@every_model
def test_no_logit_depends_on_a_later_token(make, norm_strategy):
    model = build(make(), norm_strategy=norm_strategy).double()
    embedded = []
    model.embed_tokens.register_forward_hook(lambda *hook: embedded.append(hook[2]))
    logits = model(torch.randint(VOCAB, (1, 9)))["logits"]
    for t in (0, 3, 7):
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), embedded[0], retain_graph=True)
        assert gradient[0, t + 1 :].eq(0).all()
        assert gradient[0, t].ne(0).any()


def test_the_model_is_causal_whatever_the_prototype_says():
    prototype = MultiHeadAttention(WIDTH, 6, is_causal=False)
    assert all(attention.is_causal for attention in build(prototype).attentions)
    assert not prototype.is_causal


@every_module
def test_each_layer_has_its_own_fresh_copy(make):
    prototype = make()
    untouched = [p.clone() for p in prototype.parameters()]
    model = build(prototype)
    first, second = (list(attention.parameters()) for attention in model.attentions)
    for mine, other, given in zip(first, second, prototype.parameters(), strict=True):
        assert mine is not other and mine is not given
        if mine.ndim > 1:
            assert not torch.equal(mine, other) and not torch.equal(mine, given)
    for before, after in zip(untouched, prototype.parameters(), strict=True):
        assert torch.equal(before, after)


def test_each_layer_may_have_a_prototype_of_its_own():
    prototypes = mixed()
    model = build(prototypes)
    for attention, prototype in zip(model.attentions, prototypes, strict=True):
        assert type(attention) is type(prototype) and attention is not prototype
        assert attention.window_size == prototype.window_size and attention.is_causal
        assert attention.rotation == prototype.rotation
    assert model.new_cache(1, 9).windows == [3, None, 5, None]
    attention = [sum(p.numel() for p in prototype.parameters()) for prototype in prototypes]
    assert model.parameters_by_part()["attention"] == sum(attention)
    # 2 per weight; H (D_QK + D_V) multiply-adds for each visible pair, of 3 + 2 + 1 at first.
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    pairs = 48 * (7 * 3 + 3) + 6 * 12 * 45 + 48 * (5 * 5 + 10) + 48 * 45
    assert model.flops_per_token(9) == 2 * (weights + VOCAB * WIDTH) + 2 * pairs // 9


def test_tables_are_made_once_for_each_rotation(monkeypatch):
    made, tables = [], Rotation.tables
    monkeypatch.setattr(Rotation, "tables", lambda *given: made.append(given[0]) or tables(*given))
    thetas = (10.0, 7.0, 10.0, 7.0)
    model = build([MultiHeadAttention(WIDTH, 6, rope_theta=theta) for theta in thetas])
    logits = model(IDS)["logits"]
    assert [rotation.theta for rotation in made] == [10.0, 7.0]
    model.layers[2].attention.rotation = Rotation(4, 7.0)
    assert not torch.equal(model(IDS)["logits"], logits)


def test_a_model_of_unlike_layers_may_compute_blocks_again():
    model = build(mixed())
    ids = torch.randint(VOCAB, (1, 9))
    gradients = []
    for again in (False, True):
        model.activation_checkpointing = again
        loss = model(ids, labels=ids)["loss"]
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients))


def test_initialisation():
    model = build(MultiHeadAttention(576, 9), embed_dim=576, vocab_size=500, ffn_hidden_dim=700)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert abs(module.weight.std().item() * 24 - 1) < 0.02
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert module.bias.eq(0).all()


@every_model
def test_padding_changes_nothing(make):
    model = build(make()).double()
    ids = torch.randint(VOCAB, (3, 8))
    spans = [(0, 8), (3, 8), (0, 5)]
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    out = model(ids, mask, labels=ids)
    nats = []
    for row, (start, end) in enumerate(spans):
        alone = ids[row : row + 1, start:end]
        logits = model(alone)["logits"]
        torch.testing.assert_close(out["logits"][row, start:end], logits[0])
        nats.append(F.cross_entropy(logits[0, :-1].float(), alone[0, 1:], reduction="none"))
    torch.testing.assert_close(out["loss"], torch.cat(nats).mean())
    again = model(torch.where(mask, ids, 0), mask, labels=torch.where(mask, ids, 0))
    assert torch.equal(again["logits"], out["logits"]) and torch.equal(again["loss"], out["loss"])


@every_model
def test_packed_documents_equal_separate_ones(make):
    model = build(make()).double()
    ids = torch.randint(VOCAB, (1, 9))
    cu_seqlens = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    out = model(ids, labels=ids, cu_seqlens=cu_seqlens)
    nats = []
    for a, b in ((0, 4), (4, 5), (5, 9)):
        logits = model(ids[:, a:b])["logits"]
        torch.testing.assert_close(out["logits"][:, a:b], logits)
        nats.append(F.cross_entropy(logits[0, :-1].float(), ids[0, a + 1 : b], reduction="none"))
    torch.testing.assert_close(out["loss"], torch.cat(nats).mean())


def test_labels_are_shifted_once_and_ignored_at_minus_100():
    model = build(MODULES["gqa"]())
    ids = torch.randint(VOCAB, (2, 7))
    labels = ids.clone()
    labels[0, 3:5] = -100
    out = model(ids, labels=labels)
    log_probability = out["logits"].float().log_softmax(-1)
    nats = [
        -log_probability[b, t, ids[b, t + 1]]
        for b in range(2)
        for t in range(6)
        if labels[b, t + 1] != -100
    ]
    torch.testing.assert_close(out["loss"], torch.stack(nats).mean())
    assert model(ids)["loss"] is None
    assert model(ids, labels=torch.full_like(ids, -100))["loss"] == 0


def test_where_the_norms_stand():
    used = {"pre": ["pre"], "post": ["post"], "sandwich": ["post", "pre"]}
    for strategy, expected in used.items():
        block = build(MODULES["mha"](), norm_strategy=strategy).layers[0]
        for branch in ("attention", "mlp"):
            kinds = {k: getattr(block, f"{branch}_{k}_norm") for k in ("post", "pre")}
            assert [k for k, m in kinds.items() if isinstance(m, nn.RMSNorm)] == expected
    # A post-normed branch adds rows of unit mean square, however large its weights are.
    block = build(MODULES["mha"](), norm_strategy="post").layers[0]
    with torch.no_grad():
        block.mlp.down_proj.weight.mul_(100)
    branch = block.mlp_post_norm(block.mlp(torch.randn(1, 5, WIDTH)))
    torch.testing.assert_close(branch.square().mean(-1), torch.ones(1, 5), atol=1e-3, rtol=0)


def test_embeddings_are_tied_unless_told():
    tied = build(MODULES["mha"]())
    assert tied.lm_head.weight is tied.embed_tokens.weight
    free = build(MODULES["mha"](), tie_embeddings=False)
    assert free.count_parameters() == tied.count_parameters() + VOCAB * WIDTH
    assert not torch.equal(free.lm_head.weight, free.embed_tokens.weight)


@pytest.mark.parametrize("change", [
    lambda m: m.to("meta").to_empty(device="cpu"),
    lambda m: m.reset_parameters(),
    lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    lambda m: m.double(),
    copy.deepcopy,
], ids=["to_empty", "reset", "assign", "double", "deepcopy"])  # fmt: skip
def test_tied_weights_stay_tied(change):
    model = build(MODULES["mha"]())
    changed = change(model)
    model = changed if isinstance(changed, nn.Module) else model
    model.reset_parameters(seed=1)
    assert model.lm_head.weight is model.embed_tokens.weight
    ids = torch.randint(VOCAB, (1, 5))
    before = model(ids)["logits"]
    with torch.no_grad():
        model.embed_tokens.weight[0] += 1.0
    assert not torch.equal(model(ids)["logits"][..., 0], before[..., 0])
    assert "lm_head.weight" not in model.state_dict()


def test_a_file_that_holds_the_tied_weight_twice_loads():
    model, other = build(MODULES["mha"]()), build(MODULES["mha"]())
    state = other.state_dict()
    model.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"]})
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: expected the embedding's"):
        model.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"] + 1})


def test_models_of_one_seed_differ_in_attention_alone():
    """Whatever their mechanisms draw, and wherever a mechanism stands among them."""
    models = []
    for make in MODULES.values():
        torch.manual_seed(5)
        models.append(build(make()))
    first = dict(models[0].named_parameters())
    for model in models:
        for name, parameter in model.named_parameters():
            if ".attention." not in name or (parameter.shape == (WIDTH, WIDTH) and "out_p" in name):
                assert torch.equal(parameter, first[name]), name
    assert not torch.equal(first["embed_tokens.weight"], build(MODULES["mha"]()).lm_head.weight)
    one, other = (build(MODULES["mga"]()) for _ in range(2))
    one.reset_parameters(seed=3), other.reset_parameters(seed=3)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    layers = [block.attention.w_g.weight for block in one.layers]
    assert not torch.equal(*layers)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    model = build(MODULES["gqa"]())
    ids = torch.randint(VOCAB, (2, 7), dtype=dtype)
    loss = model(ids, labels=ids)["loss"]
    assert torch.equal(loss, model(ids.long(), labels=ids.long())["loss"])
    with pytest.raises(TypeError, match=r"labels: expected integers, got torch\.float32"):
        model(ids, labels=ids.float())
    for wrong in (-1, VOCAB, -101):
        with pytest.raises(ValueError, match="labels: expected -100 or values from 0 to 30"):
            model(ids, labels=torch.full_like(ids, wrong))


def test_biases_only_when_asked():
    biased = build(MODULES["mha"](), use_bias=True)
    assert biased.layers[0].mlp.up_proj.bias is not None
    assert build(MODULES["mha"]()).layers[0].mlp.up_proj.bias is None


@every_model
def test_a_repeated_batch_is_learnt(make):
    model = build(make())
    ids = torch.randint(VOCAB, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids)["loss"]
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_visible_pairs_counts_the_mask():
    for tokens in (1, 5, 9):
        for window in (None, 1, 4, 9, 20):
            counted = sum(min(t + 1, window or tokens) for t in range(tokens))
            assert visible_pairs(tokens, window) == counted


IDS = torch.zeros(1, 5, dtype=torch.int64)
REFUSALS = [
    (lambda m: m(IDS.float()), TypeError, "input_ids: expected integers, got torch.float32"),
    (lambda m: m(IDS[0]), ValueError, "input_ids: expected [B, T], got [5]"),
    (lambda m: m(IDS[:, :0]), ValueError, "input_ids: expected [B, T], got [1, 0]"),
    (lambda m: m(IDS.expand(1, 5).repeat(1, 13)), ValueError,
     "input_ids: expected at most max_seq_len=64 tokens in a sequence, got 65"),
    (lambda m: m(IDS + VOCAB), ValueError, "input_ids: expected values from 0 to 30, got 31 to 31"),
    (lambda m: m(IDS - 1), ValueError, "input_ids: expected values from 0 to 30, got -1 to -1"),
    (lambda m: m(IDS, labels=IDS[:, 1:]), ValueError,
     "labels: expected input_ids' shape [1, 5], got [1, 4]"),
    (lambda m: m(IDS, IDS[:, 1:]), ValueError, "attention_mask: expected [B=1, T=5]"),
    (lambda m: m(IDS, IDS + 1, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)), ValueError,
     "cu_seqlens: expected None beside attention_mask or cache"),
    (lambda m: build(nn.Linear(WIDTH, WIDTH)), TypeError,
     "attention_module: expected an instance of smollm.attention.Attention, or a sequence of them"),
    (lambda m: build([MultiHeadAttention(WIDTH, 6), "mla"]), TypeError,
     "attention_module: expected an instance of smollm.attention.Attention, or a sequence of them"),
    (lambda m: build(mixed(), num_layers=3), ValueError,
     "attention_module: expected one, or num_layers=3 of them, got 4"),
    (lambda m: build([MultiHeadAttention(WIDTH, 6), MultiHeadAttention(48, 6)]), ValueError,
     "attention_module: expected embed_dim=24, got 48"),
    (lambda m: build(MultiHeadAttention(WIDTH, 6), embed_dim=48), ValueError,
     "attention_module: expected embed_dim=48, got 24"),
    (lambda m: build(MultiHeadAttention(WIDTH, 6), norm_strategy="peri"), ValueError,
     "norm_strategy: expected one of ('pre', 'post', 'sandwich'), got 'peri'"),
    (lambda m: build(MultiHeadAttention(WIDTH, 6), num_layers=0), ValueError,
     "num_layers: expected >= 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSALS, ids=[r[2][:45] for r in REFUSALS])
def test_refusal(call, error, text):
    model = build(MODULES["mha"]())
    with pytest.raises(error, match=re.escape(text)):
        call(model)


@pytest.mark.parametrize("offsets", [
    [[0, 5]], [0], [], [0, 4], [1, 5], [0, 3, 2, 5], [0, 6, 5],
], ids=str)  # fmt: skip
def test_offsets_that_pack_nothing_are_refused(offsets):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    module = MODULES["mha"]()
    for call in (build(module), lambda ids, **given: module(torch.zeros(1, 5, WIDTH), **given)):
        with pytest.raises(ValueError, match=r"^cu_seqlens: expected .*, got "):
            call(IDS, cu_seqlens=cu_seqlens)
        with pytest.raises(TypeError, match=r"^cu_seqlens: expected torch\.int32, got "):
            call(IDS, cu_seqlens=cu_seqlens.long())


def test_packed_sequences_are_limited_one_by_one():
    model = build(MODULES["mha"](), max_seq_len=5)
    ids = torch.zeros(1, 9, dtype=torch.int64)
    model(ids, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="max_seq_len=5 tokens in a sequence, got 6"):
        model(ids, cu_seqlens=torch.tensor([0, 3, 9], dtype=torch.int32))
