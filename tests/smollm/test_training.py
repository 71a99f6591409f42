"""One run: its gradients, its schedule, what it measures, what it refuses."""

import dataclasses
import math
import re
import signal
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study_cases import ALONE, SMALL

from smollm.attention import MECHANISMS
from smollm.attention.options import ranges
from smollm.data.shards import TokenWindows
from smollm.model.build import build_model
from smollm.model.config import ModelConfig
from smollm.training import metrics
from smollm.training.checks import check_config
from smollm.training.config import PRESETS, TrainConfig
from smollm.training.interrupts import Interrupts
from smollm.training.loader import Batch, Loader
from smollm.training.optim import Optimizers, accumulate_gradients, learning_rate
from smollm.training.record import Record, Run
from smollm.training.state import identity
from smollm.training.trackers import MODULES, check_tracker, open_tracker

CPU = torch.device("cpu")
EXACT = TrainConfig(dtype="float32")


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("divided", [1, 3])
def test_a_step_is_the_same_however_micro_batches_divide_it(divided, document_mask, corpus):
    """Documents end at other places in each micro-batch, so their numbers of targets differ."""
    model = build_model("gqa", SMALL, corpus.vocab_size)
    config = dataclasses.replace(EXACT, document_mask=document_mask)
    step = corpus.train.batch(3, 6, 64, seed=0)
    step[0, ::2] = step[5, ::3] = step[1:4, ::10] = corpus.eos_id
    found = []
    for batches in ([step], step.split(divided)):
        model.zero_grad()
        made = [Batch.of(ids, corpus.eos_id, document_mask) for ids in batches]
        targets = sum(batch.num_targets for batch in made)
        loss = accumulate_gradients(model, made, config, ALONE, targets)
        found.append([loss, *(p.grad.clone() for p in model.parameters())])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_step_is_nats_over_targets(corpus):
    model = build_model("gqa", SMALL, corpus.vocab_size)
    batches = corpus.train.batch(0, 2, 32, seed=0).split(1)
    batches[0][0, ::2] = corpus.eos_id  # documents of 2 tokens: half the tokens are targets
    config = dataclasses.replace(EXACT, document_mask=True)
    made = [Batch.of(ids, corpus.eos_id, True) for ids in batches]
    total = sum(batch.num_targets for batch in made)
    loss = accumulate_gradients(model, made, config, ALONE, total)
    nats, targets = 0.0, 0
    for ids in batches:
        starts = [0, *(i + 1 for i in range(31) if ids[0, i] == corpus.eos_id), 32]
        for start, end in pairwise(starts):
            document = ids[:, start:end]
            nats += model(document, labels=document)["loss"].item() * (end - start - 1)
            targets += end - start - 1
    assert float(loss) == pytest.approx(nats / targets, rel=1e-5)


def test_the_schedule_warms_up_holds_and_decays():
    config = TrainConfig(steps=100, warmup_steps=10, decay_fraction=0.2, lr=2.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:80] == [2.0] * 71
    assert rates[90] == pytest.approx(1.0) and rates[99] == pytest.approx(0.1)
    assert learning_rate(0, dataclasses.replace(config, warmup_steps=0)) == 2.0
    overlapping = dataclasses.replace(config, warmup_steps=100, decay_fraction=1)
    assert max(learning_rate(step, overlapping) for step in range(100)) == pytest.approx(1.0, 0.02)


def test_a_cosine_falls_to_nothing_and_a_constant_stays():
    config = TrainConfig(steps=110, warmup_steps=10, lr=2.0, schedule="cosine")
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0)
    assert 0 < rates[109] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)
    whole = dataclasses.replace(config, warmup_steps=110)
    assert learning_rate(109, whole) == 2.0
    flat = dataclasses.replace(config, schedule="constant")
    assert [learning_rate(step, flat) for step in range(9, 110)] == [2.0] * 101


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_muon_takes_the_blocks_matrices(mechanism, tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    model = build_model(mechanism, config, 50)
    optimizers = Optimizers(model, TrainConfig(optimizer="muon"))
    muon, *rest = optimizers.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name}
    assert {names[id(p)] for p in muon["params"]} == matrices
    others = [id(p) for group in rest for p in group["params"]]
    assert sorted(others + [id(p) for p in muon["params"]]) == sorted(names)
    assert [group["weight_decay"] for group in rest] == ([0.0] if tied else [0.01, 0.0])


