"""Models of transformers on our attention: the logits, tokens and gradients of its eager one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import smollm.hf  # noqa: E402
from smollm.hf.attention import attend  # noqa: E402
from smollm.hf.masks import Layout  # noqa: E402

ROOT = Path(__file__).parents[2]
PAD, TOKENS, NEW = 0, 13, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 5, "head_dim": 16},
    "Qwen3": {**MIXED, "head_dim": 16, "use_sliding_window": True},
    "Qwen2Moe": {
        **MIXED, "use_sliding_window": True, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "Gemma3": {**MIXED, "head_dim": 16, "query_pre_attn_scalar": 24},
    "DeepseekV3": {
        "num_key_value_heads": 4, "first_k_dense_replace": 2, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    },
    "GptOss": {**MIXED, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


def model(family, implementation, **changes):
    """A model of two layers whose weights are so large that who sees whom shows."""
    kind = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    shape = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, kind)(**{**shape, **FAMILIES.get(family, {}), **changes})
    config._attn_implementation = implementation
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            is_matrix = parameter.dim() > 1
            drawn = torch.randn(parameter.shape, generator=generator) * (0.3 if is_matrix else 0.1)
            parameter.copy_(drawn if is_matrix else drawn + 1)
    return made


@pytest.fixture(scope="module")
def registered():
    smollm.hf.register()
    smollm.hf.register()  # again is no harm


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, registered):
    return model(request.param, "eager"), model(request.param, "smollm")


def batch():
    ids = torch.randint(1, 64, (3, TOKENS))
    left = torch.ones_like(ids)
    left[0, :4] = left[2, : TOKENS - 1] = 0
    return torch.where(left == 1, ids, PAD), left


def assert_same_logits(pair, real=None, **arguments):
    with torch.no_grad():
        expected, got = (of(**arguments).logits for of in pair)
    if real is not None:
        expected, got = expected[real == 1], got[real == 1]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_logits(pair):
    ids, left = batch()
    assert_same_logits(pair, input_ids=ids)
    assert_same_logits(pair, left, input_ids=ids, attention_mask=left)
    assert_same_logits(pair, left.flip(1), input_ids=ids.flip(1), attention_mask=left.flip(1))
    position_ids = torch.cat([torch.arange(n) for n in (1, 7, 5)])[None]
    assert_same_logits(pair, input_ids=ids[:1], position_ids=position_ids, use_cache=False)


def test_gradients(pair):
    ids, left = batch()
    right = left.flip(1)
    labels = torch.where(right == 1, ids, -100)
    for of in pair:
        of.zero_grad()
        of.train()(input_ids=ids, attention_mask=right, labels=labels).loss.backward()
        of.eval()
    for (name, expected), got in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        if expected.grad is None:
            assert got.grad is None, name
        else:
            error = (got.grad - expected.grad).abs().max()
            assert error <= 1e-5 * expected.grad.abs().max(), name


def assert_same_tokens(pair, **arguments):
    """Of ragged prompts, past every window."""
    ids, left = batch()
    arguments = {"attention_mask": left, "max_new_tokens": NEW, "do_sample": False, **arguments}
    expected, got = (of.generate(ids, **arguments) for of in pair)
    assert expected.shape == (3, TOKENS + NEW)
    assert torch.equal(got, expected)


def test_generation(pair):
    assert_same_tokens(pair)


@pytest.mark.parametrize("pair", ["Mistral", "GptOss"], indirect=True)
def test_generation_with_a_static_cache(pair):
    assert_same_tokens(pair, cache_implementation="static")


def test_bidirectional_models(registered):
    """Padded too, on either side."""
    pair = [model("Llama", name, is_causal=False) for name in ("eager", "smollm")]
    ids, left = batch()
    assert_same_logits(pair, input_ids=ids, use_cache=False)
    assert_same_logits(pair, left, input_ids=ids, attention_mask=left, use_cache=False)


def test_on_kernels(registered):
    """Under Triton's interpreter, or on Triton."""
    smollm.hf.register("smollm_triton", impl="triton")
    pair = [model("Mistral", name).to(DEVICE) for name in ("eager", "smollm_triton")]
    ids, left = (x.to(DEVICE) for x in batch())
    assert_same_logits(pair, left, input_ids=ids, attention_mask=left)


