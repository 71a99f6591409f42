"""Cases of `kernels.attention_decode` and `kernels.latent_decode`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tensors import draw_bias, normal, random_parts, random_tensor


@dataclass(frozen=True)
class DecodeCase:
    """Shapes and arguments of one call of `kernels.attention_decode`, or of `latent_decode`."""

    name: str
    lengths: tuple[int, ...] = (50,)  # of each sequence so far, the newest token included
    rows: int = 64
    q_tokens: int | None = None  # None leaves the axis out
    q_heads: int = 3
    k_heads: int = 1
    v_heads: int | None = None  # k_heads unless given
    width: int = 64  # of the latent, if it is latent
    v_width: int | None = None  # width unless given
    latent: bool = False
    rope: int = 0  # latent alone; 0 leaves the rotated pair out
    window_size: int | None = None
    scale: float | None = None
    sinks: bool = False
    bias: float | None = None  # of the cache's rows, from this position on
    contiguous: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """What the op takes beside tensors."""
        scale = self.scale
        if scale is None and self.latent:  # required there
            scale = (self.width + self.rope) ** -0.5
        return {"window_size": self.window_size, "scale": scale}

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
        """Fresh random tensors by argument name."""
        batch, how = len(self.lengths), (dtype, device, self.contiguous)
        tokens = (batch,) if self.q_tokens is None else (batch, self.q_tokens)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        bias = draw_bias(self.bias, self.rows, self.q_heads, batch, dtype, device)
        if self.latent:
            widths = [self.width, self.rope]
            q_latent, q_rope = random_parts((*tokens, self.q_heads), widths, *how)
            latent_cache, rope_cache = random_parts((batch, self.rows), widths, *how)
            return {
                "q_latent": q_latent,
                "q_rope": q_rope if self.rope else None,
                "latent_cache": latent_cache,
                "rope_cache": rope_cache if self.rope else None,
                "cache_lengths": lengths,
                "key_bias": bias,
            }
        v_heads = self.k_heads if self.v_heads is None else self.v_heads
        v_width = self.width if self.v_width is None else self.v_width
        return {
            "q": random_tensor((*tokens, self.q_heads, self.width), *how),
            "k_cache": random_tensor((batch, self.rows, self.k_heads, self.width), *how),
            "v_cache": random_tensor((batch, self.rows, v_heads, v_width), *how),
            "cache_lengths": lengths,
            "sinks": normal(self.q_heads, device=device) if self.sinks else None,
            "key_bias": bias,
        }

    def seen_rows(self, sequence: int, token: int) -> set[int]:
        """Rows of a sequence's cache that one of its queries sees, position by position."""
        length = self.lengths[sequence]
        own = length - (self.q_tokens or 1) + token
        window = own + 1 if self.window_size is None else self.window_size
        cached = range(max(0, length - self.rows), length)
        return {p % self.rows for p in cached if own - window < p <= own}


