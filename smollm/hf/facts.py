"""What a checkpoint's config says of a SmolLM: read off a model, and made a model again."""

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from smollm.attention import (
    Attention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
)
from smollm.attention.rope import Rotation
from smollm.attention.scaling import Llama3Scaling
from smollm.model import SmolLM, create_smollm_with_attention
from smollm.model.block import Block
from smollm.model.config import NormStrategy
from smollm.model.head import TiedHead


@dataclass(frozen=True)
class Facts:
    """All that a config says of a model; what a mechanism has none of is None."""

    vocab_size: int
    max_seq_len: int
    embed_dim: int
    ffn_hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # in MLA without its rotary part
    rope_dim: int  # rotated features of a head, where a layer rotates
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    windows: tuple[int | None, ...]  # of each layer
    rotates: tuple[bool, ...]  # does each layer
    norm_eps: float
    norm_strategy: NormStrategy
    qk_norm: bool | str
    bias: bool | str
    mlp_bias: bool
    tie_embeddings: bool
    sinks: bool = False
    decay: str = "none"
    exclusive: bool = False
    output_gate: str = "none"
    latent_dim: int | None = None
    q_latent_dim: int | None = None
    value_dim: int | None = None

    def differences(self, other: "Facts") -> list[str]:
        """What the other says else, each as `field=other's instead of own`."""
        return [
            f"{f.name}={getattr(other, f.name)} instead of {getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


def build(facts: Facts) -> SmolLM:
    """The model that the facts describe.

    Raises:
        ValueError: facts that do not fit together.
    """
    return create_smollm_with_attention(
        [_attention(facts, *layer) for layer in zip(facts.windows, facts.rotates, strict=True)],
        vocab_size=facts.vocab_size,
        embed_dim=facts.embed_dim,
        num_layers=len(facts.windows),
        ffn_hidden_dim=facts.ffn_hidden_dim,
        max_seq_len=facts.max_seq_len,
        use_bias=facts.mlp_bias,
        tie_embeddings=facts.tie_embeddings,
        norm_strategy=facts.norm_strategy,
        norm_eps=facts.norm_eps,
    )


def facts_of(model: SmolLM) -> Facts:
    """What a config would have to say of the model.

    Raises:
        ValueError: its mechanism is one that no config describes, or its layers differ in more than
            windows and whether they rotate; the text says in what.
    """
    attentions, block = model.attentions, model.layers[0]
    layers = [_of_attention(attention) for attention in attentions]
    for index, layer in enumerate(layers):
        for name in layers[0]:
            _same(name, layers[0][name], layer.get(name), index)
    rotations = [attention.rotation for attention in attentions if attention.rotation.width]
    rotation = rotations[0] if rotations else Rotation(layers[0]["head_dim"], 10_000.0)
    for index, other in enumerate(rotations):
        _same("rotation", rotation, other, index)
    epsilons = {
        part.eps or 0.0
        for name, part in model.named_modules()
        if isinstance(part, nn.RMSNorm | nn.LayerNorm) and not name.endswith("latent_norm")
    }
    if len(epsilons) > 1:
        raise refusal("norm_eps", "one for all norms", sorted(epsilons))
    assert isinstance(block, Block)
    pre, post = (isinstance(x, nn.RMSNorm) for x in (block.mlp_pre_norm, block.mlp_post_norm))
    return Facts(
        vocab_size=model.vocab_size,
        max_seq_len=model.max_seq_len,
        embed_dim=model.embed_dim,
        ffn_hidden_dim=block.mlp.gate_proj.out_features,
        rope_dim=rotation.width,
        rope_theta=rotation.theta,
        rope_scaling=rotation.scaling,
        windows=tuple(attention.window_size for attention in attentions),
        rotates=tuple(attention.rotation.width > 0 for attention in attentions),
        norm_eps=epsilons.pop(),
        norm_strategy="sandwich" if pre and post else "pre" if pre else "post",
        mlp_bias=block.mlp.gate_proj.bias is not None,
        tie_embeddings=isinstance(model.lm_head, TiedHead),
        **layers[0],
    )


def refusal(name: str, expected: object, got: object) -> ValueError:
    """The error for a field, a weight or a model."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def _same(name: str, first: object, other: object, index: int) -> None:
    if first != other:
        raise refusal(
            "model",
            "layers that differ in windows and in whether they rotate alone",
            f"{name} {first} in layer 0 and {other} in layer {index}",
        )


def _attention(facts: Facts, window_size: int | None, rotates: bool) -> Attention:
    """The prototype of one layer."""
    shared: dict[str, Any] = {
        "embed_dim": facts.embed_dim,
        "num_heads": facts.num_heads,
        "head_dim": facts.head_dim,
        "use_sliding_window": window_size is not None,
        "window_size": window_size,
        "bias": facts.bias,
        "qk_norm": facts.qk_norm,
        "norm_eps": facts.norm_eps,
        "rope_dim": facts.rope_dim if rotates else 0,
        "rope_theta": facts.rope_theta,
        "rope_scaling": facts.rope_scaling,
    }
    if facts.latent_dim is not None:
        return MultiHeadLatentAttention(
            latent_dim=facts.latent_dim,
            q_latent_dim=facts.q_latent_dim,
            value_dim=facts.value_dim,
            **shared,
        )
    if facts.num_kv_heads == facts.num_heads:
        return MultiHeadAttention(**shared)
    return GroupedQueryAttention(num_kv_heads=facts.num_kv_heads, **shared)


def _of_attention(attention: Attention) -> dict[str, Any]:
    """What all layers of a checkpoint have in common, read off one of them."""
    own: dict[str, Any]
    if isinstance(attention, GroupedQueryAttention):
        qkv, q_norm = attention.q_proj, attention.q_norm
        own = {"num_kv_heads": attention.num_kv_heads, "sinks": attention.sinks is not None}
    elif isinstance(attention, MultiHeadLatentAttention):
        q, q_norm = attention.q_proj, attention.q_rope_norm
        qkv = attention.kv_down_proj
        own = {
            "num_kv_heads": attention.num_heads,
            "latent_dim": attention.latent_dim,
            "q_latent_dim": q[0].out_features if isinstance(q, nn.Sequential) else None,
            "value_dim": attention.value_dim,
        }
    else:
        raise refusal(
            "model", "a mechanism of transformers: MHA, GQA or MLA", type(attention).__name__
        )
    qk_norm: bool | str = isinstance(q_norm, nn.LayerNorm)
    if isinstance(q_norm, nn.RMSNorm):
        qk_norm = "rms-full" if getattr(attention, "norms_all_heads", False) else "rms"
    biased = qkv.bias is not None, attention.out_proj.bias is not None
    return own | {
        "num_heads": attention.num_heads,
        "head_dim": attention.head_dim,
        "qk_norm": qk_norm,
        "bias": "qkv" if biased == (True, False) else biased[0],
        "decay": "none" if attention.decay is None else attention.decay.kind,
        "exclusive": attention.exclusive,
        "output_gate": "none" if attention.gate is None else attention.gate.kind,
    }
