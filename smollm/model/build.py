"""The model that a shape describes."""

from smollm.model.config import ModelConfig
from smollm.model.model import SmolLM, create_smollm_with_attention


def build_model(mechanism: str, config: ModelConfig, vocab_size: int) -> SmolLM:
    """A freshly initialised SmolLM with the mechanism, or with those of `config.layers`.

    Args:
        mechanism: its name, or several joined by "+", such as "mha+mha+mga", which the layers have
            in turn; beside `config.layers` any name.
        config: the shape.
        vocab_size: tokens.

    Raises:
        ValueError: no such mechanism, or fields that do not fit together.
    """
    modules = [row.module(**arguments) for row, arguments in config.layer_arguments(mechanism)]
    return create_smollm_with_attention(
        [modules[index % len(modules)] for index in range(config.num_layers)],
        vocab_size=vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        ffn_hidden_dim=config.ffn_hidden_dim,
        max_seq_len=config.max_seq_len,
        dropout=config.dropout,
        use_bias=config.bias,
        tie_embeddings=config.tie_embeddings,
        norm_strategy=config.norm_strategy,
        norm_eps=config.norm_eps,
    )
