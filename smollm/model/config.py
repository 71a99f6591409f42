"""The shape of a model with any mechanism, as flags; needs no PyTorch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self

from smollm.attention import MECHANISMS, Mechanism, Options, SharedOptions
from smollm.attention.options import LARGEST, WIDEST, Range

NormStrategy = Literal["pre", "post", "sandwich"]


@dataclass(frozen=True)
class ModelConfig(SharedOptions):
    """Shape of the models; each field, those of the mechanisms included, is a flag of train.py."""

    num_layers: Annotated[int, Range(1, WIDEST)] = 4
    """Transformer blocks."""
    layers: tuple[str, ...] = ()
    """Mechanisms of the layers in turn, again and again, for example mha mha mga; by default those
    that the variant is named after."""
    window_pattern: Annotated[tuple[int | Literal["full"], ...], Range(1, LARGEST)] = ()
    """Windows of the layers in turn, again and again, instead of one window_size for all; "full" is
    none."""
    nope_every: Annotated[int | None, Range(1, LARGEST)] = None
    """Of so many layers the last has no rotation (NoPE), 4 in SmolLM3; all rotate by default."""
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

    def layer_arguments(self, mechanism: str) -> list[tuple[Mechanism, dict[str, Any]]]:
        """The mechanism and the module's arguments of each layer, up to where they repeat.

        Args:
            mechanism: a name, or several joined by "+", which the layers have in turn; any name
                beside `layers`, which come first.

        Raises:
            ValueError: no such mechanism, or fields that do not fit together.
        """
        names = self.layers or mechanism.split("+")
        for name in names:
            if name not in MECHANISMS:
                field = "layers" if self.layers else "mechanism"
                raise ValueError(f"{field}: expected one of {list(MECHANISMS)}, got {name!r}")
        if self.window_pattern and self.window_size is not None:
            raise ValueError(
                f"window_size: expected None beside window_pattern, got {self.window_size}"
            )
        period = math.lcm(len(names), len(self.window_pattern) or 1, self.nope_every or 1)
        found = []
        for index in range(min(period, self.num_layers)):
            name, layer = names[index % len(names)], self._layer(index)
            found.append((MECHANISMS[name], layer.mechanisms[name].arguments(layer)))
        return found

    def _layer(self, index: int) -> Self:
        changes: dict[str, Any] = {}
        if self.window_pattern:
            window = self.window_pattern[index % len(self.window_pattern)]
            changes["window_size"] = None if window == "full" else window
        if self.nope_every is not None and (index + 1) % self.nope_every == 0:
            changes["rotary_fraction"] = 0.0
        return replace(self, **changes)

    @property
    def flags(self) -> dict[str, Any]:
        """All fields by name, plain values; `of` takes them back."""
        plain = asdict(self)
        for own in plain.pop("mechanisms").values():
            plain |= own
        return plain
