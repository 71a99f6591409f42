"""Generation: caches agree with recomputation, and stay as small as promised."""

import re
from unittest import mock

import pytest
import torch
from test_model import VOCAB, build, every_model, mixed
from test_modules import MODULES, WIDTH
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import checks
from smollm import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadGeneticAttention,
    MultiHeadLatentAttention,
)
from smollm.model import checks as model_checks
from smollm.model import generate, replay


@pytest.mark.parametrize("prompt", [1, 3, 7])
@every_model
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(make, prompt):
    """Over more than three windows' length, from prompts shorter and longer than the window."""
    model = build(make()).double().eval()
    ids = torch.randint(VOCAB, (2, 18))
    cache = model.new_cache(2, 18)
    steps = [model(ids[:, :prompt], cache=cache)["logits"]]
    steps += [model(ids[:, t : t + 1], cache=cache)["logits"] for t in range(prompt, 18)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids)["logits"])


@pytest.mark.parametrize("parts", [(4, 3, 5, 1, 2), (1, 8, 2, 1), (2, 17)])
@every_model
def test_a_cache_in_use_takes_any_number_of_tokens(make, parts):
    """Fewer and more than a window's, and more than the ring has rows."""
    model = build(make()).double().eval()
    ids = torch.randint(VOCAB, (2, sum(parts)))
    cache = model.new_cache(2, 25)
    logits = [model(part, cache=cache)["logits"] for part in ids.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids)["logits"])


class HostReads(TorchDispatchMode):
    """Fails where an operator would wait for a GPU to tell a number, or the size of a result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        assert name != "repeat_interleave" or kwargs.get("output_size") is not None
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1])
        return func(*args, **kwargs)


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU: checks look at no value, and decoding, here the oracle's, at no length."""
    monkeypatch.setattr(checks, "implementation", lambda *_, **__: "eager")
    for module in (checks, model_checks):
        monkeypatch.setattr(module, "readable", lambda x: False)


@every_model
@pytest.mark.usefixtures("unread")
def test_a_step_of_one_token_waits_for_no_number(make):
    """Past the window too, where a ring begins anew."""
    model = build(make()).eval()
    ids = torch.randint(VOCAB, (2, 12))
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        model(ids[:, :3], cache=cache)
        for t in range(3, 12):
            with HostReads():
                hidden, _ = model.encode(ids[:, t : t + 1], cache=cache)
            assert hidden.shape[:2] == (2, 1)


