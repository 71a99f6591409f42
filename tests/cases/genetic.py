"""Cases of MGA: `kernels.genetic_attention`, and its decoding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smollm.attention.rope import Rotation, token_positions

from .attention import AttentionCase
from .decode import DecodeCase
from .tensors import random_tensor, sequence_offsets


@dataclass(frozen=True)
class GeneticCase:
    """Shapes and arguments of one call of `kernels.genetic_attention`."""

    name: str
    batch: int = 1
    tokens: int = 33
    heads: int = 3
    v_heads: int | None = None  # heads unless given
    width: int = 64
    v_width: int | None = None  # width unless given
    window_size: int = 20
    environment: str = "query"
    rotary: bool = True
    pressure: float = 1.0  # the least one
    lengths: tuple[int, ...] | None = None  # packed sequences
    contiguous: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """What the op takes beside tensors."""
        return {"window_size": self.window_size, "environment": self.environment}

    @property
    def selection(self) -> AttentionCase:
        """The attention over the q and k that it forms."""
        return AttentionCase(
            self.name,
            self.batch,
            self.tokens,
            q_heads=self.heads,
            k_heads=self.heads,
            v_heads=self.v_heads,
            width=self.width,
            v_width=self.v_width,
            window_size=self.window_size,
            scale=1.0,
        )

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
        """Fresh random tensors by argument name, but for the tables of `rope`."""
        v_heads = self.heads if self.v_heads is None else self.v_heads
        v_width = self.width if self.v_width is None else self.v_width
        tokens, how = (self.batch, self.tokens), (dtype, device, self.contiguous)
        genes = (*tokens, self.heads, self.width)
        return {
            "g": random_tensor(genes, *how),
            "e": random_tensor(genes, *how) if self.environment == "query" else None,
            "v": random_tensor((*tokens, v_heads, v_width), *how),
            "selection_pressure": self.pressure + 4 * torch.rand(self.heads).to(device),
            "cu_seqlens": sequence_offsets(self.lengths, device),
        }

    def rope(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of each token's place in its own sequence; no gradient reaches them."""
        if not self.rotary:
            return None
        offsets = sequence_offsets(self.lengths, device)
        positions = token_positions(self.tokens, offsets, device=torch.device(device))
        cos, sin = Rotation(self.width, theta=100_000.0).tables(positions)
        if self.contiguous:
            return cos, sin
        joined = torch.cat((cos, sin), dim=-1)
        return joined[:, : self.width // 2], joined[:, self.width // 2 :]


GENETIC_CASES = [
    GeneticCase("smollm", tokens=48, heads=9, window_size=32),
    *(GeneticCase(f"tokens-{t}", tokens=t, width=32) for t in (1, 15, 16, 17, 63, 65, 127, 129)),
    GeneticCase("window-1", tokens=65, width=32, window_size=1),
    GeneticCase("window-in-block", tokens=129, heads=1, width=32, window_size=7),
    *(
        GeneticCase(f"window-{w}", tokens=150, heads=1, width=32, window_size=w)
        for w in (32, 63, 64, 65, 75, 128)
    ),
    GeneticCase("window-across-blocks", tokens=200, heads=1, width=32, window_size=100),
    GeneticCase("window-is-T", tokens=65, width=32, window_size=65),
    GeneticCase("window-over-T", tokens=65, width=32, window_size=1000),
    *(GeneticCase(f"width-{d}", width=d, rotary=False) for d in (1, 5, 65)),
    *(GeneticCase(f"width-{d}", width=d) for d in (2, 6, 16, 40, 96, 128, 256)),
    GeneticCase("width-64-v-16", v_width=16),
    GeneticCase("width-64-v-5", v_width=5, rotary=False),
    GeneticCase("width-32-v-80", width=32, v_width=80),
    GeneticCase("value-heads-9-3", tokens=40, heads=9, v_heads=3, width=16),
    GeneticCase("value-heads-6-1", tokens=40, heads=6, v_heads=1, width=16),
    *(
        GeneticCase(
            f"{environment}{'' if rotary else '-plain'}",
            tokens=70,
            width=32,
            environment=environment,
            rotary=rotary,
        )
        for environment in ("query", "kin", "none")
        for rotary in (True, False)
    ),
    GeneticCase("kin-sharp", tokens=129, window_size=70, environment="kin", pressure=8.0),
    GeneticCase("kin-window-over-T", width=32, window_size=50, environment="kin"),
    GeneticCase("packed", tokens=150, heads=2, width=32, lengths=(70, 1, 0, 79)),
    GeneticCase(
        "packed-kin", tokens=90, width=32, window_size=16, environment="kin", lengths=(33, 57)
    ),
    GeneticCase(
        "packed-none", tokens=90, width=32, environment="none", rotary=False, lengths=(0, 40, 50)
    ),
    GeneticCase(
        "packed-window-over-some",
        tokens=150,
        heads=2,
        width=16,
        window_size=60,
        lengths=(70, 30, 1, 49),
    ),
    GeneticCase(
        "packed-at-blocks",
        tokens=150,
        heads=2,
        width=16,
        window_size=24,
        lengths=(16, 16, 32, 64, 22),
    ),
    GeneticCase(
        "packed-in-windows", tokens=150, heads=2, width=16, window_size=64, lengths=(64, 64, 22)
    ),
    GeneticCase("packed-one", tokens=65, width=32, lengths=(65,)),
    GeneticCase("batch", batch=3, tokens=40, heads=2, width=16),
    GeneticCase("strided", batch=2, tokens=40, width=32, contiguous=False),
    GeneticCase(
        "strided-values", tokens=40, heads=6, v_heads=2, width=16, v_width=24, contiguous=False
    ),
    # Many heads: the tolerance compares root mean squares, and the selection pressure's gradient
    # has one element a head.
    GeneticCase("pressure", tokens=20, heads=32, v_heads=8, width=16, window_size=15),
    GeneticCase("pressure-window-1", tokens=17, heads=16, width=16, window_size=1),
    GeneticCase(
        "pressure-packed",
        tokens=48,
        heads=32,
        width=16,
        environment="kin",
        rotary=False,
        lengths=(34, 1, 13),
    ),
]


@dataclass(frozen=True)
class GeneticDecodeCase(DecodeCase):
    """Shapes and arguments of one call of `kernels.genetic_decode`, of q_heads heads."""

    environment: str = "query"
    rotary: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """What the op takes beside tensors."""
        return {"window_size": self.window_size, "environment": self.environment}

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
        """Fresh random tensors by argument name, but for the rotary `tables`."""
        batch, heads, how = len(self.lengths), self.q_heads, (dtype, device, self.contiguous)
        genes = batch, self.q_tokens or 1, heads, self.width
        ring = batch, self.rows, heads, self.width
        v_heads = heads if self.v_heads is None else self.v_heads
        v_width = self.width if self.v_width is None else self.v_width
        return {
            "g": random_tensor(genes, *how),
            "e": random_tensor(genes, *how) if self.environment == "query" else None,
            "selection_pressure": 1 + 4 * torch.rand(heads).to(device),
            "g_cache": 3 * random_tensor(ring, *how),
            "k_cache": random_tensor(ring, *how),
            "v_cache": random_tensor((batch, self.rows, v_heads, v_width), *how),
            "cache_lengths": torch.tensor(self.lengths, dtype=torch.int32, device=device),
        }

    def tables(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of each new token's place in its sequence."""
        if not self.rotary:
            return None
        tokens = self.q_tokens or 1
        ends = torch.tensor(self.lengths, device=device)[:, None]
        positions = ends - tokens + torch.arange(tokens, device=device)
        return Rotation(self.width, theta=100_000.0).tables(positions)


GENETIC_DECODE_CASES = [
    GeneticDecodeCase("smollm", (97, 32, 1, 0), 32, q_heads=9, v_heads=3, window_size=32),
    GeneticDecodeCase("window-1", (50, 1, 0), width=16, window_size=1),
    GeneticDecodeCase("window-in-ring", (70, 129, 3, 0), 50, width=32, window_size=20),
    GeneticDecodeCase("window-over-S", (30, 64, 100), width=16, window_size=1000),
    GeneticDecodeCase("window-over-tiles", (700, 40, 301), 300, width=64, window_size=290),
    GeneticDecodeCase("ring-late", (2**30, 2**30 - 7), 50, width=16, window_size=20),
    GeneticDecodeCase("ring-of-one-row", (1, 9), 1, width=16, window_size=4),
    *(
        GeneticDecodeCase(f"tokens-{t}", (100, t, 3, 0), 64, t, q_heads=1, width=16, window_size=45)
        for t in (2, 5, 16)
    ),
    GeneticDecodeCase(
        "tokens-ring-too-small", (40, 17), 16, 20, q_heads=1, width=16, window_size=10
    ),
    *(
        GeneticDecodeCase(
            f"{environment}-plain", width=32, window_size=20, environment=environment, rotary=False
        )
        for environment in ("query", "kin", "none")
    ),
    GeneticDecodeCase("kin", (70, 3), q_tokens=3, width=32, window_size=20, environment="kin"),
    GeneticDecodeCase("none", (70, 3), q_tokens=3, width=32, window_size=20, environment="none"),
    *(GeneticDecodeCase(f"width-{d}", width=d, window_size=9, rotary=False) for d in (1, 5)),
    *(GeneticDecodeCase(f"width-{d}", width=d, window_size=9) for d in (2, 6, 40, 96, 128, 256)),
    GeneticDecodeCase("width-32-v-80", width=32, v_width=80, window_size=9),
    GeneticDecodeCase("strided", (50, 64), q_tokens=2, window_size=20, contiguous=False),
]
