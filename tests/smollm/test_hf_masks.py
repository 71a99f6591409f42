"""Who sees whom under transformers' masks and caches: the dense mask that it makes is the truth."""

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402
from transformers.cache_utils import DynamicCache, StaticCache  # noqa: E402

import smollm.hf  # noqa: E402
from smollm.hf.attention import attend  # noqa: E402
from smollm.hf.masks import layout  # noqa: E402

WINDOW, BATCH, PROMPT = 5, 3, 7
STEPS = (1, 3, 1, 1, 4)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]])
RIGHT, BOTH = LEFT.flip(1), torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1] * 7, [0, 1, 1, 0, 0, 0, 0]])
MASKS = {
    "full": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "bidirectional": masking_utils.create_causal_mask,
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    smollm.hf.register()


def config(kind, implementation="eager", **changes):
    made = transformers.MistralConfig(
        num_hidden_layers=1, num_attention_heads=1, hidden_size=8, **changes
    )
    made.sliding_window = WINDOW if kind == "window" else None
    made.is_causal = kind != "bidirectional"
    made._attn_implementation = implementation
    return made


def masks(kind, tokens, padding=None, cache=None, position_ids=None, **more):
    """Ours, and transformers' as booleans [B, Tq, Tk]."""
    ours, dense = (
        MASKS[kind](
            config(kind, implementation),
            torch.empty(BATCH, tokens, 0),
            padding,
            cache,
            position_ids,
            **more,
        )
        for implementation in ("smollm", "eager")
    )
    return ours, None if dense is None else (dense == 0)[:, 0]


def seen(mask, tokens, keys):
    """[B, Tq, Tk]: with the identity for values, the output is the matrix of weights."""
    zeros = torch.zeros(BATCH, 1, max(tokens, keys), 8)
    value = torch.eye(keys).expand(BATCH, 1, keys, keys)
    o, weights = attend(torch.nn.Module(), zeros[:, :, :tokens], zeros[:, :, :keys], value, mask)
    assert o.shape == (BATCH, tokens, 1, keys) and o.is_contiguous() and weights is None
    return o[:, :, 0] > 0


def assert_same(ours, dense, real=None):
    """The masks agree for every query that is real."""
    tokens, keys = dense.shape[1:]
    real = torch.ones(BATCH, tokens) if real is None else real[:, -tokens:]
    assert torch.equal(seen(ours, tokens, keys)[real == 1], dense[real == 1])


@pytest.mark.parametrize("padding", [None, LEFT], ids=["whole", "left"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["full", "window"])
def test_caches(kind, static, padding):
    """A prompt, then tokens one by one and several at once, past the window, up to capacity."""
    rows = PROMPT + sum(STEPS)
    cache = StaticCache(config(kind), rows) if static else DynamicCache(config=config(kind))
    for step, tokens in enumerate((PROMPT, *STEPS)):
        if step and padding is not None:
            padding = F.pad(padding, (0, tokens), value=1)
        ours, dense = masks(kind, tokens, padding, cache)
        assert_same(ours, dense, padding)
        new = torch.zeros(BATCH, 1, tokens, 8)
        assert cache.update(new, new, 0)[0].shape[2] == dense.shape[-1]


@pytest.mark.parametrize("padding", [LEFT, RIGHT, BOTH], ids=["left", "right", "both"])
@pytest.mark.parametrize("kind", MASKS)
def test_padding_without_a_cache(kind, padding):
    ours, dense = masks(kind, PROMPT, padding)
    assert_same(ours, dense, padding)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_packed_by_position_ids(kind):
    """Also where rows are packed otherwise, or not at all."""
    lengths = ((1, 6), (7,), (2, 1, 4))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ours, dense = masks(kind, PROMPT, position_ids=position_ids)
    assert ours.cu_seqlens.tolist() == [0, 1, 7, 14, 16, 17, 21]
    assert_same(ours, dense)


@pytest.mark.parametrize("kind", MASKS)
def test_nothing_is_spent_where_nothing_is_padded(kind):
    """Such calls stay without offsets, rows or copies, in decoding too."""
    cache = DynamicCache(config=config(kind))
    for tokens, padding in ((PROMPT, None), (PROMPT, torch.ones(BATCH, PROMPT))):
        ours, dense = masks(kind, tokens, padding, position_ids=torch.arange(tokens)[None])
        assert ours is None or ours[2:] == (None, None, None)
        assert_same(ours, torch.ones(BATCH, 7, 7, dtype=torch.bool) if dense is None else dense)
    new = torch.zeros(BATCH, 1, PROMPT, 8)
    cache.update(new, new, 0)
    ours, _ = masks(kind, 1, torch.ones(BATCH, PROMPT + 1), cache)
    assert ours is None or ours[2:] == (None, None, None)


def test_static_caches_are_read_in_place():
    """Without padding no row is gathered, and the lengths stay tensors, so that a graph holds."""
    cache = StaticCache(config("full"), 16)
    new = torch.zeros(BATCH, 1, PROMPT, 8)
    cache.update(new, new, 0)
    ours, _ = masks("full", 1, torch.ones(BATCH, PROMPT + 1), cache)
    assert ours.rows is None and ours.lengths.tolist() == [PROMPT + 1] * BATCH


def test_masks_made_ahead_are_kept():
    """Generation with static caches makes masks first and hands them to the model."""
    cache = StaticCache(config("full"), 16)
    ours, _ = masks("full", PROMPT, LEFT, cache)
    embeddings = torch.empty(BATCH, PROMPT, 0)
    again = MASKS["full"](config("full", "smollm"), embeddings, ours, cache)
    assert again is ours


def test_windows_of_models_that_tell_the_mask_alone():
    """Some models hand no sliding_window to attention; its mask has it all the same."""
    ours, dense = masks("window", PROMPT)
    assert ours.window_size == WINDOW
    assert_same(ours, dense)
    assert int(seen(ours, PROMPT, PROMPT).sum(dim=-1).max()) == WINDOW


def refused(kind="full", tokens=PROMPT, padding=None, error=NotImplementedError, **more):
    with pytest.raises(error) as refusal:
        MASKS[kind](
            config(kind, "smollm"), torch.empty(BATCH, tokens, 0), padding, None, None, **more
        )
    return str(refusal.value)


def test_refusals():
    chunked = config("full", "smollm")
    chunked.attention_chunk_size = 4
    with pytest.raises(NotImplementedError, match="attention_chunk_size: expected None, got 4"):
        masking_utils.create_chunked_causal_mask(chunked, torch.empty(1, 7, 0), None, None)

    def custom(batch, head, q, k):
        return k >= 0

    for name in ("or_mask_function", "and_mask_function"):
        assert f"{name}" in refused(**{name: custom})
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1]] * BATCH)
    assert refused(block_sequence_ids=blocks) == (
        "attention_mask: expected a causal mask, got one that looks ahead"
    )
    gap = torch.tensor([[1, 1, 0, 1, 1, 1, 1]] * BATCH)
    for kind in MASKS:
        assert refused(kind, padding=gap) == (
            "attention_mask: expected padding at the ends only, got a gap"
        )
    assert refused(padding=gap[:, None]) == (
        "attention_mask: expected padding [B, T], got [3, 1, 7]"
    )