class Recording(HostReads):
    """Keeps every operator with its arguments and results; a replay writes into the same memory.

    As to a CUDA graph, all that Python decides is what it was when the step was recorded.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not isinstance(result, int):  # a type
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if all(returned.alias_info is None for returned in func._schema.returns):
                for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    kept.copy_(new)  # what is neither a view nor updated in place


def recorded(step, times, device):
    """What `generate.repeated` returns, of a graph that needs no GPU."""
    recording = Recording()

    def call():
        if recording.calls:
            recording.replay()
        else:
            with recording:
                step()

    return call


SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize(
    ("make", "options"),
    [*((make, {}) for make in MODULES.values()), (mixed, {}), (mixed, SAMPLED)],
    ids=[*MODULES, "mixed", "mixed-sampled"],  # whatever the model, drawing is the same
)
@pytest.mark.usefixtures("unread")
def test_a_recorded_step_generates_the_same_tokens(make, options, monkeypatch):
    """Past windows, behind prompts of unequal lengths, and where sequences end."""
    model = build(make())
    ids, mask = torch.randint(VOCAB, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    mask[0, :4] = mask[1, :2] = False

    def run(eos=None):
        torch.manual_seed(1)
        given = {"attention_mask": mask, "eos_token_id": eos, **options}
        return model.generate(ids, 13, **given), torch.get_rng_state()

    expected = {None: run()}
    if make is mixed:  # a sequence ends as in any model
        eos = int(expected[None][0][1, -3])
        expected[eos] = run(eos)
    monkeypatch.setattr(generate, "repeated", recorded)
    for eos, (tokens, state) in expected.items():
        same_tokens, same_state = run(eos)
        assert torch.equal(same_tokens, tokens) and torch.equal(same_state, state)


def test_a_step_is_captured_where_it_can_be_and_pays(monkeypatch):
    step, gpu = print, torch.device("cuda", 0)
    assert replay.repeated(step, 1000, torch.device("cpu")) is step
    assert replay.repeated(step, 5, gpu) is step
    for capturing in (True, False):  # a caller of generate()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda x=capturing: x)
        monkeypatch.setattr(replay, "Replay", lambda *given: given)
        assert replay.repeated(step, 1000, gpu) == (step if capturing else (step, gpu))


def test_a_call_of_a_replay_is_one_step(monkeypatch):
    """What a capture runs is not done yet."""
    done, cuda = [], mock.MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    cuda.CUDAGraph().replay.side_effect = lambda: done.append("replay")
    call = replay.Replay(lambda: done.append("step"), torch.device("cuda", 0))
    for _ in range(replay.WARM_UP + 3):
        call()
    assert done == [*["step"] * replay.WARM_UP, "step", "replay", "replay", "replay"]
    assert cuda.graph.call_count == 1


@every_model
def test_padded_prompts_of_unequal_lengths_take_more_tokens(make):
    model = build(make()).double().eval()
    ids, more = torch.randint(VOCAB, (2, 7)), torch.randint(VOCAB, (2, 5))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :6] = False
    cache = model.new_cache(2, 12)
    model(ids, mask, cache=cache)
    logits = model(more, cache=cache)["logits"]
    for row in range(2):
        whole = torch.cat((ids[row, mask[row]], more[row]))[None]
        torch.testing.assert_close(logits[row], model(whole)["logits"][0, -5:])


@every_model
def test_left_padded_prompts_continue_like_single_ones(make):
    model = build(make()).double()
    ids = torch.randint(VOCAB, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, :5] = mask[1, :2] = False
    for use_cache, new in ((True, 12), (False, 4)):
        together = model.generate(ids, new, attention_mask=mask, use_cache=use_cache)
        assert torch.equal(together[:, :6], ids)
        for row in range(3):
            alone = model.generate(ids[row : row + 1, mask[row]], new, use_cache=use_cache)
            assert torch.equal(together[row, -new:], alone[0, -new:])


def test_settings_that_mean_greedy():
    model = build(MODULES["gqa"]())
    ids = torch.randint(VOCAB, (2, 4))
    greedy = model.generate(ids, 10)
    assert torch.equal(model.generate(ids, 10), greedy)
    assert torch.equal(model.generate(ids, 10, temperature=5.0, top_k=1), greedy)
    assert torch.equal(model.generate(ids, 10, temperature=5.0, top_p=1e-6), greedy)


@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_draws_allowed_tokens_only(use_cache):
    model = build(MODULES["gqa"]())
    ids = torch.randint(VOCAB, (64, 3))
    probability = (model(ids)["logits"].detach()[:, -1] / 0.7).softmax(-1)
    order = probability.argsort(dim=-1, descending=True)
    for setting in ({"top_k": 3}, {"top_p": 0.3}, {"top_k": 9, "top_p": 0.2}, {}):
        drawn = model.generate(ids, 1, temperature=0.7, use_cache=use_cache, **setting)[:, -1]
        ranks = set()
        for row in range(64):
            ranked = probability[row, order[row, : setting.get("top_k", VOCAB)]]
            ranked = ranked / ranked.sum()
            rank = int((order[row] == drawn[row]).nonzero())
            assert rank < len(ranked)
            assert float(ranked[:rank].sum()) < setting.get("top_p", 1.0) + 1e-6
            ranks.add(rank)
        assert len(ranks) > 1


def test_sampling_follows_the_probabilities():
    model = build(MODULES["gqa"]())
    ids = torch.randint(VOCAB, (1, 3)).expand(4000, -1)
    drawn = model.generate(ids, 1, temperature=1.0)[:, -1]
    expected = model(ids[:1])["logits"].detach()[0, -1].softmax(-1)
    observed = torch.bincount(drawn, minlength=VOCAB) / 4000
    assert float((observed - expected).abs().max()) < 0.03


def test_a_finished_sequence_is_filled_with_eos():
    model = build(MODULES["gqa"]())
    ids = torch.randint(VOCAB, (6, 4))
    free = model.generate(ids, 12)
    eos = int(free[0, 6])
    out = model.generate(ids, 12, eos_token_id=eos)
    assert out.shape == (6, 16)
    for row in range(6):
        hits = (free[row, 4:] == eos).nonzero()
        end = 4 + int(hits[0]) + 1 if len(hits) else 16
        assert torch.equal(out[row, :end], free[row, :end])
        assert out[row, end:].eq(eos).all()
    assert (out[0, 6:] == eos).all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_are_told_as_they_are_drawn(use_cache):
    model, told = build(MODULES["gqa"]()), []
    ids = torch.randint(VOCAB, (2, 3))

    def tell(token):
        told.append(token.clone())

    out = model.generate(ids, 5, use_cache=use_cache, on_token=tell)
    assert torch.equal(torch.stack(told, dim=1), out[:, 3:])
    told.clear()
    end = int(out[0, 4])
    model.generate(ids[:1], 5, use_cache=use_cache, eos_token_id=end, on_token=tell)
    assert told[-1].item() == end and len(told) <= 2


@pytest.mark.parametrize(("probabilities", "top_p", "kept"), [
    ((0.5, 0.3, 0.1, 0.1), 0.8, 2), ((0.7, 0.2, 0.1), 0.7, 1), ((0.4, 0.3, 0.2, 0.1), 0.9, 3),
    ((0.1,) * 10, 0.3, 3), ((0.6, 0.4), 0.61, 2), ((0.6, 0.4), 1e-9, 1),
])  # fmt: skip
def test_top_p_keeps_the_fewest_that_reach_it(probabilities, top_p, kept):
    logits = torch.tensor(probabilities).log().expand(500, -1)
    drawn = generate._choose(logits, 1.0, None, top_p)
    assert len(drawn.unique()) == kept


def test_a_top_p_of_one_drops_nothing():
    """Not even where the sum of a large vocabulary reaches 1 early by rounding."""
    probability, _ = generate._distribution(torch.linspace(0, 30, 49152)[None], 1.0, None, 1.0)
    assert int((probability > 0).sum()) == 49152


def test_tokens_are_drawn_as_multinomial_draws_them():
    logits = torch.randn(50, VOCAB)
    probability, token = generate._distribution(logits, 0.7, None, 0.9)
    torch.manual_seed(1)
    rank = torch.multinomial(probability, num_samples=1)
    torch.manual_seed(1)
    drawn = generate._choose(logits, 0.7, None, 0.9)
    assert torch.equal(drawn, token.gather(1, rank)[:, 0])


@pytest.mark.parametrize("temperature", [1e-39, 1e-320, 1e-8, 1e300])
def test_any_temperature_draws(temperature):
    logits = torch.tensor([[1.0, 3.0, 3.5, -2.0]]).expand(500, -1)
    drawn = generate._choose(logits, temperature, None, None)
    assert set(drawn.tolist()) == ({2} if temperature < 1 else {0, 1, 2, 3})


def test_generation_leaves_each_submodules_mode():
    model = build(MultiHeadAttention(WIDTH, 6))
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    model.generate(torch.randint(VOCAB, (1, 4)), 2)
    assert [module.training for module in model.modules()] == before


def test_generation_leaves_the_mode_as_it_was():
    model = build(MultiHeadAttention(WIDTH, 6, dropout=0.5), dropout=0.5)
    ids = torch.randint(VOCAB, (1, 4))
    assert torch.equal(model.generate(ids, 5), model.generate(ids, 5)) and model.training
    model.eval()
    model.generate(ids, 5)
    assert not model.training
    assert torch.equal(model.generate(ids, 0), ids)


CACHES = {
    "mha": (lambda: MultiHeadAttention(576, 9), 69_120, 2048),
    "gqa": (lambda: GroupedQueryAttention(576, 9, 3), 23_040, 2048),
    "gqa-window": (
        lambda: GroupedQueryAttention(576, 9, 3, use_sliding_window=True, window_size=256),
        23_040,
        256,
    ),
    "mla-288": (lambda: MultiHeadLatentAttention(576, 9, 288, 32), 19_200, 2048),
    "mla-128": (lambda: MultiHeadLatentAttention(576, 9, 128, 32), 9_600, 2048),
    "mga": (lambda: MultiHeadGeneticAttention(576, 9, 256), 103_680, 256),
    "mga-values-3": (lambda: MultiHeadGeneticAttention(576, 9, 256, 3), 80_640, 256),
    "mga-no-fitness": (
        lambda: MultiHeadGeneticAttention(576, 9, 256, gene_fitness=False),
        69_120,
        256,
    ),
}


@pytest.mark.parametrize(("make", "per_token", "rows"), CACHES.values(), ids=CACHES)
def test_bytes_that_a_cache_takes(make, per_token, rows):
    """At SmolLM2-135M's attention shape in bf16; one layer stands for thirty equal ones."""
    model = build(make(), embed_dim=576, num_layers=1, max_seq_len=2048).to(torch.bfloat16)
    cache = model.new_cache(2, 2048)
    with torch.no_grad():
        model(torch.randint(VOCAB, (2, 3)), cache=cache)
    assert 30 * cache.bytes_per_token == per_token
    allocated = sum(x.numel() * x.element_size() for x in cache.layers[0]._rows.values())
    assert cache.allocated_bytes == allocated == 2 * rows * cache.bytes_per_token


