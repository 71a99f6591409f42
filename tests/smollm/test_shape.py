"""A model's shape as flags: what each reaches, layers that differ, and what is refused."""

import dataclasses
import re

import pytest
import torch
from study_cases import tiny

from smollm.attention import Llama3Scaling, Rotation
from smollm.model.build import build_model
from smollm.model.checkpoint import load_model, save_model
from smollm.model.config import ModelConfig
from smollm.studies import commands
from smollm.studies.plan import cells, parse
from smollm.studies.plan_file import PLAN, write_plan

SHAPE = ModelConfig.of(
    embed_dim=24, num_heads=6, num_layers=4, ffn_hidden_dim=20, latent_dim=10, rope_dim=4,
    num_kv_heads=2, max_seq_len=64, genetic_window_size=5,
)  # fmt: skip
VOCAB = 31


def built(mechanism, **changes):
    return build_model(mechanism, ModelConfig.of(**(SHAPE.flags | changes)), VOCAB)


def test_shared_settings_reach_every_mechanism():
    scaling = (8.0, 1.0, 4.0, 64.0)
    for mechanism in ("mha", "gqa", "mla", "mga"):
        model = built(
            mechanism, head_dim=6, rope_theta=7.0, rope_scaling=scaling, norm_eps=0.5,
            attention_bias="qkv", qk_norm="none" if mechanism == "mga" else "rms",
        )  # fmt: skip
        for block in model.layers:
            attention = block.attention
            width = 4 if mechanism == "mla" else 6
            assert attention.rotation == Rotation(width, 7.0, Llama3Scaling(*scaling))
            assert attention.head_dim == 6 and attention.out_proj.in_features == 36
            assert attention.out_proj.bias is None and block.mlp.up_proj.bias is None
            biases = [name for name, _ in attention.named_parameters() if name.endswith("bias")]
            assert len(biases) == (2 if mechanism == "mla" else 3)
            for name, module in block.named_modules():
                if name.endswith("norm") and name != "attention.latent_norm":
                    assert module.eps == 0.5
        assert model.norm.eps == 0.5


def test_settings_of_some_mechanisms():
    for mechanism in ("mha", "gqa"):
        model = built(mechanism, sinks=True, rotary_fraction=0.5, qk_norm="rms-full")
        for attention in model.attentions:
            assert attention.sinks is not None and attention.rotation.width == 2
            assert attention.q_norm.normalized_shape == (24,)
    assert built("mla", value_dim=3).attentions[0].out_proj.in_features == 18
    assert built("mha", bias=True, attention_bias="none").layers[0].mlp.up_proj.bias is not None


@pytest.mark.parametrize(("attention_bias", "bias", "expected"), [
    ("auto", False, []), ("auto", True, ["w_g", "w_e", "w_v", "out_proj"]),
    ("none", True, []), ("qkv", True, ["w_g", "w_e", "w_v"]),
    ("all", False, ["w_g", "w_e", "w_v", "out_proj"]),
])  # fmt: skip
def test_biases_of_attention_follow_the_mlps_unless_told(attention_bias, bias, expected):
    block = built("mga", bias=bias, attention_bias=attention_bias).layers[0]
    projections = block.attention.named_children()
    assert [name for name, part in projections if part.bias is not None] == expected
    assert (block.mlp.up_proj.bias is not None) is bias


def test_windows_and_rotation_alternate():
    model = built("mha", window_pattern=(3, 5, "full"), nope_every=2)
    assert model.windows == [3, 5, None, 3]
    assert [attention.rotation.width for attention in model.attentions] == [4, 0, 4, 0]
    for mechanism, widths in (("mla", [4, 4, 0, 4]), ("mga", [4, 4, 0, 4])):
        model = built(mechanism, nope_every=3)
        assert [attention.rotation.width for attention in model.attentions] == widths
    assert built("mga", window_pattern=(3, "full")).windows == [5] * 4  # it has its own


def test_mechanisms_alternate_and_are_saved(tmp_path):
    config = dataclasses.replace(SHAPE, window_pattern=(3, "full"), nope_every=4)
    model = build_model("mha+mla+mga", config, VOCAB).eval()
    names = [type(attention).__name__ for attention in model.attentions]
    assert [name[9:12] for name in names] == ["Att", "Lat", "Gen", "Att"]
    assert model.windows == [3, None, 5, None] and model.attentions[3].rotation.width == 0
    save_model(tmp_path / "x.pt", model, "mha+mla+mga", config)
    ids = torch.arange(9)[None]
    assert torch.equal(load_model(tmp_path / "x.pt")(ids)["logits"], model(ids)["logits"])


