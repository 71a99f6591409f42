"""Options as flags: a field is one of train.py's, its docstring the help, its `Range` checked."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

INF = float("inf")
LARGEST = 10**9  # below the kernels' bound on positions and windows, 2**30
WIDEST = 10**6  # a weight of WIDEST x WIDEST can be described, if not allocated


class Range(NamedTuple):
    """An interval; each end belongs to it ("[", "]") or not ("(", ")")."""

    low: float
    high: float
    ends: str = "[]"

    def holds(self, value: float) -> bool:
        """Whether the value lies inside; nan never does."""
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return above and below

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


def ranges(options: type) -> dict[str, Range]:
    """The range of each field of a dataclass that has one; None lies in any."""
    hints = get_type_hints(options, include_extras=True).items()
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints}
    return {name: r for name, extras in found.items() for r in extras if isinstance(r, Range)}


@dataclass(frozen=True)
class SharedOptions:
    """What a model tells every mechanism; each field is a flag of train.py."""

    embed_dim: Annotated[int, Range(1, WIDEST)] = 576
    """Model width."""
    num_heads: Annotated[int, Range(1, WIDEST)] = 9
    """(Query) heads of every mechanism."""
    window_size: Annotated[int | None, Range(1, LARGEST)] = None
    """Tokens in the sliding window of a mechanism that has none of its own; full attention by
    default."""
    qk_norm: Literal["none", "layer", "rms"] = "none"
    """Normalise the queries and keys of a mechanism that has them, per head ("layer" or "rms")."""
    rope_theta: Annotated[float, Range(1, 1e30)] = 100_000.0
    """Base of the rotary embedding."""
    bias: bool = False
    """Biases in attention and MLP."""
    dropout: Annotated[float, Range(0, 1, "[)")] = 0.0
    """Dropout on embeddings and branch outputs."""


@dataclass(frozen=True)
class Options:
    """The options that are a mechanism's own, by default none.

    Each field is a flag of train.py, so no two mechanisms have one of the same name.
    """

    def arguments(self, shared: SharedOptions) -> dict[str, Any]:
        """The module's keyword arguments; own fields by their own names.

        Raises:
            ValueError: a shared option that the mechanism lacks.
        """
        return {
            "embed_dim": shared.embed_dim,
            "num_heads": shared.num_heads,
            "use_sliding_window": shared.window_size is not None,
            "window_size": shared.window_size,
            "qk_norm": {"none": False, "layer": True, "rms": "rms"}[shared.qk_norm],
            "rope_theta": shared.rope_theta,
            "bias": shared.bias,
            "dropout": shared.dropout,
            "is_causal": True,
            **vars(self),
        }
