"""Cases of `kernels.attention`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tensors import draw_bias, normal, random_tensor, sequence_offsets


@dataclass(frozen=True)
class AttentionCase:
    """Shapes and arguments of one call of `kernels.attention`."""

    name: str
    batch: int = 1
    q_tokens: int = 64
    k_tokens: int | None = None  # q_tokens unless given
    q_heads: int = 3
    k_heads: int = 1
    v_heads: int | None = None  # k_heads unless given
    width: int = 64
    v_width: int | None = None  # width unless given
    causal: bool = True
    window_size: int | None = None
    scale: float | None = None
    lengths: tuple[int, ...] | None = None  # packed sequences
    sinks: bool = False
    bias: float | None = None  # of keys, from this position on
    contiguous: bool = True

    @property
    def d_v(self) -> int:
        """The values' width."""
        return self.width if self.v_width is None else self.v_width

    @property
    def arguments(self) -> dict[str, Any]:
        """What the op takes beside tensors."""
        return {"causal": self.causal, "window_size": self.window_size, "scale": self.scale}

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
        """Fresh random tensors by argument name."""
        k_tokens = self.q_tokens if self.k_tokens is None else self.k_tokens
        v_heads = self.k_heads if self.v_heads is None else self.v_heads

        def draw(*shape: int) -> Tensor:
            return random_tensor(shape, dtype, device, self.contiguous)

        return {
            "q": draw(self.batch, self.q_tokens, self.q_heads, self.width),
            "k": draw(self.batch, k_tokens, self.k_heads, self.width),
            "v": draw(self.batch, k_tokens, v_heads, self.d_v),
            "cu_seqlens": sequence_offsets(self.lengths, device),
            "sinks": normal(self.q_heads, device=device) if self.sinks else None,
            "key_bias": draw_bias(self.bias, k_tokens, self.q_heads, self.batch, dtype, device),
        }


ATTENTION_CASES = [
    AttentionCase("smollm", batch=2, q_tokens=97, q_heads=9, k_heads=3),
    *(AttentionCase(f"tokens-{t}", q_tokens=t) for t in (1, 15, 16, 17, 63, 65, 127, 129)),
    AttentionCase("window-1", q_tokens=65, window_size=1),
    AttentionCase("window-in-block", q_tokens=129, window_size=7),
    AttentionCase("window-across-blocks", q_tokens=193, q_heads=2, window_size=100),
    AttentionCase("window-is-T", q_tokens=65, window_size=65),
    AttentionCase("window-over-T", q_tokens=65, window_size=1000),
    AttentionCase("width-16", width=16, q_tokens=33),
    AttentionCase("width-40", width=40, q_tokens=65),
    AttentionCase("width-96", width=96, q_tokens=65),
    AttentionCase("width-128", width=128, q_tokens=65),
    AttentionCase("width-256", width=256, q_tokens=33),
    AttentionCase("width-1", batch=16, width=1, q_tokens=33),  # few elements make no RMS
    AttentionCase("width-qk-96-v-64", width=96, v_width=64, q_tokens=65, q_heads=4, k_heads=4),
    AttentionCase("width-qk-32-v-80", width=32, v_width=80, q_tokens=65),
    AttentionCase("heads-9-9", q_heads=9, k_heads=9, q_tokens=65),
    AttentionCase("heads-9-1", q_heads=9, k_heads=1, q_tokens=65),
    AttentionCase("heads-6-2", q_heads=6, k_heads=2, q_tokens=65),
    AttentionCase("heads-32-8", q_heads=32, k_heads=8, q_tokens=17, width=16),
    AttentionCase("value-heads-6-6-2", q_heads=6, k_heads=6, v_heads=2, q_tokens=65),
    AttentionCase("value-heads-8-4-2", q_heads=8, k_heads=4, v_heads=2, q_tokens=40),
    AttentionCase("packed", q_tokens=150, lengths=(70, 1, 16, 63)),
    AttentionCase("packed-window", q_tokens=150, lengths=(70, 1, 0, 79), window_size=20),
    AttentionCase("packed-bidirectional", q_tokens=150, lengths=(56, 56, 1, 37), causal=False),
    AttentionCase("packed-one", q_tokens=65, lengths=(65,)),
    AttentionCase("fewer-queries", q_tokens=33, k_tokens=130),
    AttentionCase("fewer-queries-window", q_tokens=33, k_tokens=130, window_size=40),
    AttentionCase("one-query", q_tokens=1, k_tokens=100),
    AttentionCase("rows-without-keys", q_tokens=80, k_tokens=30),
    AttentionCase("tiles-without-queries", q_tokens=70, k_tokens=200, q_heads=1, window_size=30),
    AttentionCase("rows-without-keys-window", q_tokens=80, k_tokens=30, window_size=4),
    AttentionCase("bidirectional", q_tokens=65, causal=False),
    AttentionCase("bidirectional-cross", q_tokens=65, k_tokens=40, causal=False),
    AttentionCase("strided", batch=2, q_tokens=40, q_heads=6, k_heads=2, contiguous=False),
    # Many heads: the tolerance compares root mean squares, and dsinks has one element a head.
    AttentionCase("sinks", q_tokens=33, q_heads=32, k_heads=8, width=16, sinks=True),
    AttentionCase(
        "sinks-window", q_tokens=40, q_heads=32, k_heads=8, width=16, sinks=True, window_size=15
    ),
    AttentionCase(
        "sinks-rows-without-keys", q_tokens=30, k_tokens=20, q_heads=32, width=16, sinks=True
    ),
    AttentionCase("scale", q_tokens=65, scale=0.3),
    # Few keys take most of a row, so that an error of its delta is most of its gradients' errors.
    AttentionCase("sharp", q_tokens=129, scale=1.0),
    AttentionCase(
        "sharp-sinks", q_tokens=65, q_heads=32, k_heads=8, width=32, scale=0.5, sinks=True
    ),
    AttentionCase("sharp-bias", q_tokens=129, scale=1.0, bias=0.0),
    AttentionCase("bias", q_tokens=140, q_heads=6, k_heads=2, width=16, bias=0.0),
    AttentionCase("bias-late", batch=2, q_tokens=65, window_size=40, bias=131_072.0),
    # The last tiles that these bring to a GPU's shared memory lie where its results pass.
    AttentionCase("bias-one-head", q_tokens=40, q_heads=1, bias=0.0),
    AttentionCase("bias-late-one-head", q_tokens=80, q_heads=1, window_size=79, bias=131_072.0),
    AttentionCase("bias-packed", q_tokens=150, lengths=(70, 1, 0, 79), bias=0.0),
    AttentionCase("bias-fewer-queries", q_tokens=33, k_tokens=130, window_size=40, bias=0.0),
    AttentionCase("bias-rows-without-keys", q_tokens=80, k_tokens=30, bias=0.0),
    AttentionCase("bias-bidirectional", q_tokens=65, causal=False, bias=0.0),
    AttentionCase(
        "bias-value-heads", q_tokens=40, q_heads=8, k_heads=4, v_heads=2, width=24, bias=0.0
    ),
    AttentionCase("bias-sinks", q_tokens=33, q_heads=32, k_heads=8, width=16, sinks=True, bias=0.0),
]