def refused(model, cache, ids):
    with pytest.raises(ValueError, match=r"cache|input_ids"):
        model(ids, cache=cache)


@pytest.mark.parametrize("parts", [(5, 1, 1, 1), (5, 3, 4), (2, 9)])
@every_model
def test_a_call_that_fails_leaves_the_cache_as_it_was(make, parts):
    """Refused for its batch, its length or its type, or broken off between two layers."""
    model = build(make()).double().eval()
    ids = torch.randint(VOCAB, (2, sum(parts)))
    cache, logits = model.new_cache(2, 25), []
    for part in ids.split(parts, dim=1):
        refused(model, cache, part[:1])
        refused(model, cache, part.repeat(1, 30)[:, :26])
        broken = model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model((part + 1) % VOCAB, cache=cache)
        broken.remove()
        logits.append(model(part, cache=cache)["logits"])
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids)["logits"])


def test_a_cache_takes_one_type_only():
    model = build(MODULES["mga"]()).eval()
    ids = torch.randint(VOCAB, (1, 6))
    cache = model.new_cache(1, 9)
    broken = model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with broken, pytest.raises(ZeroDivisionError):
        model.double()(ids[:, :4], cache=cache)
    first = model.float()(ids[:, :4], cache=cache)["logits"]
    refused(model.double(), cache, ids[:, 4:])
    rest = model.float()(ids[:, 4:], cache=cache)["logits"]
    torch.testing.assert_close(torch.cat((first, rest), dim=1), model(ids)["logits"])


