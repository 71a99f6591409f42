"""The corpus of associative recall: its documents are sequences, its bounds what they say."""

import itertools
import json
import math

import pytest
import torch

from bench.studies.mga import recall
from smollm.data import Corpus
from smollm.training.config import TrainConfig
from smollm.training.loader import Loader
from smollm.training.parallel import World

PAIRS = recall.Pairs(documents=200, seq_len=12, keys=5, seed=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return recall.prepare(tmp_path_factory.mktemp("corpora"), PAIRS)


def posterior(text, position, asked):
    """P(value at a position | what stands before it, one of these keys), all mappings alike."""
    pairs = list(zip(text[1:position:2], text[2:position:2], strict=False))
    likely = weight = 0.0
    for values in itertools.product("abcd", repeat=4):
        mapping = dict(zip("ABCD", values, strict=True))
        if all(mapping[k] == v for k, v in pairs):
            likely += sum(mapping[k] == text[position] for k in asked) / len(asked)
            weight += 1
    return likely / weight


def test_bounds_are_those_of_ideal_predictors():
    texts = [".AaAa", ".AaBbAa", ".BaAaCcBaCcAaDa", ".CdCdCdCd"]
    floor, unbound, guess, targets = 0.0, 0.0, 0.0, 0
    for text in texts:
        for position in range(2, len(text), 2):
            floor += math.log(4) - math.log(posterior(text, position, text[position - 1]))
            unbound += math.log(4) - math.log(posterior(text, position, "ABCD"))
            guess += 2 * math.log(4)
        targets += len(text) - 1 + 1  # all but the start, and the end
    expected = recall.Bounds(floor / targets, unbound / targets, guess / targets)
    found = recall.bounds(texts, 4)
    for name in ("floor", "unbound", "guess"):
        assert math.isclose(getattr(found, name), getattr(expected, name))
    assert math.isclose(found.recalled(found.floor), 1) and found.recalled(found.guess) == 0
    assert math.isclose(found.recalled((found.floor + 3 * found.guess) / 4), 0.25)


@pytest.mark.parametrize("document_mask", [False, True])
def test_every_sequence_of_training_is_a_document(document_mask, corpus):
    config = TrainConfig(seq_len=12, batch_size=8, document_mask=document_mask)
    with Loader(corpus, config, World(0, 1, torch.device("cpu"))) as loader:
        batches = [batch for step in range(30) for batch in loader.step(step)]
    assert all(batch.num_targets == 8 * 11 for batch in batches)
    rows = [batch.ids.view(-1, 12) for batch in batches] + list(corpus.val.sequential(8, 12))
    symbols = corpus.tokenizer.decode_batch(torch.cat(rows)[:, :-1, None].flatten(0, 1).tolist())
    texts = {"".join(symbols[i : i + 11]) for i in range(0, len(symbols), 11)}
    assert texts == set(PAIRS.texts())
    assert torch.cat(rows)[:, -1].eq(corpus.eos_id).all()


def test_documents_are_drawn_as_said():
    text = next(recall.Pairs(documents=1, seq_len=20_000, keys=32, seed=3).texts())
    keys, values = text[1::2], text[2::2]
    assert len(text) == 19_999 and len(keys) == len(values) and text[0] == recall.START
    assert len(set(zip(keys, values, strict=True))) == len(set(keys)) == 32
    counts = torch.tensor([keys.count(key) for key in recall.KEYS], dtype=torch.float64)
    assert (counts - 9999 / 32).abs().max() < 5 * (9999 / 32) ** 0.5
    assert not set(recall.KEYS) & set(recall.VALUES) and len(set(recall.VALUES)) == 32
    assert list(PAIRS.texts()) == list(PAIRS.texts())
    assert list(PAIRS.texts()) != list(recall.Pairs(200, 12, 5, seed=2).texts())


def test_the_command_writes_the_bounds_of_what_is_held_out(corpus, tmp_path, capsys):
    flags = [f"--root={tmp_path}", "--seq-len=12", "--keys=5", "--documents=200",
             "--seed=1", f"--output={tmp_path / 'bounds.json'}"]  # fmt: skip
    assert recall.main(flags) == 0
    held_out = recall.held_out(corpus, 12)
    assert 0 < len(held_out) < 40 and set(held_out) < set(PAIRS.texts())
    written = json.loads((tmp_path / "bounds.json").read_text())
    bounds = recall.bounds(held_out, 5)
    assert bounds == recall.Bounds(*(written[name] for name in ("floor", "unbound", "guess")))
    assert written["sha256"] == corpus.sha256 == Corpus(tmp_path / "recall").sha256
    assert f"{bounds.floor:.4f} with all recalled" in capsys.readouterr().out
    assert recall.main(flags) == 2
    assert "recall: " in capsys.readouterr().err
    assert recall.main([*flags, "--replace"]) == 0


@pytest.mark.parametrize(("seq_len", "keys", "text"), [
    (2, 5, "seq_len: expected an even number >= 4, got 2"),
    (13, 5, "seq_len: expected an even number >= 4, got 13"),
    (12, 1, "keys: expected 2 to 32, got 1"), (12, 33, "keys: expected 2 to 32, got 33"),
])  # fmt: skip
def test_refusal(seq_len, keys, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        recall.prepare(tmp_path, recall.Pairs(9, seq_len, keys, 1))


@pytest.mark.parametrize("seq_len", [6, 10, 24])
def test_windows_that_are_no_documents_are_refused(seq_len, corpus):
    text = f"seq_len: expected the tokens of a document, got {seq_len}"
    with pytest.raises(ValueError, match=text):
        recall.held_out(corpus, seq_len)
