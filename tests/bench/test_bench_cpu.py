"""The CPU's benchmark: turns, a twin that is one, and the way into the README."""

import json
from pathlib import Path

import pytest
import torch

import kernels
from bench import bench_cpu, results
from kernels import sdpa
from smollm.model.config import ModelConfig

README = Path(__file__).parent.parent.parent / "README.md"
TINY = ModelConfig.of(embed_dim=36, num_layers=2, ffn_hidden_dim=48, max_seq_len=64)


def test_systems_take_turns():
    made = []
    calls = {name: lambda name=name: made.append(name) for name in ("ours", "other")}
    seconds = bench_cpu.turns(calls, rounds=3)
    assert made == ["ours", "other", "other", "ours"] * 2  # one round to warm up
    assert {name: len(found) for name, found in seconds.items()} == {"ours": 3, "other": 3}


def test_a_case_ends_when_its_seconds_are_over(monkeypatch):
    monkeypatch.setattr(bench_cpu, "CASE_SECONDS", 0.0)
    assert len(bench_cpu.turns({"ours": lambda: None}, rounds=50)["ours"]) == 3


def test_the_oracle_is_what_the_rival_of_that_name_runs(monkeypatch):
    q = torch.randn(1, 5, 1, 4)
    monkeypatch.setattr(sdpa, "attention", None)
    run = bench_cpu.on_oracle(lambda: kernels.attention(q, q, q))
    assert run().shape == q.shape
    with pytest.raises(TypeError):
        kernels.attention(q, q, q)


def test_hugging_faces_twin_has_our_weights():
    pytest.importorskip("transformers")
    ours, theirs = bench_cpu.twins(TINY, 50)  # raises if their logits differ
    assert sum(p.numel() for p in theirs.parameters()) == ours.count_parameters()
    with torch.no_grad():
        ours.layers[1].mlp.up_proj.weight.zero_()
    ids = torch.arange(9)[None]
    assert not torch.allclose(theirs(ids).logits, ours(ids)["logits"], atol=1e-3)


def test_every_system_of_a_small_case_gives_the_same(monkeypatch, tmp_path):
    """`main` checks each before it is timed; what it writes becomes the README's table."""
    monkeypatch.setattr(bench_cpu, "LENGTHS", (96,))
    monkeypatch.setattr(bench_cpu, "WINDOWS", (None, 20))
    monkeypatch.setattr(bench_cpu, "MOST_FLEX", 0)  # compiles for half a minute
    output, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    assert bench_cpu.main(["--only", "attention", "--rounds", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert {(r["case"], r["direction"], r["system"]) for r in found["rows"]} == {
        (case, direction, system)
        for case in ("T 96, causal", "T 96, window 20")
        for direction in ("forward", "both")
        for system in ("ours", "sdpa", "oracle")
    }
    assert all(r["milliseconds"] > 0 and r["peak_mib"] > 0 for r in found["rows"])
    readme.write_text(README.read_text())
    for _ in range(2):  # a second table takes the first one's place
        results.main(["render", str(output), "--readme", str(readme)])
    assert readme.read_text().count("| T 96, window 20 | both |") == 1
    assert found["cpu"] in readme.read_text()
