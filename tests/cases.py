"""Named attention cases, shared by the tests and the benchmarks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smollm.attention.rope import Rotation, token_positions


def _random(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, contiguous: bool = True
) -> Tensor:
    """Normal numbers; unless contiguous, heads before tokens and a gap behind every row."""
    if contiguous:
        return torch.randn(shape, device=device).to(dtype)
    *outer, tokens, heads, width = shape
    x = torch.randn(*outer, heads, tokens, width + 16, device=device).to(dtype)
    return x[..., :width].transpose(-3, -2)


def _random_parts(
    shape: tuple[int, ...],
    widths: list[int],
    dtype: torch.dtype,
    device: str,
    contiguous: bool,
) -> list[Tensor]:
    """Two random tensors; unless contiguous, slices of one, as a projection's output is split."""
    joined = torch.randn(*shape, sum(widths), device=device).to(dtype)
    return [x.contiguous() if contiguous else x for x in torch.split(joined, widths, dim=-1)]


def _key_bias(
    of: float | None, tokens: int, heads: int, batch: int, dtype: torch.dtype, device: str
) -> Tensor | None:
    """Normal numbers beside a slope; fp64 from `of` on, where fp32 has no digits for them."""
    if of is None:
        return None
    position = of + torch.arange(tokens, dtype=torch.float64, device=device)[:, None]
    slope = 0.3 / (1 + torch.arange(heads, device=device))
    bias = position * slope + torch.randn(batch, tokens, heads, device=device)
    return bias if of else bias.to(torch.promote_types(dtype, torch.float32))


def _offsets(lengths: tuple[int, ...] | None, device: str) -> Tensor | None:
    if lengths is None:
        return None
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


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
            return _random(shape, dtype, device, self.contiguous)

        return {
            "q": draw(self.batch, self.q_tokens, self.q_heads, self.width),
            "k": draw(self.batch, k_tokens, self.k_heads, self.width),
            "v": draw(self.batch, k_tokens, v_heads, self.d_v),
            "cu_seqlens": _offsets(self.lengths, device),
            "sinks": torch.randn(self.q_heads, device=device) if self.sinks else None,
            "key_bias": _key_bias(self.bias, k_tokens, self.q_heads, self.batch, dtype, device),
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
    AttentionCase("packed-bidirectional", q_tokens=150, lengths=(70, 1, 79), causal=False),
    AttentionCase("packed-one", q_tokens=65, lengths=(65,)),
    AttentionCase("fewer-queries", q_tokens=33, k_tokens=130),
    AttentionCase("fewer-queries-window", q_tokens=33, k_tokens=130, window_size=40),
    AttentionCase("one-query", q_tokens=1, k_tokens=100),
    AttentionCase("rows-without-keys", q_tokens=80, k_tokens=30),
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
    AttentionCase("bias", q_tokens=140, q_heads=6, k_heads=2, width=16, bias=0.0),
    AttentionCase("bias-late", batch=2, q_tokens=65, window_size=40, bias=131_072.0),
    AttentionCase("bias-packed", q_tokens=150, lengths=(70, 1, 0, 79), bias=0.0),
    AttentionCase("bias-fewer-queries", q_tokens=33, k_tokens=130, window_size=40, bias=0.0),
    AttentionCase("bias-rows-without-keys", q_tokens=80, k_tokens=30, bias=0.0),
    AttentionCase("bias-bidirectional", q_tokens=65, causal=False, bias=0.0),
    AttentionCase(
        "bias-value-heads", q_tokens=40, q_heads=8, k_heads=4, v_heads=2, width=24, bias=0.0
    ),
    AttentionCase("bias-sinks", q_tokens=33, q_heads=32, k_heads=8, width=16, sinks=True, bias=0.0),
]


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
        q_nope, q_rope = _random_parts((*tokens, self.heads), [self.nope, self.rope], *how)
        k_nope, v = _random_parts((*tokens, self.heads), [self.nope, self.v_width], *how)
        _latent, k_rope = _random_parts(tokens, [16, self.rope], *how)
        return {
            "q_nope": q_nope,
            "q_rope": q_rope if self.rope else None,
            "k_nope": k_nope,
            "k_rope": k_rope if self.rope else None,
            "v": v,
            "cu_seqlens": _offsets(self.lengths, device),
            "key_bias": _key_bias(self.bias, self.tokens, self.heads, self.batch, dtype, device),
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
    LatentCase("bias", tokens=70, nope=32, rope=16, window_size=40, bias=0.0),
]


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
        bias = _key_bias(self.bias, self.rows, self.q_heads, batch, dtype, device)
        if self.latent:
            widths = [self.width, self.rope]
            q_latent, q_rope = _random_parts((*tokens, self.q_heads), widths, *how)
            latent_cache, rope_cache = _random_parts((batch, self.rows), widths, *how)
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
            "q": _random((*tokens, self.q_heads, self.width), *how),
            "k_cache": _random((batch, self.rows, self.k_heads, self.width), *how),
            "v_cache": _random((batch, self.rows, v_heads, v_width), *how),
            "cache_lengths": lengths,
            "sinks": torch.randn(self.q_heads, device=device) if self.sinks else None,
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
            "g": _random(genes, *how),
            "e": _random(genes, *how) if self.environment == "query" else None,
            "v": _random((*tokens, v_heads, v_width), *how),
            "selection_pressure": 1 + 4 * torch.rand(self.heads, device=device),
            "cu_seqlens": _offsets(self.lengths, device),
        }

    def rope(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of each token's place in its own sequence; no gradient reaches them."""
        if not self.rotary:
            return None
        offsets = _offsets(self.lengths, device)
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
            "g": _random(genes, *how),
            "e": _random(genes, *how) if self.environment == "query" else None,
            "selection_pressure": 1 + 4 * torch.rand(heads, device=device),
            "g_cache": 3 * _random(ring, *how),
            "k_cache": _random(ring, *how),
            "v_cache": _random((batch, self.rows, v_heads, v_width), *how),
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
