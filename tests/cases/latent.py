"""Cases of `kernels.latent_attention`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionCase
from .tensors import draw_bias, random_parts, sequence_offsets


@dataclass(frozen=True)
class LatentCase:
    """Shapes and arguments of one call of `kernels.latent_attention`."""

    name: str
    batch: int = 1
    tokens: int = 33
    heads: int = 2
    nope: int = 64
    rope: int = 32  # 0 leaves the rotated pair out
    v_width: int = 64
    causal: bool = True
    window_size: int | None = None
    scale: float | None = None
    lengths: tuple[int, ...] | None = None  # packed sequences
    bias: float | None = None  # of keys, from this position on
    contiguous: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """What the op takes beside tensors."""
        return {"causal": self.causal, "window_size": self.window_size, "scale": self.scale}

    @property
    def joined(self) -> AttentionCase:
        """The same as plain attention, with the rope key copied to every head."""
        return AttentionCase(
            self.name,
            self.batch,
            self.tokens,
            q_heads=self.heads,
            k_heads=self.heads,
            width=self.nope + self.rope,
            v_width=self.v_width,
            causal=self.causal,
            window_size=self.window_size,
            scale=self.scale,
            lengths=self.lengths,
        )

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
        """Fresh random tensors by argument name."""
        tokens, how = (self.batch, self.tokens), (dtype, device, self.contiguous)
        q_nope, q_rope = random_parts((*tokens, self.heads), [self.nope, self.rope], *how)
        k_nope, v = random_parts((*tokens, self.heads), [self.nope, self.v_width], *how)
        _latent, k_rope = random_parts(tokens, [16, self.rope], *how)
        return {
            "q_nope": q_nope,
            "q_rope": q_rope if self.rope else None,
            "k_nope": k_nope,
            "k_rope": k_rope if self.rope else None,
            "v": v,
            "cu_seqlens": sequence_offsets(self.lengths, device),
            "key_bias": draw_bias(self.bias, self.tokens, self.heads, self.batch, dtype, device),
        }


LATENT_CASES = [
    LatentCase("smollm", tokens=40, heads=9),
    LatentCase("deepseek", tokens=20, nope=128, rope=64, v_width=128),
    LatentCase("rope-free", rope=0),
    LatentCase("widths-40-8-24", nope=40, rope=8, v_width=24),
    LatentCase("widths-16-64-16", nope=16, rope=64, v_width=16),
    *(LatentCase(f"tokens-{t}", tokens=t, nope=32, rope=16, v_width=32) for t in (1, 17, 65, 129)),
    LatentCase("window-1", nope=32, rope=16, window_size=1),
    LatentCase("window-in-block", tokens=65, nope=32, rope=16, window_size=7),
    LatentCase("window-across-blocks", tokens=140, nope=32, rope=16, v_width=32, window_size=75),
    LatentCase("packed", tokens=90, nope=32, rope=16, lengths=(16, 1, 73)),
    LatentCase(
        "packed-window", tokens=90, nope=32, rope=16, lengths=(70, 1, 0, 19), window_size=20
    ),
    LatentCase("bidirectional", tokens=40, nope=32, rope=16, causal=False),
    LatentCase("strided", batch=2, nope=32, rope=32, contiguous=False),
    LatentCase("strided-rope-free", nope=32, rope=0, v_width=48, contiguous=False),
    LatentCase("scale", nope=32, rope=16, scale=0.3),
    LatentCase("sharp", tokens=65, nope=32, rope=16, scale=1.0),
    # Where these windows and sequences begin and end, each comparison of a GPU's masks decides; and
    # in sharp rows one key too many or too few shows.
    LatentCase("sharp-window", tokens=245, nope=32, rope=16, v_width=32, window_size=43, scale=1.0),
    LatentCase(
        "sharp-bidirectional",
        tokens=260,
        nope=32,
        rope=16,
        v_width=32,
        causal=False,
        lengths=(10, 25, 29, 18, 46, 25, 39, 56, 12),
        scale=1.0,
    ),
    LatentCase(
        "sharp-one-token",
        tokens=150,
        nope=32,
        rope=16,
        v_width=32,
        causal=False,
        lengths=(56, 56, 1, 37),
        scale=1.0,
    ),
    LatentCase("bias", tokens=70, nope=32, rope=16, window_size=40, bias=0.0),
]
