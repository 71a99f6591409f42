"""Attention, training and generation on this machine's CPU beside what else would be used.

`python -m bench.bench_cpu [--only attention training generation] [--rounds 7] [--output FILE]` lets
the systems of a case take turns, prints the median rate of each and its ratio to ours, and keeps
all of it in a JSON file; `python -m bench.results render FILE` makes the README's table of it.
Every system's result in fp32 is checked against the oracle's before it is timed. Leave the machine
alone meanwhile.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
from bench.results import RESULTS, machine, named, table
from bench.timing import peak_bytes
from kernels import checks
from kernels.reference import visible
from smollm.model import SmolLM
from smollm.model.build import build_model
from smollm.model.config import ModelConfig
from smollm.training.config import PRESETS
from smollm.training.metrics import cpu_name
from tests.cases import AttentionCase

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
LENGTHS, WINDOWS = (512, 2048, 8192, 16384), (None, 1024, 256)
MOST_EAGER, MOST_MASKED, MOST_FLEX = 2048, 8192, 2048  # tokens; more take minutes or the memory
CASE_SECONDS = 15.0  # of a case's rounds, after the first three
VOCABULARY = 49_152
Call = Callable[[], Any]
Row = dict[str, Any]


def turns(
    calls: dict[str, Call], rounds: int, most_seconds: float | None = None
) -> dict[str, list[float]]:
    """Seconds of each call in every round but the first; all take turns, every other time backward.

    So none always finds the caches as the same other one leaves them. Rounds after the third end
    with the seconds, by default `CASE_SECONDS`.
    """
    most_seconds = CASE_SECONDS if most_seconds is None else most_seconds
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 3 and time.perf_counter() - began > most_seconds:
            break
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            calls[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(case: str, direction: str, calls: dict[str, Call], tokens: int, rounds: int) -> list[Row]:
    """The result rows of a case, printed as they are made."""
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    found = []
    for system, seconds in turns(calls, rounds).items():
        median = statistics.median(seconds)
        row: Row = {
            "case": case,
            "direction": direction,
            "system": system,
            "milliseconds": 1e3 * median,
            "spread": max(seconds) / min(seconds) - 1,
            "rate": tokens / median,
            "unit": "tokens/s",
            "peak_mib": peaks[system] / 2**20,
            "rounds": len(seconds),
        }
        found.append(row)
        print(
            f"{case:34} {direction:9} {system:12} {row['milliseconds']:10.1f} ms"
            f"{found[0]['milliseconds'] / row['milliseconds']:8.2f} of ours"
            f"{row['peak_mib']:9.0f} MiB",
            flush=True,
        )
    return found


def attention_systems(case: AttentionCase) -> dict[str, Callable[..., Tensor]]:
    """Attention by system, each a function of q, k and v."""
    tokens, window = case.q_tokens, case.window_size

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, window_size=window, impl="sdpa")

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, window_size=window, impl="eager")

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal: dict[str, Any] = {"is_causal": True} if window is None else {"attn_mask": mask}
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal).transpose(1, 2)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        o: Tensor = compiled(*heads, block_mask=block_mask, enable_gqa=True)
        return o.transpose(1, 2)

    def seen(_batch: Tensor, _head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t >= s) & (t - s < (window or tokens))

    systems = {"ours": ours}
    if window is None or tokens <= MOST_MASKED:
        systems["sdpa"] = dense
    if window is not None and tokens <= MOST_MASKED:
        position = torch.arange(tokens)
        mask = visible(position, position, window_size=window)
    if tokens <= MOST_FLEX:
        block_mask = create_block_mask(seen, None, None, tokens, tokens, device="cpu")
        torch.compiler.reset()  # which remembers so many shapes only
        compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
        systems["flex"] = flex
    if tokens <= MOST_EAGER:
        systems["oracle"] = eager
    return systems


def attention(rounds: int) -> Iterator[Row]:
    """Forward, and forward and backward, of full and windowed attention."""
    for tokens in LENGTHS:
        for window in WINDOWS:
            if window is not None and window >= tokens:
                continue
            name = f"T {tokens}" + (f", window {window}" if window else ", causal")
            case = AttentionCase(
                name, 1, tokens, q_heads=HEADS, k_heads=KEY_HEADS, width=WIDTH, window_size=window
            )
            inputs = case.inputs(torch.float32)
            q, k, v = inputs["q"], inputs["k"], inputs["v"]
            assert q is not None and k is not None and v is not None
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            do = torch.randn_like(q)
            systems = attention_systems(case)
            with torch.no_grad():
                expected = systems["ours"](q, k, v)
                for system in systems.values():
                    torch.testing.assert_close(system(q, k, v), expected, atol=1e-4, rtol=1e-4)
            forward: dict[str, Call] = {
                system: partial(attend, q, k, v) for system, attend in systems.items()
            }
            both: dict[str, Call] = {
                system: partial(_both, attend, leaves, do)
                for system, attend in systems.items()
                if system != "flex"  # which has no backward on CPUs
            }
            yield from rows(name, "forward", forward, tokens, rounds)
            yield from rows(name, "both", both, tokens, rounds)


def _both(attend: Callable[..., Tensor], leaves: Sequence[Tensor], do: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(attend(*leaves), leaves, do)


def llama(config: ModelConfig, vocab_size: int) -> nn.Module:
    """Hugging Face's model of the same shape, on PyTorch's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    typed: Any = LlamaConfig
    return LlamaForCausalLM(
        typed(
            hidden_size=config.embed_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=KEY_HEADS,
            intermediate_size=config.ffn_hidden_dim,
            vocab_size=vocab_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
    )


LLAMA_NAMES = (
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
    (".attention.out_proj.", ".self_attn.o_proj."),
    (".attention.", ".self_attn."),
    (".attention_pre_norm.", ".input_layernorm."),
    (".mlp_pre_norm.", ".post_attention_layernorm."),
)


def as_llama(model: SmolLM) -> dict[str, Tensor]:
    """A GQA model's weights by Llama's names."""
    weights = {}
    for name, x in model.state_dict().items():
        for index, (ours, theirs) in enumerate(LLAMA_NAMES):
            if name.startswith(ours) if index < 3 else ours in name:
                name = name.replace(ours, theirs, 1)
        weights[name] = x
    return weights


def twins(config: ModelConfig, vocab_size: int) -> tuple[SmolLM, nn.Module]:
    """A GQA model and Hugging Face's with its weights, which give the same logits."""
    ours = build_model("gqa", config, vocab_size)
    theirs = llama(config, vocab_size)
    missing, unexpected = theirs.load_state_dict(as_llama(ours), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights: expected Llama's, got {unexpected} and not {missing}")
    ids = torch.randint(vocab_size, (1, 16))
    with torch.no_grad():
        logits = ours(ids)["logits"]
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-3, rtol=1e-3)
    return ours, theirs


def training_step(model: nn.Module, ids: Tensor, half: bool = False) -> Call:
    """A step of optimisation on the batch, forward in bf16 or not, as `train.py` takes it."""
    loss_alone = {"with_logits": False} if isinstance(model, SmolLM) else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = model(input_ids=ids, labels=ids, **loss_alone)
        out["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def on_oracle(call: Call) -> Call:
    """The same with every op on the oracle."""

    def run() -> Any:
        with mock.patch.object(checks, "implementation", lambda *_, **__: "eager"):
            return call()

    return run


def training(rounds: int) -> Iterator[Row]:
    """A step of optimisation: the `cpu` preset, and 6 layers of SmolLM's width."""
    preset = PRESETS["cpu"]
    wide = ModelConfig.of(num_layers=6)
    small = (preset.train.batch_size, preset.train.seq_len, 4096)
    for name, config, (batch, tokens, vocab_size) in (
        ("cpu preset", preset.model, small),
        ("width 576, 6 layers, T 512", wide, (4, 512, VOCABULARY)),
        ("width 576, 6 layers, T 2048", wide, (1, 2048, VOCABULARY)),
    ):
        ids = torch.randint(vocab_size, (batch, tokens))
        ours, theirs = twins(config, vocab_size)
        calls = {
            "ours": training_step(ours, ids),
            "transformers": training_step(theirs, ids),
            "oracle": on_oracle(training_step(build_model("gqa", config, vocab_size), ids)),
            "ours, bf16": training_step(copy.deepcopy(ours), ids, half=True),
            "transformers, bf16": training_step(copy.deepcopy(theirs), ids, half=True),
        }
        yield from rows(f"{name}, gqa", "step", calls, batch * tokens, rounds)
    ids = torch.randint(small[2], small[:2])
    for mechanism in ("mha", "mla", "mga"):
        ours, twin, third = (build_model(mechanism, preset.model, small[2]) for _ in range(3))
        calls = {
            "ours": training_step(ours, ids),
            "oracle": on_oracle(training_step(twin, ids)),
            "ours, bf16": training_step(third, ids, half=True),
        }
        yield from rows(f"cpu preset, {mechanism}", "step", calls, ids.numel(), rounds)


def generation(rounds: int) -> Iterator[Row]:
    """Greedy generation with a cache by the model of 135M parameters."""
    new = 64
    config = PRESETS["smollm2-135m"].model
    ours, theirs = twins(config, VOCABULARY)
    half = {"ours, bf16": copy.deepcopy(ours), "transformers, bf16": copy.deepcopy(theirs)}
    models = {"ours": ours, "transformers": theirs} | {
        name: model.to(torch.bfloat16) for name, model in half.items()
    }
    for prompt in (128, 1024):
        ids = torch.randint(VOCABULARY, (1, prompt))
        calls: dict[str, Call] = {
            name: partial(_generate, model, ids, new) for name, model in models.items()
        }
        if not torch.equal(calls["ours"](), calls["transformers"]()):
            print(f"prompt {prompt}: the two choose other tokens")
        calls["oracle"] = on_oracle(calls["ours"])
        yield from rows(f"135M, prompt {prompt}, {new} new", "generate", calls, new, rounds)


def _generate(model: Any, ids: Tensor, new: int) -> Tensor:
    if isinstance(model, SmolLM):
        return model.generate(ids, new)
    with_cache: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    tokens: Tensor = model.generate(ids, max_new_tokens=new, do_sample=False, **with_cache)
    return tokens


PARTS = {"attention": attention, "training": training, "generation": generation}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_cpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{named(cpu_name())}.json")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    results: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **machine()}
    results["rows"] = []
    for part in arguments.only:
        results["rows"] += PARTS[part](arguments.rounds)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