def test_another_models_cache_is_refused():
    model, latent = build(MODULES["mha"]()), build(MODULES["mla"]())
    cache = latent.new_cache(1, 9)
    latent(IDS, cache=cache)
    refused(model, cache, IDS[:, :1])
    refused(model, build(MODULES["gqa"](), num_layers=3).new_cache(1, 9), IDS)
    refused(model, build(MODULES["mha-window"]()).new_cache(1, 9), IDS)
    with pytest.raises(ValueError, match="max_tokens: expected >= 1, got 0"):
        model.new_cache(1, 0)


IDS = torch.zeros(1, 5, dtype=torch.int64)
REFUSALS = [
    (lambda m: m.generate(IDS, 60),
     "max_new_tokens: expected at most max_seq_len=64 tokens with the prompt, got 65"),
    (lambda m: m.generate(IDS, -1), "max_new_tokens: expected >= 0, got -1"),
    (lambda m: m.generate(IDS, 1, temperature=-0.1), "temperature: expected >= 0, got -0.1"),
    (lambda m: m.generate(IDS, 1, top_k=3), "temperature: expected > 0 with top_k or top_p, got 0"),
    (lambda m: m.generate(IDS, 1, temperature=1.0, top_k=0), "top_k: expected >= 1, got 0"),
    (lambda m: m.generate(IDS, 1, temperature=1.0, top_p=2.0), "top_p: expected in (0, 1], got 2"),
    (lambda m: m.generate(IDS, 1, eos_token_id=VOCAB), "eos_token_id: expected 0 to 30, got 31"),
    (lambda m: m.generate(IDS[0], 1), "input_ids: expected [B, T], got [5]"),
    (lambda m: m.generate(IDS, 1, attention_mask=torch.tensor([[1, 1, 1, 1, 0]])),
     "attention_mask: expected padding on the left, got it on the right"),
    (lambda m: m.generate(IDS, 1, attention_mask=torch.tensor([[1, 1]])),
     "attention_mask: expected [B=1, T=5]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), REFUSALS, ids=[text[:45] for _, text in REFUSALS])
def test_refusal(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(build(MODULES["mha"]()))


def test_masks_and_counts_of_another_type_are_refused():
    model = build(MODULES["mha"]())
    for mask in (torch.ones(1, 5), torch.zeros(1, 5)):
        with pytest.raises(TypeError, match="attention_mask: expected booleans or integers"):
            model.generate(IDS, 1, attention_mask=mask)
    with pytest.raises(TypeError, match=r"max_new_tokens: expected an integer, got 1\.5"):
        model.generate(IDS, 1.5)
    with pytest.raises(TypeError, match="top_k: expected an integer, got True"):
        model.generate(IDS, 1, temperature=1.0, top_k=True)


def test_what_a_cache_in_use_refuses():
    model = build(MODULES["mha"]())
    cache = model.new_cache(1, 6)
    model(IDS, cache=cache)
    with pytest.raises(ValueError, match="cache: expected at most max_tokens=6, got 7"):
        model(IDS[:, :2], cache=cache)
    with pytest.raises(ValueError, match="attention_mask: expected no padding beside a cache"):
        model(IDS[:, :2], torch.tensor([[0, 1]]), cache=cache)
    model(IDS[:, :1], cache=cache)