def test_padded_keys_of_others_are_refused():
    """Which tokens are the queries' own cannot be told where there is cross-attention."""
    crossing = config("bidirectional", "smollm")
    states = torch.empty(BATCH, PROMPT, 0)
    expected = "attention_mask: expected no padding where there is cross-attention, got some"
    with pytest.raises(NotImplementedError, match=expected):
        masking_utils.create_bidirectional_mask(crossing, states[:, :2], LEFT, states)
    crossing.is_encoder_decoder = True
    with pytest.raises(NotImplementedError, match=expected):
        masking_utils.create_bidirectional_mask(crossing, states, LEFT, states)
    whole = masking_utils.create_bidirectional_mask(
        crossing, states[:, :2], torch.ones(BATCH, PROMPT), states
    )
    assert seen(whole, 2, PROMPT).all()


def test_a_short_mask_is_refused():
    cache = DynamicCache(config=config("full"))
    new = torch.zeros(BATCH, 1, PROMPT, 8)
    cache.update(new, new, 0)
    with pytest.raises(ValueError, match=r"expected \[B=3, T=8\] .*, got \[3, 1\]"):
        masks("full", 1, torch.ones(BATCH, 1), cache)


def test_a_window_of_both_sides_is_refused():
    bidirectional = config("window", "smollm")
    bidirectional.is_causal = False
    with pytest.raises(NotImplementedError, match="expected a causal mask, got one that looks"):
        MASKS["window"](bidirectional, torch.empty(BATCH, PROMPT, 0), None, None)


def test_causality_is_what_is_left_without_a_mask_function():
    assert layout(BATCH, PROMPT, PROMPT) is None
