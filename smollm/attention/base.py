"""What every mechanism shares: padding, positions, what follows the heads, initialisation."""

from typing import Literal, get_args

from torch import Tensor, nn

from kernels import check_cu_seqlens
from smollm.attention.cache import LayerCache
from smollm.attention.decay import KeyDecay
from smollm.attention.exclusive import exclude_own_value
from smollm.attention.gate import HeadGate
from smollm.attention.layers import dropout_layer, initialise
from smollm.attention.options import Decay, OutputGate
from smollm.attention.padding import packing
from smollm.attention.rope import Rope, Rotation, token_positions
from smollm.attention.scaling import Llama3Scaling

Bias = bool | Literal["qkv"]


class Attention(nn.Module):
    """What every mechanism shares: padding, positions, what follows the heads, initialisation.

    A mechanism implements `heads`. A SmolLM calls `forward` with the tables of the module's
    `rotation`, made once for all layers that share it; alone, a module makes its own.
    """

    out_proj: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None,
        dropout: float,
        window_size: int | None,
        is_causal: bool,
        rope_dim: int | None,
        rope_theta: float,
        rope_scaling: Llama3Scaling | None,
        value_dim: int | None = None,
        decay: Decay = "none",
        exclusive: bool,
        output_gate: OutputGate,
    ) -> None:
        super().__init__()
        if head_dim is None:
            check_divides("num_heads", num_heads, "embed_dim", embed_dim)
            head_dim = embed_dim // num_heads
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected >= 1, got {size}")
        if window_size is not None and (
            isinstance(window_size, bool) or not isinstance(window_size, int)
        ):
            raise TypeError(f"window_size: expected an integer or None, got {window_size!r}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size: expected >= 1 (it counts itself), got {window_size}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        width = head_dim if rope_dim is None else rope_dim
        self.rotation = Rotation(width, rope_theta, rope_scaling)
        self.window_size = window_size
        self.is_causal = is_causal
        self.dropout = dropout_layer(dropout)
        check_one_of("decay", decay, Decay)
        self.decay = None if decay == "none" else KeyDecay(decay, embed_dim, num_heads)
        self.exclusive = exclusive
        check_one_of("output_gate", output_gate, OutputGate)
        self.gate: HeadGate | None = None
        if output_gate != "none":
            self.gate = HeadGate(output_gate, embed_dim, num_heads, value_dim or head_dim)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rope: Rope | None = None,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, T, embed_dim].
            attention_mask: [B, T], True at real tokens, padding at the ends. Default none.
            rope: `rotation`'s tables of the tokens' positions. Default: counted from each start.
            cu_seqlens: int32 [N+1], offsets of N sequences packed into B = 1.
            cache: this layer's cache; with it x continues the sequences that it holds.

        Returns:
            [B, T, embed_dim]; zeros at padding.

        Raises:
            ValueError, TypeError: wrong shapes, a mask that is not padding at the ends, or decay in
                a module that is not causal.
            RuntimeError: such a mask in a compiled graph, as it runs.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected [B, T, embed_dim={self.embed_dim}], got {list(x.shape)}")
        if attention_mask is not None:
            if rope is not None or cu_seqlens is not None or cache is not None:
                raise ValueError("attention_mask: expected None beside rope, cu_seqlens or cache")
            packed = packing(attention_mask, x.shape[0], x.shape[1])
            if packed is not None:
                return packed.unpack(self(packed.pack(x), cu_seqlens=packed.cu_seqlens))
        if self.decay is not None and not self.is_causal:
            raise ValueError(
                "decay: expected 'none' in a module that sees both ways, got "
                f"{self.decay.kind!r} without is_causal"
            )
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x.device)
        if rope is None:
            if cache is not None:
                raise ValueError("rope: expected the tables of the tokens' positions, got None")
            positions = token_positions(x.shape[1], cu_seqlens, device=x.device)
            rope = self.rotation.tables(positions)
        o, v = self.heads(x, rope, cu_seqlens, cache)
        if self.exclusive:
            assert v is not None
            o = exclude_own_value(o, v)
        if self.gate is not None:
            o = self.gate(o, x)
        return self.dropout(self.out_proj(o.flatten(-2)))

    def heads(
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Each head's output [B, T, H, D_V], and the tokens' own values [B, T, HV, D_V].

        The latter may be None of a module that is not exclusive.
        """
        raise NotImplementedError

    def score_and_value_width(self) -> int:
        """Multiply-adds per query-key pair: H (D_QK + D_V)."""
        return 2 * self.num_heads * self.head_dim

    def reset_parameters(self, seed: int | None = None) -> None:
        """See `initialise`."""
        initialise(self, self.embed_dim, seed)

    def reset_constants(self) -> None:
        """Give parameters that are neither projections nor norms their start; there are none."""


def checked_window(use_sliding_window: bool, window_size: int | None) -> int | None:
    """window_size, which must be given with use_sliding_window and only then."""
    if use_sliding_window and window_size is None:
        raise ValueError("window_size: expected an integer with use_sliding_window, got None")
    if not use_sliding_window and window_size is not None:
        raise ValueError(
            f"window_size: expected None without use_sliding_window, got {window_size}"
        )
    return window_size


def checked_bias(bias: Bias) -> tuple[bool, bool]:
    """Whether the projections to heads have biases, and whether the output projection has."""
    if bias not in (False, True, "qkv"):
        raise ValueError(f"bias: expected False, True or 'qkv', got {bias!r}")
    return bool(bias), bias is True


def check_one_of(name: str, value: object, kinds: object) -> None:
    """Refuse what is none of a Literal's."""
    if value not in get_args(kinds):
        raise ValueError(f"{name}: expected one of {get_args(kinds)}, got {value!r}")


def check_divides(name: str, part: int, whole_name: str, whole: int) -> None:
    """Refuse a part that does not divide the whole."""
    if part < 1 or whole % part:
        raise ValueError(f"{name}: expected a divisor of {whole_name}={whole}, got {part}")
