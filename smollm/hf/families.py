"""Architectures of transformers: what their configs say of a model, and their weights' names.

A family is a table that is read in both directions. What it cannot carry is no rule of its own: it
carries a model if the config written for it, read again, says the same of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from smollm.attention.scaling import Llama3Scaling
from smollm.hf.facts import Facts, refusal
from smollm.model.config import NormStrategy

SHARED_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "hidden_size": "embed_dim",
    "intermediate_size": "ffn_hidden_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
BIASES = {"attention_bias": "bias", "mlp_bias": "mlp_bias"}
EXPECTED = {"hidden_act": "silu", "attention_dropout": 0, "resid_pdrop": 0, "embd_pdrop": 0}
INERT = {  # change no logit of a model that has none of the rest
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("pretraining_tp", "max_window_layers", "sliding_window_pattern", "no_rope_layer_interval"),
    *("original_max_position_embeddings", "qk_head_dim", "moe_intermediate_size"),
    *("n_shared_experts", "n_routed_experts", "routed_scaling_factor", "n_group", "topk_group"),
    *("num_experts_per_tok", "norm_topk_prob", "num_nextn_predict_layers"),
}

ATTENTION = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out_proj": "self_attn.o_proj",
}
LATENT = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.q_proj.down_proj": "self_attn.q_a_proj",
    "attention.q_proj.latent_norm": "self_attn.q_a_layernorm",
    "attention.q_proj.up_proj": "self_attn.q_b_proj",
    "attention.kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.latent_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up_proj": "self_attn.kv_b_proj",
    "attention.out_proj": "self_attn.o_proj",
}
MLP = {f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
PRE = {"attention_pre_norm": "input_layernorm", "mlp_pre_norm": "post_attention_layernorm"}
POST = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
BRANCH_ENDS = {
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
ONE_QKV = {f"attention.{name}_proj": "self_attn.qkv_proj" for name in "qkv"}
ONE_GATE_UP = {f"mlp.{name}_proj": "mlp.gate_up_proj" for name in ("gate", "up")}
ROTATING = {
    *("attention.q_proj", "attention.k_proj", "attention.q_proj.up_proj"),
    "attention.kv_down_proj",
}
FULL, SLIDING = "full_attention", "sliding_attention"
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    model_type: str
    architecture: str
    names: Mapping[str, str]  # of a layer's modules; of those that share one, rows are joined
    norm_strategy: NormStrategy = "pre"
    qk_norm: bool | str = False
    bias: bool | str = True  # where attention_bias is True, or no field
    fields: dict[str, str] = field(default_factory=dict)  # facts besides the shared ones
    windows: Literal["none", "all", "some"] = "none"  # the layers that its one window is for
    rotates: Literal["all", "listed", "windowed"] = "all"  # the layers that rotate
    partial: bool = False  # whether some features of a head may not
    interleaved: bool = False  # whether neighbours rotate with each other, instead of halves

    @property
    def latent(self) -> bool:
        """Whether it is MLA."""
        return "latent_dim" in self.fields.values()

    def facts(self, config: Mapping[str, Any]) -> Facts:
        """What a config of this architecture, all defaults included, says of a model.

        Raises:
            ValueError: it asks for what this library lacks; the text names the field.
        """
        left = dict(config)
        known = SHARED_FIELDS | self.fields
        facts: dict[str, Any] = {fact: left.pop(name) for name, fact in known.items()}
        facts["bias"] = self.bias if facts.get("bias", True) else False
        facts.setdefault("mlp_bias", False)
        head_dim = left.pop("head_dim", None) or facts["embed_dim"] // facts["num_heads"]
        facts.setdefault("head_dim", head_dim)
        facts |= self._rotation(left, facts)
        facts |= self._layers(left)
        for name in EXPECTED.keys() & left.keys():
            if left[name] != EXPECTED[name]:
                raise refusal(name, EXPECTED[name], left[name])
        if self.latent and facts["bias"] and facts["q_latent_dim"] is None:
            raise refusal("attention_bias", "False without q_lora_rank", True)
        for name in sorted(left.keys() - EXPECTED.keys() - INERT):
            if left[name] not in (None, False):
                raise refusal(name, "no such field, which this library lacks", left[name])
        return Facts(norm_strategy=self.norm_strategy, qk_norm=self.qk_norm, **facts)

    def _rotation(self, left: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        rope = {"rope_type": "default", **left.pop("rope_parameters")}
        kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
        rope.pop("type", None)  # as older configs called it
        part = rope.pop("partial_rotary_factor", 1.0)
        part = left.pop("partial_rotary_factor", None) or part
        if kind not in ("default", "llama3"):
            raise refusal("rope_parameters", "rope_type default or llama3", kind)
        if part != 1 and not self.partial:
            raise refusal("partial_rotary_factor", 1.0, part)
        scaling = None
        if kind == "llama3":
            if missing := SCALING.keys() - rope.keys():
                raise refusal("rope_parameters", sorted(missing), "none")
            scaling = Llama3Scaling(**{ours: rope.pop(name) for name, ours in SCALING.items()})
        if rope:
            raise refusal("rope_parameters", f"nothing else beside {kind}", rope)
        if left.pop("rope_interleave", self.interleaved) != self.interleaved:
            raise refusal("rope_interleave", self.interleaved, not self.interleaved)
        return {
            "rope_dim": int(facts["head_dim"] * part),
            "rope_theta": float(theta),
            "rope_scaling": scaling,
        } | {name: facts[name] for name in ("rope_dim",) if name in facts}

    def _layers(self, left: dict[str, Any]) -> dict[str, Any]:
        count = left.pop("num_hidden_layers")
        if left.pop("first_k_dense_replace", count) < count:
            raise refusal("first_k_dense_replace", f"num_hidden_layers={count}", "experts")
        size = left.pop("sliding_window", None)
        if not left.pop("use_sliding_window", True):
            size = None
        kinds = left.pop("layer_types", None)
        if self.windows == "none" and size is not None:
            raise refusal("sliding_window", None, size)
        if self.windows != "some" or kinds is None:
            kinds = [FULL if size is None else SLIDING] * count
        if other := set(kinds) - {FULL, SLIDING}:
            raise refusal("layer_types", f"{FULL} or {SLIDING}", min(other))
        windows = tuple(size if kind == SLIDING else None for kind in kinds)
        listed = left.pop("no_rope_layers", None) if self.rotates == "listed" else None
        rotates = {
            "all": (True,) * count,
            "listed": tuple(map(bool, listed or ())),
            "windowed": tuple(size is None or window is not None for window in windows),
        }
        return {"windows": windows, "rotates": rotates[self.rotates]}

    def config(self, facts: Facts) -> dict[str, Any]:
        """The fields of a config that says, where this architecture can, the same as `facts`."""
        known = SHARED_FIELDS | self.fields
        config = {name: getattr(facts, fact) for name, fact in known.items()}
        count, size = len(facts.windows), max((w for w in facts.windows if w), default=None)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.rope_theta}
        if (scaling := facts.rope_scaling) is not None:
            rope |= {"rope_type": "llama3"}
            rope |= {name: getattr(scaling, ours) for name, ours in SCALING.items()}
        if self.partial:
            rope["partial_rotary_factor"] = facts.rope_dim / facts.head_dim
        config |= {"num_hidden_layers": count, "rope_parameters": rope, "hidden_act": "silu"}
        if "attention_bias" in config:
            config["attention_bias"] = bool(facts.bias)
        if self.latent:
            config |= {"first_k_dense_replace": count, "num_nextn_predict_layers": 0}
        else:
            config["head_dim"] = facts.head_dim
        if self.windows != "none":
            config["sliding_window"] = size
        if self.windows == "some":
            config["use_sliding_window"] = size is not None
            config["layer_types"] = [FULL if w is None else SLIDING for w in facts.windows]
        if self.rotates == "listed":
            config["no_rope_layers"] = [int(rotates) for rotates in facts.rotates]
        return config

    def to_theirs(self, facts: Facts, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This architecture's weights from a SmolLM's, or gradients."""
        rows: dict[str, list[Tensor]] = {}
        for name, weight in ours.items():
            weight = self._reordered(facts, name, weight, (2, -1))
            rows.setdefault(self._name(name), []).append(weight)
        return {name: x[0] if len(x) == 1 else torch.cat(x) for name, x in rows.items()}

    def to_ours(
        self, facts: Facts, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """A SmolLM's weights, of these shapes by name, from this architecture's.

        Raises:
            ValueError: a weight is missing, of another shape, or one too many.
        """
        left, ours = dict(theirs), {}
        for name, shape in shapes.items():
            theirs_name = self._name(name)
            rows = left.get(theirs_name, torch.empty(0))
            weight, left[theirs_name] = rows[: shape[0]], rows[shape[0] :]
            if weight.shape != shape:
                got = list(theirs[theirs_name].shape) if theirs_name in theirs else "none"
                raise refusal(theirs_name, f"a weight for {list(shape)}", got)
            ours[name] = self._reordered(facts, name, weight, (-1, 2))
        if over := [name for name, rows in left.items() if len(rows)]:
            raise refusal(over[0], "no such weight, or fewer rows", list(theirs[over[0]].shape))
        return ours

    def _name(self, ours: str) -> str:
        if not ours.startswith("layers."):
            return ours if ours.startswith("lm_head.") else f"model.{ours}"
        _, index, rest = ours.split(".", 2)
        module, kind = rest.rsplit(".", 1)
        return f"model.layers.{index}.{self.names[module]}.{kind}"

    def _reordered(self, facts: Facts, name: str, weight: Tensor, order: tuple[int, int]) -> Tensor:
        """Rows that rotate, as neighbours (-1, 2) or halves (2, -1), put in the other order."""
        module = name.split(".", 2)[-1].rsplit(".", 1)[0]
        if not self.interleaved or module not in ROTATING:
            return weight
        width = facts.head_dim
        if self.latent:  # what does not rotate, or the latent, comes before
            width = facts.rope_dim + (width if "q_proj" in module else facts.latent_dim or 0)
        begin = width - facts.rope_dim if self.latent else 0
        rows, rotating = torch.arange(width), slice(begin, begin + facts.rope_dim)
        rows[rotating] = rows[rotating].reshape(order).T.flatten()
        return weight.reshape(-1, width, *weight.shape[1:])[:, rows].reshape(weight.shape)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", ATTENTION | MLP | PRE, fields=BIASES),
        Family("mistral", "MistralForCausalLM", ATTENTION | MLP | PRE, bias=False, windows="all"),
        Family("qwen2", "Qwen2ForCausalLM", ATTENTION | MLP | PRE, bias="qkv", windows="some"),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            ATTENTION | MLP | PRE,
            qk_norm="rms",
            fields={"attention_bias": "bias"},
            windows="some",
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            ATTENTION | MLP | PRE,
            fields=BIASES,
            windows="some",
            rotates="listed",
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            ATTENTION | MLP | POST,
            norm_strategy="post",
            qk_norm="rms-full",
            fields={"attention_bias": "bias"},
        ),
        Family(
            "exaone4",
            "Exaone4ForCausalLM",
            ATTENTION | MLP | POST,
            norm_strategy="post",
            qk_norm="rms",
            bias=False,
            windows="some",
            rotates="windowed",
        ),
        Family(
            "glm4",
            "Glm4ForCausalLM",
            ATTENTION | MLP | ONE_GATE_UP | PRE | BRANCH_ENDS,
            norm_strategy="sandwich",
            bias="qkv",
            fields={"attention_bias": "bias"},
            partial=True,
            interleaved=True,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            ATTENTION | ONE_QKV | MLP | ONE_GATE_UP | PRE,
            bias=False,
            windows="all",
            partial=True,
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            LATENT | MLP | PRE,
            fields={
                "attention_bias": "bias",
                "qk_nope_head_dim": "head_dim",
                "qk_rope_head_dim": "rope_dim",
                "v_head_dim": "value_dim",
                "kv_lora_rank": "latent_dim",
                "q_lora_rank": "q_latent_dim",
            },
            interleaved=True,
        ),
    )
}