def test_muon_steps_are_of_adamws_size():
    """On a matrix whose gradient has any size: rms 0.2 of the rate, as AdamW's are about."""
    model = build_model("mha", SMALL, 50)
    weight = model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = 1e3 * torch.randn_like(parameter)
    Optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.0)).step(0.1)
    step = (weight.detach() - before).square().mean().sqrt() / 0.1
    assert 0.12 < step < 0.24 and weight.grad is None


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_activation_checkpointing_changes_no_gradient(mechanism, corpus):
    shape = dataclasses.replace(SMALL, dropout=0.2, num_layers=3)
    model = build_model(mechanism, shape, corpus.vocab_size)
    ids = corpus.train.batch(0, 2, 32, seed=0)
    kept, found = [], []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            loss = model(ids, labels=ids, with_logits=False)["loss"]
        loss.backward()
        kept.append(sum(sizes))
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert kept[1] < 0.7 * kept[0]


def test_batches_are_those_of_their_steps_whatever_the_order(corpus):
    config = dataclasses.replace(EXACT, seq_len=16, batch_size=3, grad_accum=2, seed=4)
    with Loader(corpus, config, ALONE) as loader:
        for step in (0, 1, 5, 6, 2):
            for index, batch in enumerate(loader.step(step)):
                expected = corpus.train.batch(2 * step + index, 3, 16, 4)
                assert torch.equal(batch.ids, expected) and batch.cu_seqlens is None
        assert loader.seconds_waited > 0


def test_what_fails_in_the_loader_fails_the_step(corpus, monkeypatch):
    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(corpus.train, "batch", broken)
    with (
        Loader(corpus, TrainConfig(), ALONE) as loader,
        pytest.raises(OSError, match="disk is gone"),
    ):
        loader.step(0)


class FakeTracker(SimpleNamespace):
    """Keeps what it is called with; both the module and, of TensorBoard, its writer."""

    def __getattr__(self, name):
        if name == "SummaryWriter":
            return lambda folder: self.calls.append(("open", folder.name)) or self
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize(("name", "module"), MODULES.items())
def test_a_tracker_gets_the_records(name, module, monkeypatch, tmp_path):
    fake = FakeTracker(calls=[], __name__=name)
    monkeypatch.setitem(sys.modules, module, fake)
    check_tracker(name)
    sink = open_tracker(name, tmp_path, Run("mha", "cpu", config={"lr": 1.0}))
    sink.log(Record(5, 100, 2.5, 1e-3, 0.5, 9.0))
    sink.close()
    first, *logged, last = fake.calls
    measured = {"tokens": 100, "loss": 2.5, "lr": 1e-3, "gradient_norm": 0.5, "seconds": 9.0}
    if name == "tensorboard":
        assert first == ("open", "mha") and last[0] == "close"
        assert logged == [("add_scalar", (key, x, 5), {}) for key, x in measured.items()]
    else:
        assert first[0] == "init" and first[2]["config"] == {"lr": 1.0} and last[0] == "finish"
        assert first[2]["name"] == f"{tmp_path.name}/mha"
        assert logged == [("log", (measured,), {"step": 5})]


def test_a_tracker_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"log: expected trackio to be installed \(`pip install"):
        check_config(changed(log="trackio"), 1)


