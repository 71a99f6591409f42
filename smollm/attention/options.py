"""Options as flags: a field is one of train.py's, its docstring the help, its `Range` checked."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from smollm.attention.scaling import Llama3Scaling

Decay = Literal["none", "alibi", "learned", "forget"]
OutputGate = Literal["none", "head", "element"]

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


def check_range(options: Any) -> None:
    """Refuse a dataclass of flags with a value outside its field's range.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    for name, allowed in ranges(type(options)).items():
        given = getattr(options, name)
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, int | float) and not allowed.holds(value):
                raise ValueError(f"{name}: expected in {allowed}, got {value}")


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
    head_dim: Annotated[int | None, Range(1, WIDEST)] = None
    """Width of a head; embed_dim / num_heads by default. MLA: of its part without rotation."""
    qk_norm: Literal["none", "layer", "rms", "rms-full"] = "none"
    """Normalise the queries and keys of a mechanism that has them, per head ("layer" or "rms") or
    all heads together ("rms-full")."""
    norm_eps: Annotated[float, Range(1e-30, 1)] = 1e-5
    """What every norm adds to a mean square or variance; those of MLA's latents add 1e-6."""
    rope_theta: Annotated[float, Range(1, 1e30)] = 100_000.0
    """Base of the rotary embedding."""
    rope_scaling: Annotated[tuple[float, float, float, float] | None, Range(0, INF, "()")] = None
    """Llama 3.1's scaling of rotary frequencies: factor, low_freq_factor, high_freq_factor and the
    positions of pre-training; none by default."""
    rotary_fraction: Annotated[float, Range(0, 1)] = 1.0
    """Part of a head's features that rotate, the first ones; MLA's rope_dim and MGA's genes rotate
    as a whole (1) or not at all (0)."""
    sinks: bool = False
    """A learned logit per head that joins the softmax, in MHA and GQA."""
    decay: Decay = "none"
    """Scores of MHA, GQA and MLA fall with distance: by ALiBi's slopes, by a rate that each head
    learns from there, or by gates of the tokens between ("forget")."""
    exclusive: bool = False
    """Take off a head's output its part along the token's own value (XSA)."""
    output_gate: OutputGate = "none"
    """Sigmoid gates, projected from the token, on the outputs of heads as a whole or on each of
    their features."""
    bias: bool = False
    """Biases in attention and MLP."""
    attention_bias: Literal["auto", "none", "qkv", "all"] = "auto"
    """Which projections of attention have biases; "auto": as bias says, "qkv": all but the
    output's."""
    dropout: Annotated[float, Range(0, 1, "[)")] = 0.0
    """Dropout on embeddings and branch outputs."""

    @property
    def rotates(self) -> bool:
        """Whether what a mechanism rotates as a whole rotates.

        Raises:
            ValueError: a part of it would.
        """
        if self.rotary_fraction not in (0, 1):
            raise ValueError(
                "rotary_fraction: expected 0 or 1 with mla and mga, which rotate as a whole, got "
                f"{self.rotary_fraction}; choose the others with --variants"
            )
        return self.rotary_fraction == 1

    @property
    def scaling(self) -> Llama3Scaling | None:
        """rope_scaling as modules take it."""
        return None if self.rope_scaling is None else Llama3Scaling(*self.rope_scaling)

    @property
    def biases(self) -> bool | Literal["qkv"]:
        """The attention's, as modules take them."""
        named: dict[str, bool | Literal["qkv"]] = {"none": False, "qkv": "qkv", "all": True}
        return named.get(self.attention_bias, self.bias)

    def refuse(self, mechanism: str, **lacking: str) -> None:
        """For a mechanism without some of these options, by name, each with the reason.

        Raises:
            ValueError: one of them is asked for.
        """
        for field in fields(SharedOptions):
            value = getattr(self, field.name)
            if field.name in lacking and value != field.default:
                raise ValueError(
                    f"{field.name}: expected {field.default!r} with {mechanism}, "
                    f"{lacking[field.name]}, got {value!r}; choose the others with --variants"
                )


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
            "head_dim": shared.head_dim,
            "qk_norm": {"none": False, "layer": True}.get(shared.qk_norm, shared.qk_norm),
            "norm_eps": shared.norm_eps,
            "rope_theta": shared.rope_theta,
            "rope_scaling": shared.scaling,
            "bias": shared.biases,
            "dropout": shared.dropout,
            "decay": shared.decay,
            "exclusive": shared.exclusive,
            "output_gate": shared.output_gate,
            "is_causal": True,
            **vars(self),
        }
