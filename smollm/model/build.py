"""The model that a shape describes."""

from smollm.attention import MECHANISMS
from smollm.model.config import ModelConfig
from smollm.model.model import SmolLM, create_smollm_with_attention


def build_model(mechanism: str, config: ModelConfig, vocab_size: int) -> SmolLM:
    """A freshly initialised SmolLM with the mechanism.

    Raises:
        ValueError: no such mechanism, or fields that do not fit together.
    """
    if mechanism not in MECHANISMS:
        raise ValueError(f"mechanism: expected one of {list(MECHANISMS)}, got {mechanism!r}")
    return create_smollm_with_attention(
        MECHANISMS[mechanism].build(config, config.mechanisms[mechanism]),
        vocab_size=vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        ffn_hidden_dim=config.ffn_hidden_dim,
        max_seq_len=config.max_seq_len,
        dropout=config.dropout,
        use_bias=config.bias,
        tie_embeddings=config.tie_embeddings,
        norm_strategy=config.norm_strategy,
    )