@pytest.mark.parametrize(("name", "dtype", "precision", "tera"), [
    ("NVIDIA H100 80GB HBM3", "auto", "highest", 989), ("NVIDIA H100 PCIe", "auto", "high", 756),
    ("NVIDIA A100-SXM4-80GB", "float32", "highest", 19.5), ("NVIDIA A10", "float32", "high", 62.5),
    ("NVIDIA L40S", "bfloat16", "highest", 362), ("Unknown", "auto", "highest", None),
])  # fmt: skip
def test_the_peak_is_the_cards_in_its_type(name, dtype, precision, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    found = metrics.peak_flops(torch.device("cuda"), TrainConfig(dtype=dtype))
    assert found == (None if tera is None else tera * 1e12)
    assert metrics.peak_flops(CPU, TrainConfig()) is None


@pytest.mark.parametrize("kind, has, half", [
    ("cpu", {}, False), ("cpu", {"avx512_f": True, "avx512_bf16": False}, False),
    ("cpu", {"avx512_bf16": True}, True), ("cpu", {"amx_bf16": True}, True), ("cuda", {}, True),
])  # fmt: skip
def test_bfloat16_is_taken_where_it_is_multiplied(kind, has, half, corpus, monkeypatch):
    """And a run's identity says which type it was, so that none goes on in another."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    device = torch.device(kind)
    for dtype, expected in (("auto", half), ("float32", False), ("bfloat16", True)):
        config = dataclasses.replace(PRESETS["cpu"], train=TrainConfig(dtype=dtype))
        assert metrics.in_bfloat16(config.train, device) == expected
        about = identity("mha", config, corpus, device)
        assert about["dtype"] == ("bfloat16" if expected else "float32")


def test_what_decays():
    model = build_model("mga", SMALL, 50)
    decayed, others = (group["params"] for group in Optimizers(model, TrainConfig()).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(others) == len(names)
    assert all(re.search(r"\.(w_\w|out_proj|\w+_proj)\.weight$", names[id(p)]) for p in decayed)
    assert any("log_selection_pressure" in names[id(p)] for p in others)
    assert any("embed_tokens" in names[id(p)] for p in others)


def test_evaluation_counts_every_target_once(corpus):
    train = dataclasses.replace(EXACT, seq_len=32, batch_size=3, val_tokens=320, device="cpu")
    model = build_model("gqa", SMALL, corpus.vocab_size)
    measured = metrics.evaluate(model, corpus, train, ALONE)
    ids = torch.cat(list(corpus.val.spread(1, 32, 10)))
    with torch.no_grad():
        logits = model(ids)["logits"]
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    size = int(corpus.token_bytes[ids[:, 1:]].sum())
    assert math.isclose(measured["val_loss"], float(nats) / 310, rel_tol=1e-5)
    assert math.isclose(measured["bits_per_byte"], float(nats) / math.log(2) / size, rel_tol=1e-5)


def test_evaluation_leaves_each_submodules_mode(corpus):
    model = build_model("gqa", SMALL, corpus.vocab_size)
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    metrics.evaluate(model, corpus, TrainConfig(seq_len=32, batch_size=3, val_tokens=64), ALONE)
    assert [module.training for module in model.modules()] == before


def corpus_of(train, val):
    """A corpus of 3 tokens; 0 ends a document and stands for no text."""
    windows = (TokenWindows([np.array(ids, dtype=np.uint16)]) for ids in (train, val))
    train, val = windows
    return SimpleNamespace(
        name="made", train=train, val=val, eos_id=0, token_bytes=torch.tensor([0, 1, 1])
    )


@pytest.mark.parametrize(("train", "val", "mask", "text"), [
    ([1, 2] * 16, [0] * 32, True, "val_tokens: expected tokens of text to predict among 32"),
    ([1, 2] * 16, [0] * 32, False, "val_tokens: expected tokens of text to predict among 32"),
    ([0] * 32, [1, 2] * 16, True, "document_mask: expected documents of 2 tokens or more"),
], ids=["one-token-documents", "no-text", "train"])  # fmt: skip
def test_nothing_to_predict_is_refused(train, val, mask, text):
    config = dataclasses.replace(EXACT, seq_len=8, batch_size=2, val_tokens=32, document_mask=mask)
    with pytest.raises(ValueError, match=text):
        metrics.check_targets(corpus_of(train, val), config)
    metrics.check_targets(corpus_of([1, 2, 0, 0] * 8, [0, 1, 1, 1] * 8), config)


def test_evaluation_without_targets_is_refused_in_words():
    config = dataclasses.replace(EXACT, seq_len=8, batch_size=2, val_tokens=32, document_mask=True)
    with pytest.raises(ValueError, match="expected tokens of text to predict"):
        metrics.evaluate(build_model("mha", SMALL, 3), corpus_of([1] * 8, [0] * 32), config, ALONE)


def test_memory_is_what_was_added():
    """Whatever is there before, and whatever an earlier run left."""
    keep = torch.ones(2**25)
    for _ in range(2):
        memory = metrics.PeakMemory(CPU)
        torch.ones(2**24).sum()
        assert 60 * 2**20 < memory.bytes() < 80 * 2**20
    assert keep[0] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_unless_released(number, ctrl_c):
    before = signal.getsignal(number)
    after = []
    with Interrupts() as interrupts:
        ctrl_c(number=number)
        ctrl_c(number=number)
        with pytest.raises(KeyboardInterrupt), interrupts.released():
            after.append("entered")
        assert interrupts.requested and not after
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.released():
            with interrupts.held():
                ctrl_c(number=number)
                after.append("held")
            after.append("released")
        ctrl_c(number=number)  # while what follows the first is written
        assert after == ["held"]
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.released():
        try:
            ctrl_c(number=number)
        finally:
            ctrl_c(number=number)  # disturbs no cleaning up
            after.append("cleaned up")
    assert after == ["held", "cleaned up"] and signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts, interrupts.released():
        ctrl_c()
        assert not interrupts.requested


RANGES = {
    name: allowed
    for options in (TrainConfig, ModelConfig, *(row.options for row in MECHANISMS.values()))
    for name, allowed in ranges(options).items()
}
SEVERAL = {"contexts", "rope_scaling", "window_pattern"}  # of numbers
NUMBERS = {
    name: value
    for fields in (vars(TrainConfig()), ModelConfig().flags)
    for name, value in fields.items()
    if isinstance(value, int | float | None) and not isinstance(value, bool)
    if name not in SEVERAL
}


def changed(**fields):
    """The cpu preset with some fields of the training or the model changed."""
    config = PRESETS["cpu"]
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    train = {name: value for name, value in fields.items() if name in known}
    model = {name: value for name, value in fields.items() if name not in known}
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, **train),
        model=ModelConfig.of(**(config.model.flags | model)),
    )


def test_every_number_has_a_range():
    assert set(RANGES) == set(NUMBERS) | SEVERAL


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_every_number_is_accepted_or_refused_in_words(name):
    values = [math.nan, math.inf, -math.inf, 0, -1, -1e-9, 10**30, 2**31, 2**64, 1e308, 1e-320, 1]
    if isinstance(NUMBERS[name], int | None):
        values = [value for value in values if isinstance(value, int)]
    for value in values:
        config = changed(**{name: value})
        try:
            check_config(config, 1)
        except ValueError as refusal:
            assert re.match(r"[\w ]+: expected .*, got ", str(refusal)), value
            if not RANGES[name].holds(value):
                assert str(refusal).startswith(f"{name}: "), value
        else:
            assert RANGES[name].holds(value), value


REFUSED_VALUES = [
    ("beta1", 1.0), ("beta2", 1.0), ("embed_dim", 0), ("num_heads", 0), ("num_heads", -1),
    ("seed", 2**64), ("seed", -1), ("window_size", 2**31), ("genetic_window_size", 2**31),
    ("rope_theta", 0.0), ("rope_theta", -1.0), ("rope_theta", math.nan), ("rope_theta", math.inf),
    ("lr", math.inf), ("lr", math.nan), ("eps", 0.0), ("eps", math.inf), ("weight_decay", math.nan),
    ("weight_decay", math.inf), ("clip", math.nan), ("dropout", math.nan), ("dropout", 1.0),
    ("selection_pressure", math.nan), ("selection_pressure", math.inf), ("warmup_steps", 161),
    ("selection_pressure", 0.0), ("steps", 10**30), ("num_layers", 0), ("ffn_hidden_dim", 0),
    ("max_seq_len", 0), ("batch_size", 10**8), ("num_kv_heads", 0), ("num_value_heads", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED_VALUES)
def test_values_without_meaning_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(str(value))}"):
        check_config(changed(**{name: value}), 1)


def test_what_is_unusual_but_has_meaning_is_accepted():
    for fields in ({"clip": math.inf}, {"decay_fraction": 1.0}, {"warmup_steps": 160},
                   {"beta1": 0.0}, {"seed": 2**63 - 1}, {"window_size": 10**9},
                   {"num_layers": 10**6}):  # fmt: skip
        check_config(changed(**fields), 1)