@pytest.mark.slow
def test_compiled_as_one_graph(registered):
    """Padding breaks no graph, nor does what is refused when it runs."""
    torch._dynamo.reset()
    pair = [model("Llama", name, num_hidden_layers=1) for name in ("eager", "smollm")]
    compiled = pair[0], torch.compile(pair[1], fullgraph=True, backend="aot_eager")
    ids, left = batch()
    ids, right = ids.flip(1), left.flip(1)
    arguments = {"labels": torch.where(right == 1, ids, -100), "use_cache": False}
    outputs = [of(input_ids=ids, attention_mask=right, **arguments) for of in compiled]
    expected, got = (out.logits[right == 1] for out in outputs)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    expected, got = (
        torch.autograd.grad(out.loss, of.model.embed_tokens.weight)[0]
        for out, of in zip(outputs, pair, strict=True)
    )
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    right[1, 6] = 0
    with pytest.raises(RuntimeError, match="expected padding at the ends only, got a gap"):
        compiled[1](input_ids=ids, attention_mask=right, **arguments)


@pytest.mark.slow
def test_a_compiled_step_of_a_static_cache(registered):
    torch._dynamo.reset()
    pair = [model("Mistral", name, num_hidden_layers=1) for name in ("eager", "smollm")]
    compiled = pair[0], torch.compile(pair[1], fullgraph=True, backend="aot_eager")
    ids, left = batch()
    caches = [transformers.StaticCache(of.config, TOKENS + 1) for of in pair]
    with torch.no_grad():
        for of, cache in zip(pair, caches, strict=True):
            of(ids, left, None, cache)
        left = torch.nn.functional.pad(left, (0, 1), value=1)
        expected, got = (
            of(ids[:, :1], left, None, cache).logits
            for of, cache in zip(compiled, caches, strict=True)
        )
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def call(**changes):
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    arguments = {"module": nn.Module(), "query": q, "key": k, "value": k, "attention_mask": None}
    return attend(**{**arguments, **changes})[0]


def test_what_attention_itself_is_told():
    """A window, causality by argument before the module's, and arguments that change nothing."""
    torch.manual_seed(1)
    everything = call(is_causal=False)
    module = nn.Module()
    module.is_causal = False
    torch.manual_seed(1)
    assert torch.equal(
        call(module=module, position_ids=torch.arange(3), use_cache=True), everything
    )
    torch.manual_seed(1)
    assert not torch.equal(call(module=module, is_causal=True), everything)
    value = torch.eye(3).expand(2, 2, 3, 3)
    weights = call(value=value, sliding_window=2)[0, :, 0]
    assert (weights > 0).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]


@pytest.mark.parametrize(
    "refused",
    [
        {"softcap": 50.0},
        {"position_bias": torch.zeros(1)},
        {"block_table": torch.zeros(1)},
        {"k_cache": torch.zeros(1)},
        {"head_mask": torch.zeros(1)},
        {"output_attentions": True},
        {"attention_chunk_size": 4},
        {"something_new": 1},
    ],
    ids=lambda refused: next(iter(refused)),
)
def test_refused_arguments(refused):
    ((name, value),) = refused.items()
    got = "a tensor [1]" if isinstance(value, torch.Tensor) else repr(value)
    expected = f"{name}: expected None (attention() has no such thing), got {got}"
    with pytest.raises(NotImplementedError) as error:
        call(**refused)
    assert str(error.value) == expected
    call(**{name: None})