DECODE_CASES = [
    DecodeCase("smollm", lengths=(97, 64, 1), rows=97, q_heads=9, k_heads=3),
    *(DecodeCase(f"rows-{s}", lengths=(s,), rows=s) for s in (1, 15, 17, 64, 65, 300, 1000)),
    DecodeCase("ragged", lengths=(0, 1, 65, 40, 64), rows=65),
    DecodeCase("splits", lengths=(4000, 0, 37), rows=4096, width=16, q_heads=2),
    DecodeCase("heads-9-9", q_heads=9, k_heads=9),
    DecodeCase("heads-9-1", q_heads=9),
    DecodeCase("heads-6-2", q_heads=6, k_heads=2),
    DecodeCase("heads-32-8", q_heads=32, k_heads=8, width=16),
    DecodeCase("value-heads-8-4-2", q_heads=8, k_heads=4, v_heads=2),
    DecodeCase("value-heads-6-6-2-tokens", q_tokens=3, q_heads=6, k_heads=6, v_heads=2),
    *(DecodeCase(f"width-{d}", width=d) for d in (1, 16, 40, 96, 128, 256)),
    DecodeCase("width-qk-96-v-64", width=96, v_width=64),
    DecodeCase("width-qk-32-v-80", width=32, v_width=80),
    DecodeCase("window-1", lengths=(50, 64, 1, 0), window_size=1),
    DecodeCase("window-in-block", lengths=(50, 3), window_size=7),
    DecodeCase("window-across-blocks", lengths=(193, 120, 64), rows=193, window_size=100),
    DecodeCase("window-is-S", lengths=(64, 30), window_size=64),
    DecodeCase("window-over-S", lengths=(64, 30), window_size=1000),
    DecodeCase("ring", lengths=(65, 100, 64, 1000, 3)),
    DecodeCase("ring-odd", lengths=(77, 51, 149), rows=50),
    DecodeCase("ring-window", lengths=(70, 129, 64, 30, 100), window_size=20),
    DecodeCase("ring-window-across-blocks", lengths=(200, 450, 299), rows=150, window_size=110),
    DecodeCase("ring-window-is-S", lengths=(100, 65, 10), rows=50, window_size=50),
    DecodeCase("ring-window-over-S", lengths=(100, 65, 10), rows=50, window_size=70),
    DecodeCase("ring-late", lengths=(2**30, 2**30 - 7), rows=50, window_size=20),
    DecodeCase("ring-of-one-row", lengths=(1, 9), rows=1),
    DecodeCase("tokens-1", q_tokens=1),
    DecodeCase("tokens-2", q_tokens=2, q_heads=9, k_heads=3),
    DecodeCase("tokens-5", lengths=(50, 5, 64), q_tokens=5),
    DecodeCase("tokens-40", lengths=(100, 40), rows=100, q_tokens=40, q_heads=9, k_heads=3),
    DecodeCase("tokens-before-the-first", lengths=(3, 0, 1, 6), q_tokens=5),
    DecodeCase("tokens-window", lengths=(130, 40, 7), rows=130, q_tokens=5, window_size=9),
    *(
        DecodeCase(f"tokens-{t}-window", (90, 20, t, 1), 90, t, width=16, window_size=50)
        for t in (2, 5, 16)
    ),
    DecodeCase("tokens-window-1", lengths=(50, 2), q_tokens=5, window_size=1),
    DecodeCase("tokens-ring", lengths=(100, 64, 66, 2), q_tokens=5),
    DecodeCase("tokens-ring-window", lengths=(100, 64, 66), q_tokens=5, window_size=40),
    DecodeCase("tokens-ring-too-small", lengths=(40, 17), rows=16, q_tokens=20, window_size=10),
    DecodeCase("sinks", lengths=(50, 0), q_heads=6, k_heads=2, sinks=True),
    DecodeCase("sinks-window", lengths=(193, 70), rows=193, window_size=100, sinks=True),
    DecodeCase("sinks-splits", lengths=(2000, 30), rows=2048, width=16, sinks=True),
    DecodeCase("sinks-ring-tokens", lengths=(100, 2), q_tokens=5, window_size=20, sinks=True),
    DecodeCase("strided", lengths=(50, 64), q_heads=6, k_heads=2, contiguous=False),
    DecodeCase("strided-tokens", lengths=(100, 4), q_tokens=5, k_heads=3, contiguous=False),
    DecodeCase("scale", scale=0.3),
    DecodeCase("bias", lengths=(50, 0, 64), q_heads=6, k_heads=2, bias=0.0),
    DecodeCase("bias-late", lengths=(50, 64), q_heads=9, k_heads=3, bias=131_072.0),
    DecodeCase("bias-splits", lengths=(2000, 30), rows=2048, width=16, sinks=True, bias=0.0),
    DecodeCase("bias-ring-tokens", (100, 2), q_tokens=5, q_heads=4, window_size=20, bias=0.0),
    DecodeCase("latent-bias", (100, 66), q_tokens=2, q_heads=4, rope=16, latent=True, bias=0.0),
    DecodeCase(
        "latent-288-32", lengths=(65, 17), rows=65, q_heads=9, width=288, rope=32, latent=True
    ),
    DecodeCase("latent-144-32", q_heads=9, width=144, rope=32, latent=True),
    DecodeCase("latent-432-32", q_heads=9, width=432, rope=32, latent=True),
    DecodeCase("latent-512-64", q_heads=4, width=512, rope=64, latent=True),
    DecodeCase("latent-40-8", width=40, rope=8, latent=True),
    DecodeCase("latent-rope-free", width=128, latent=True),
    DecodeCase("latent-heads-20", q_heads=20, rope=16, latent=True),
    DecodeCase("latent-heads-1", q_heads=1, rope=16, latent=True),
    DecodeCase("latent-ragged", lengths=(0, 1, 65, 40), rows=65, rope=16, latent=True),
    DecodeCase("latent-splits", lengths=(2000, 30), rows=2048, width=32, rope=16, latent=True),
    DecodeCase(
        "latent-window", lengths=(193, 64, 5), rows=193, rope=16, window_size=100, latent=True
    ),
    DecodeCase("latent-ring", lengths=(65, 100, 149, 3), rows=50, rope=16, latent=True),
    DecodeCase("latent-ring-window", lengths=(70, 129, 64), rope=16, window_size=20, latent=True),
    DecodeCase("latent-tokens-5", lengths=(50, 3), q_tokens=5, q_heads=9, rope=16, latent=True),
    DecodeCase("latent-tokens-40", lengths=(90,), rows=90, q_tokens=40, rope=16, latent=True),
    DecodeCase(
        "latent-tokens-ring-window",
        lengths=(100, 66, 2),
        q_tokens=5,
        rope=16,
        window_size=40,
        latent=True,
    ),
    DecodeCase("latent-strided", lengths=(50, 64), rope=16, latent=True, contiguous=False),
    DecodeCase(
        "latent-strided-tokens", q_tokens=3, rope=16, latent=True, contiguous=False, scale=0.2
    ),
]
