"""The shape of a model with any mechanism, as flags; needs no PyTorch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self

from smollm.attention import MECHANISMS, Options, SharedOptions
from smollm.attention.options import LARGEST, WIDEST, Range

NormStrategy = Literal["pre", "post", "sandwich"]


@dataclass(frozen=True)
class ModelConfig(SharedOptions):
    """Shape of the models; each field, those of the mechanisms included, is a flag of train.py."""

    num_layers: Annotated[int, Range(1, WIDEST)] = 4
    """Transformer blocks."""
    norm_strategy: NormStrategy = "pre"
    """Where a block's norms stand: before a branch, after it, or both."""
    ffn_hidden_dim: Annotated[int, Range(1, WIDEST)] = 1536
    """Inner width of the SwiGLU."""
    max_seq_len: Annotated[int, Range(2, LARGEST)] = 2048
    """Longest sequence that the model accepts."""
    tie_embeddings: bool = True
    """The output head shares the embedding's weights."""
    mechanisms: Mapping[str, Options] = field(
        default_factory=lambda: {name: row.options() for name, row in MECHANISMS.items()}
    )

    @classmethod
    def of(cls, **flags: Any) -> Self:
        """The config with these fields, the mechanisms' among them, by name.

        Raises:
            TypeError: there is no such field.
        """
        mechanisms = {}
        for name, options in cls().mechanisms.items():
            own = {f.name: flags.pop(f.name) for f in fields(options) if f.name in flags}
            mechanisms[name] = replace(options, **own)
        return cls(**flags, mechanisms=mechanisms)

    @property
    def flags(self) -> dict[str, Any]:
        """All fields by name, plain values; `of` takes them back."""
        plain = asdict(self)
        for own in plain.pop("mechanisms").values():
            plain |= own
        return plain