def test_packed_by_offsets(pair):
    """Sequences that the caller states, of models too that keep `position_ids` from their masks."""
    lengths = [4, 1, 8]
    ids = torch.randint(1, 64, (1, sum(lengths)))
    ends = torch.tensor([0, 4, 5, 13])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    stated = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 8}
    eager, ours = pair
    with torch.no_grad():
        expected = [eager(input_ids=own).logits for own in ids.split(lengths, dim=1)]
        for use_cache in (False, True):
            got = ours(input_ids=ids, position_ids=positions, use_cache=use_cache, **stated).logits
            torch.testing.assert_close(got, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("others", [None, torch.tensor([0, 2, 3]), torch.tensor([0, 3])])
def test_refused_offsets(others):
    offsets = torch.tensor([0, 1, 3])
    expected = "cu_seq_lens_q, cu_seq_lens_k: expected the same offsets, got two that differ"
    with pytest.raises(NotImplementedError) as error:
        call(cu_seq_lens_q=offsets, cu_seq_lens_k=others)
    assert str(error.value) == expected
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q, cu_seq_lens_k: expected the sa"):
        call(cu_seq_lens_q=others, cu_seq_lens_k=offsets)


@pytest.mark.parametrize("told", [None, Layout(True, lengths=torch.tensor([3, 3]))])
def test_offsets_beside_a_cache_are_refused(told):
    offsets = torch.tensor([0, 1, 2])
    query = torch.randn(2, 4, 3 if told else 2, 8)
    expected = r"expected None where a cache holds tokens, got Tq=\d, Tk=3"
    with pytest.raises(NotImplementedError, match=expected):
        call(query=query, attention_mask=told, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


def test_refused_dropout_and_masks():
    with pytest.raises(NotImplementedError, match=r"dropout: expected 0 in training, got 0.1"):
        call(dropout=0.1)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    expected = r"attention_mask: expected padding \[B, T\], got Tensor \[2, 1, 3, 3\]"
    with pytest.raises(NotImplementedError, match=expected):
        call(attention_mask=mask)


def test_what_only_the_loss_heeds(registered):
    """Labels that the caller has shifted, and the one that does not count."""
    llama = model("Llama", "smollm")
    ids = torch.randint(1, 64, (2, TOKENS))
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], dim=1)
    with torch.no_grad():
        expected = llama(input_ids=ids, labels=ids).loss
        got = llama(input_ids=ids, labels=ids, shift_labels=shifted, ignore_index=-1).loss
    torch.testing.assert_close(got, expected)


def test_models_that_are_refused(registered):
    ids, _ = batch()
    capped = model("Gemma2", "smollm", head_dim=16)
    with pytest.raises(NotImplementedError, match=r"softcap: expected None .*, got 50.0"):
        capped(input_ids=ids)
    llama = model("Llama", "smollm", attention_dropout=0.1)
    with pytest.raises(NotImplementedError, match=r"dropout: expected 0 in training, got 0\.1"):
        llama.train()(input_ids=ids)
    llama.eval()(input_ids=ids)
    with pytest.raises(
        NotImplementedError, match=r"attention_mask: .* got Tensor \[1, 1, 13, 13\]"
    ):
        llama(input_ids=ids[:1], attention_mask=torch.ones(1, 1, TOKENS, TOKENS))


@pytest.mark.parametrize("name", ["flash_smollm", "paged|smollm", "owner/smollm", ""])
def test_refused_names(name):
    with pytest.raises(ValueError) as error:
        smollm.hf.register(name)
    assert str(error.value) == (f"name: expected an identifier without 'flash' in it, got {name!r}")


def test_refused_registrations():
    with pytest.raises(
        ValueError, match="name: expected one that transformers has not got, got 's"
    ):
        smollm.hf.register("sdpa")
    with pytest.raises(ValueError, match=r"impl: expected one of \('auto', .*\), got 'fused'"):
        smollm.hf.register(impl="fused")


def test_transformers_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r'transformers: expected .* \(pip install -e "\.\[hf\]"\)'
    ):
        smollm.hf.register()


@pytest.fixture
def stub(tmp_path):
    """A folder with Hugging Face's distribution in it, as far as names go."""
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text(metadata)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    return tmp_path


def test_hugging_faces_kernels_beside_ours(stub, monkeypatch):
    """Ours is what Python finds, transformers would believe that it is the other one."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(stub)])
    expected = r"kernels: expected no distribution of that name, got 0\.18\.2\. Hugging Face's"
    with pytest.raises(ImportError, match=expected):
        smollm.hf.register()
    monkeypatch.delitem(sys.modules, "smollm.hf")
    with pytest.raises(ImportError, match=expected):
        import smollm.hf as _again  # noqa: F401


def test_hugging_faces_kernels_before_ours(stub):
    environment = {**os.environ, "PYTHONPATH": f"{stub}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-c", "import smollm.hf"],
        cwd=stub, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1
    found = stub / "kernels" / "__init__.py"
    assert f"ImportError: kernels: expected this project's, got {found}. Hugging" in ran.stderr
    assert "`pip uninstall kernels`, or keep it in another one" in ran.stderr