def test_layers_are_a_field_of_the_shape(tmp_path):
    """They come before the name, and a saved model is rebuilt with them."""
    config = dataclasses.replace(SHAPE, layers=("mha", "mha", "mga"))
    torch.manual_seed(3)
    model = build_model("mixed", config, VOCAB).eval()
    names = [type(attention).__name__[9:12] for attention in model.attentions]
    assert names == ["Att", "Att", "Gen", "Att"]
    torch.manual_seed(3)
    same = build_model("mha+mha+mga", SHAPE, VOCAB)
    save_model(tmp_path / "x.pt", model, "mixed", config)
    ids = torch.arange(9)[None]
    for other in (same.eval(), load_model(tmp_path / "x.pt")):
        assert torch.equal(other(ids)["logits"], model(ids)["logits"])
    with pytest.raises(ValueError, match=r"layers: expected one of \['mha', .*\], got 'mixed'"):
        build_model("mha", dataclasses.replace(SHAPE, layers=("mixed",)), VOCAB)


FLAGS = [
    "--preset=cpu", "--variants", "mha", "--head-dim=8", "--norm-eps=1e-6", "--qk-norm=rms-full",
    "--rope-scaling", "8", "1", "4", "8192", "--rotary-fraction=0.5", "--sinks",
    "--attention-bias=qkv", "--window-pattern", "64", "64", "full", "--nope-every=4",
]  # fmt: skip


def test_every_setting_is_a_flag_and_in_a_studys_file(tmp_path):
    config = parse(FLAGS)
    model = config.model
    assert model.window_pattern == (64, 64, "full") and model.rope_scaling == (8, 1, 4, 8192)
    assert model.sinks and (model.head_dim, model.nope_every, model.norm_eps) == (8, 4, 1e-6)
    write_plan(tmp_path, config)
    assert parse(["study", str(tmp_path / PLAN)]) == config
    assert ModelConfig.of(**model.flags) == model


def test_a_field_of_layers_multiplies_those_alone_that_it_changes():
    def names(*flags):
        return [c.name for c in cells(parse(["--preset=cpu", "--variants", "mha", "mga", *flags]))]

    windows = ["mha-window_pattern=64", "mga", "mha-window_pattern=full"]
    assert names("--grid", "window_pattern=64,full") == windows
    assert names("--grid", "nope_every=5,6") == ["mha", "mga"]  # of 4 layers
    every = ["mha-nope_every=2", "mga-nope_every=2", "mha-nope_every=4", "mga-nope_every=4"]
    assert names("--grid", "nope_every=2,4") == every


REFUSALS = [
    (["--sinks"], "sinks: expected False with mla, whose attention takes none, got True"),
    (["--only-mga", "--sinks"], "sinks: expected False with mga, whose attention takes none, got"),
    (["--variants", "mla", "--rotary-fraction=0.5"],
     "rotary_fraction: expected 0 or 1 with mla and mga, which rotate as a whole, got 0.5"),
    (["--variants", "mha", "--rotary-fraction=0.3", "--num-heads=3"],
     "rotary width: expected an even number, got 3"),
    (["--rotary-fraction=1.5"], "rotary_fraction: expected in [0, 1], got 1.5"),
    (["--window-pattern", "64", "0"], "window_pattern: expected in [1, 1e+09], got 0"),
    (["--window-pattern", "64", "full", "--window-size=3"],
     "window_size: expected None beside window_pattern, got 3"),
    (["--rope-scaling", "8", "1", "4", "0"], "rope_scaling: expected in (0, inf), got 0.0"),
    (["--rope-scaling", "8", "4", "1", "64"],
     "rope_scaling: expected low_freq_factor < high_freq_factor, got 4.0 and 1.0"),
    (["--variants", "mla", "--qk-norm=rms-full"], "qk_norm: expected False, True or 'rms' with"),
    (["--variants", "mla", "--qk-norm=rms", "--nope-every=2", "--num-layers=2"],
     "qk_norm: expected False with rope_dim=0"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "text"), REFUSALS, ids=[text[:45] for _, text in REFUSALS])
def test_refusal(flags, text, data_dir, tmp_path, capsys):
    assert commands.main(tiny(flags, data_dir, tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {text}")


def test_an_unknown_mechanism_among_several_is_refused():
    text = "mechanism: expected one of ['mha', 'gqa', 'mla', 'mga'], got 'mqa'"
    with pytest.raises(ValueError, match=re.escape(text)):
        built("mha+mqa")
