"""Several corpora at weights are read as one, example by example a function of its number."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from smollm.data import Corpus, Mixture, load_corpus
from smollm.data.mixture import MixedWindows, Turns
from smollm.data.shards import TokenWindows

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(WEIGHTS)
def test_shares_hold_within_one_example_everywhere(weights):
    turns, period = Turns(weights), sum(weights)
    had = np.zeros(len(weights), dtype=int)
    for example in range(2 * period):
        assert turns.counts(example).tolist() == had.tolist()
        assert np.all(np.abs(had * period - example * np.array(weights)) < period)
        part, before = turns.of(example)
        assert before == had[part]
        had[part] += 1
        if example + 1 == period:
            assert had.tolist() == weights
    far = 10**15 * period
    assert turns.of(far + 1)[0] == turns.of(1)[0]
    assert turns.counts(far).tolist() == [10**15 * weight for weight in weights]


def splits(*counts):
    """A part of so many windows of 2 tokens each; its tokens say whose they are and where."""
    return [
        TokenWindows([np.arange(1000 * i, 1000 * i + 2 * count, dtype=np.uint16)])
        for i, count in enumerate(counts)
    ]


def mixed(counts, weights):
    return MixedWindows(splits(*counts), Turns(weights))


def test_a_batch_is_a_function_of_the_step():
    whole = mixed((50, 30, 7), (3, 2, 1)).batch(0, 60, 2, seed=4)
    reader = mixed((50, 30, 7), (3, 2, 1))
    for step in (9, 0, 11, 3):
        assert torch.equal(reader.batch(step, 5, 2, seed=4), whole[5 * step : 5 * step + 5])
    assert whole.dtype == torch.int64 and whole.diff().eq(1).all()
    assert not torch.equal(reader.batch(0, 60, 2, seed=5), whole)


def test_every_part_has_its_share_and_epochs_of_its_own():
    owners, places = np.divmod(
        mixed((50, 30, 7), (3, 2, 1)).batch(0, 600, 2, 0)[:, 0].numpy(), 1000
    )
    for start in range(0, 600, 6):
        assert np.bincount(owners[start : start + 6]).tolist() == [3, 2, 1]
    for part, count in enumerate((50, 30, 7)):
        own = places[owners == part]
        for epoch in range(len(own) // count):
            order = own[epoch * count : (epoch + 1) * count]
            assert sorted(order) == list(range(0, 2 * count, 2))


def test_parts_of_one_length_are_in_different_orders():
    owners, places = np.divmod(mixed((200, 200), (1, 1)).batch(0, 400, 2, 0)[:, 0].numpy(), 1000)
    assert (places[owners == 0] == places[owners == 1]).sum() < 10


def test_validation_has_the_shares_of_training():
    def taken(counts, weights, most, batch_size=4):
        batches = list(mixed(counts, weights).spread(batch_size, 2, most))
        assert all(len(batch) <= batch_size for batch in batches)
        owners, places = np.divmod(torch.cat(batches)[:, 0].numpy(), 1000)
        return np.bincount(owners, minlength=len(counts)).tolist(), places

    assert taken((50, 30, 70), (3, 2, 1), 12)[0] == [6, 4, 2]
    assert taken((50, 30, 70), (3, 2, 1), 1)[0] == [1, 0, 0]
    assert taken((50, 4, 70), (3, 2, 1), 100)[0] == [7, 4, 2]  # the second has no more
    counts, places = taken((40, 40), (1, 1), 8)
    assert counts == [4, 4] and places.tolist() == [10, 30, 50, 70] * 2
    with pytest.raises(ValueError, match="most: expected >= 1, got 0"):
        taken((50, 30), (1, 1), 0)


def test_counts_are_sums():
    reader = mixed((50, 30, 7), (3, 2, 1))
    assert reader.tokens == 174 and reader.num_windows(2) == 87
    assert sum(map(len, reader.sequential(4, 2))) == 87
    with pytest.raises(ValueError, match=re.escape("(14), got 15")):
        reader.num_windows(15)


@pytest.fixture(scope="module")
def root(prepare_mine, parquet, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    prepare_mine(root, "a", data_files=parquet[:1])
    prepare_mine(root, "b", data_files=parquet[1:])
    return root


def test_a_mixture_is_a_corpus(root):
    a, b = (Corpus(root / name) for name in "ab")
    both = load_corpus("b=0.3,a=0.7", root)
    assert isinstance(both, Mixture) and both.name == "a=7,b=3"
    assert both.train.tokens == a.train.tokens + b.train.tokens
    assert both.documents == 1200 and both.eos_id == a.eos_id and both.vocab_size == a.vocab_size
    assert torch.equal(both.token_bytes, a.token_bytes)
    for same in ("a=7,b=3", "a=70,b=30", "b=1.5,a=3.5", both.name):
        assert load_corpus(same, root).sha256 == both.sha256
    others = ("a=0.3,b=0.7", "a=1,b=1", "a", "b")
    assert len({both.sha256, *(load_corpus(o, root).sha256 for o in others)}) == 5
    alone = load_corpus("a=0.5", root)
    assert alone.sha256 == a.sha256 and alone.name == "a"


def test_tokenizers_must_be_one(root, prepare_mine, tokenizer_file, tmp_path):
    other = tmp_path / "other.json"
    made = Tokenizer.from_file(tokenizer_file)
    made.add_tokens(["<tool>"])
    made.save(str(other))
    prepare_mine(root, "c", tokenizer=str(other))
    with pytest.raises(ValueError, match=r"expected corpora of one tokenizer .* got 'a' and 'c'"):
        load_corpus("c=1,a=1", root)


REFUSED = {
    "a=1,a=2": "expected distinct names to mix, got 'a' twice",
    "a,b": "expected NAME, or NAME=WEIGHT,NAME=WEIGHT with weights above 0",
    "a=1,": "expected NAME, or NAME=WEIGHT",
    "a=0,b=1": "got 'a=0'",
    "a=-1,b=1": "got 'a=-1'",
    "a=nan,b=1": "got 'a=nan'",
    "a=1e9,b=1": "got 'a=1e9'",
    "a==1,b=1": "got 'a==1'",
    "a=0.12345,b=0.87655": "whole numbers of a sum of at most 10,000 have, got 2469:17531; round",
    "auto=1,b=1": "expected names of corpora to mix, got 'auto'",
    "../a=1,b=1": "expected a name of letters",
    "=1": "expected a name of letters",
}


@pytest.mark.parametrize(("text", "said"), REFUSED.items(), ids=REFUSED)
def test_what_is_no_mixture_is_refused(root, text, said):
    with pytest.raises(ValueError, match=f"^corpus: .*{re.escape(said)}"):
        load_corpus(text, root)


def test_a_part_that_is_not_there(root):
    with pytest.raises(FileNotFoundError, match=r"corpus: expected one prepared under .* got 'z'"):
        load_corpus("a=1,z=1", root)


def test_weights_are_exact(root):
    corpora = [Corpus(root / name) for name in "ab"]
    assert Mixture(corpora, [Fraction(1, 3), Fraction(1, 6)]).name == "a=2,b=1"
