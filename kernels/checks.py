"""Every argument contract of the public ops, and the text of every refusal.

What tensors must have in common is checked by `kernels.tensors`.
"""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from kernels.core.problem import padded_width
from kernels.derivatives import ask_for_gradients
from kernels.tensors import (
    KERNEL_FLOATS,
    Sizes,
    alike,
    bias,
    floating,
    head_groups,
    multiple,
    once_per_signature,
    readable,
    same_device,
    shape,
    tensor,
)

Impl = Literal["auto", "eager", "sdpa", "triton"]
Environment = Literal["query", "kin", "none"]

_IMPLS, _ENVIRONMENTS = get_args(Impl), get_args(Environment)
_MAX_TOKENS = 2**30  # positions and windows add up inside int32
_INTEGERS: tuple[Any, ...] = (Integral, torch.SymInt)
_MAX_SCALE = 2.0**127  # to base 2 it is finite in fp32 still
_JOINT_COLUMNS = {256: 256, 512: 576}  # of queries and their rotary part, by the widest without

Window = TypeVar("Window", int, int | None)


@once_per_signature
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window_size: int | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    key_bias: Tensor | None,
) -> None:
    """Check the arguments of `kernels.attention`."""
    sizes: Sizes = {}
    shape("q", q, "B Tq HQ D_QK", sizes)
    shape("k", k, "B Tk HK D_QK", sizes)
    shape("v", v, "B Tk HV D_V", sizes)
    head_groups(sizes)
    alike(q=q, k=k, v=v)
    _sinks(sinks, q, sizes)
    bias("key_bias", key_bias, "Tk HQ", q, sizes)
    _causal(causal)
    _window(window_size, causal)
    _scale(scale)
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(
            f"cu_seqlens: expected as many queries as keys, got Tq={sizes['Tq']}, Tk={sizes['Tk']}"
        )
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["Tq"], q.device)


@once_per_signature
def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor | None,
    k_nope: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    *,
    causal: bool,
    window_size: int | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    key_bias: Tensor | None,
) -> None:
    """Check the arguments of `kernels.latent_attention`."""
    sizes: Sizes = {}
    shape("q_nope", q_nope, "B T H D_NOPE", sizes)
    shape("k_nope", k_nope, "B T H D_NOPE", sizes)
    shape("v", v, "B T H D_V", sizes)
    _rope_pair("q_rope", q_rope, "k_rope", k_rope)
    if q_rope is not None and k_rope is not None:
        shape("q_rope", q_rope, "B T H D_ROPE", sizes)
        shape("k_rope", k_rope, "B T D_ROPE", sizes)
    alike(q_nope=q_nope, q_rope=q_rope, k_nope=k_nope, k_rope=k_rope, v=v)
    bias("key_bias", key_bias, "T H", v, sizes)
    _causal(causal)
    _window(window_size, causal)
    _scale(scale)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"], v.device)


@once_per_signature
def gene_fitness(
    g: Tensor,
    e: Tensor | None,
    *,
    window_size: int | None,
    environment: str,
    cu_seqlens: Tensor | None,
) -> None:
    """Check the arguments of `kernels.gene_fitness`."""
    _genes(g, e, window_size, environment, cu_seqlens)


def _genes(
    g: Tensor,
    e: Tensor | None,
    window_size: int | None,
    environment: str,
    cu_seqlens: Tensor | None,
) -> Sizes:
    """Check these, and learn their sizes."""
    sizes: Sizes = {}
    shape("g", g, "B T H D", sizes)
    if environment not in _ENVIRONMENTS:
        raise ValueError(f"environment: expected one of {_ENVIRONMENTS}, got {environment!r}")
    if (environment == "query") != (e is not None):
        expected = "a tensor [B, T, H, D]" if environment == "query" else "None"
        got = "None" if e is None else f"a tensor {list(e.shape)}"
        raise ValueError(f"e: expected {expected} for environment={environment!r}, got {got}")
    if e is not None:
        shape("e", e, "B T H D", sizes)
    alike(g=g, e=e)
    if window_size is None:
        raise ValueError("window_size: expected an integer >= 1 (the population), got None")
    _window(window_size, causal=True)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"], g.device)
    return sizes


@once_per_signature
def genetic_attention(
    g: Tensor,
    e: Tensor | None,
    v: Tensor,
    selection_pressure: Tensor,
    *,
    window_size: int | None,
    environment: str,
    rope: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check the arguments of `kernels.genetic_attention`."""
    sizes = _genes(g, e, window_size, environment, cu_seqlens)
    shape("v", v, "B T HV D_V", sizes)
    alike(g=g, v=v)
    _selection(g, selection_pressure, rope, "T D/2", sizes)


@once_per_signature
def genetic_decode(
    g: Tensor,
    e: Tensor | None,
    selection_pressure: Tensor,
    g_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    window_size: int | None,
    environment: str,
    rope: tuple[Tensor, Tensor] | None,
) -> None:
    """Check the arguments of `kernels.genetic_decode`."""
    sizes = _genes(g, e, window_size, environment, None)
    sizes["Tq"] = sizes["T"]
    shape("g_cache", g_cache, "B S H D", sizes)
    shape("k_cache", k_cache, "B S H D", sizes)
    shape("v_cache", v_cache, "B S HV D_V", sizes)
    alike(g=g, g_cache=g_cache, k_cache=k_cache, v_cache=v_cache)
    _selection(g, selection_pressure, rope, "B Tq D/2", sizes)
    _cache_lengths(cache_lengths, sizes, g.device)


def _selection(
    g: Tensor,
    selection_pressure: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    table_symbols: str,
    sizes: Sizes,
) -> None:
    multiple("H", "HV", sizes)
    shape("selection_pressure", selection_pressure, "H", sizes)
    floating("selection_pressure", selection_pressure)
    same_device(g=g, selection_pressure=selection_pressure)
    if rope is not None:
        if sizes["D"] % 2:
            raise ValueError(f"rope: expected an even width D to rotate, got D={sizes['D']}")
        sizes["D/2"] = sizes["D"] // 2
        if len(rope) != 2:
            raise ValueError(f"rope: expected a pair (cos, sin), got {len(rope)} tables")
        for name, table in zip(("rope cos", "rope sin"), rope, strict=True):
            shape(name, table, table_symbols, sizes)
            floating(name, table)
        same_device(**{"g": g, "rope cos": rope[0], "rope sin": rope[1]})


@once_per_signature
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    window_size: int | None,
    scale: float | None,
    sinks: Tensor | None,
    key_bias: Tensor | None,
) -> None:
    """Check the arguments of `kernels.attention_decode`."""
    sizes: Sizes = {}
    shape("q", q, "B HQ D_QK" if q.dim() == 3 else "B Tq HQ D_QK", sizes)
    shape("k_cache", k_cache, "B S HK D_QK", sizes)
    shape("v_cache", v_cache, "B S HV D_V", sizes)
    head_groups(sizes)
    alike(q=q, k_cache=k_cache, v_cache=v_cache)
    _sinks(sinks, q, sizes)
    bias("key_bias", key_bias, "S HQ", q, sizes)
    _cache_lengths(cache_lengths, sizes, q.device)
    _window(window_size, causal=True)
    _scale(scale)


@once_per_signature
def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor | None,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    cache_lengths: Tensor,
    *,
    window_size: int | None,
    scale: float,
    key_bias: Tensor | None,
) -> None:
    """Check the arguments of `kernels.latent_decode`."""
    sizes: Sizes = {}
    tokens = "" if q_latent.dim() == 3 else "Tq "
    shape("q_latent", q_latent, f"B {tokens}H D_LATENT", sizes)
    shape("latent_cache", latent_cache, "B S D_LATENT", sizes)
    _rope_pair("q_rope", q_rope, "rope_cache", rope_cache)
    if q_rope is not None and rope_cache is not None:
        shape("q_rope", q_rope, f"B {tokens}H D_ROPE", sizes)
        shape("rope_cache", rope_cache, "B S D_ROPE", sizes)
    alike(q_latent=q_latent, q_rope=q_rope, latent_cache=latent_cache, rope_cache=rope_cache)
    bias("key_bias", key_bias, "S H", q_latent, sizes)
    _cache_lengths(cache_lengths, sizes, q_latent.device)
    _window(window_size, causal=True)
    _scale(scale)


def check_cu_seqlens(
    cu_seqlens: Tensor | None, batch: int, tokens: int, device: torch.device
) -> None:
    """Check the offsets of sequences packed into [batch, tokens].

    Values are checked on CPU only: reading them from a GPU would stall the stream.
    """
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected B=1 (packed sequences), got B={batch}")
    _offsets_form("cu_seqlens", cu_seqlens, device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected [N+1] with N >= 1, got {list(cu_seqlens.shape)}")
    if readable(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != tokens or values != sorted(values):
            raise ValueError(
                f"cu_seqlens: expected non-decreasing offsets from 0 to T={tokens}, "
                f"got {_abridged(values)}"
            )


def bounded(window_size: Window) -> Window:
    """A window that `_window` accepts as a plain number that no op overflows; it sees the same."""
    if window_size is None or isinstance(window_size, torch.SymInt):
        return window_size
    return min(int(window_size), _MAX_TOKENS)


def implementation(
    impl: str,
    inputs: Mapping[str, Tensor | None],
    widest: int = 256,
    others: Sequence[Tensor | None] | None = None,
) -> Literal["eager", "sdpa", "triton"]:
    """Resolve `impl` for an op's inputs by name; what it cannot serve is refused.

    Of an op whose backward is in eager alone, `others` may ask for it too.
    """
    if impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {_IMPLS}, got {impl!r}")
    given = {name: x for name, x in inputs.items() if x is not None}
    device = next(iter(given.values())).device.type
    if impl == "auto" and device != "cuda":
        wanted = others is not None and ask_for_gradients(*given.values(), *others)
        impl = "sdpa" if device == "cpu" and not wanted else "eager"
    if impl == "eager":
        return "eager"
    if impl == "sdpa":
        if device != "cpu":
            raise ValueError(f"impl: expected CPU tensors for 'sdpa', got tensors on {device}")
        return "sdpa"
    if device != "cuda" and not (device == "cpu" and _interpreting()):
        raise ValueError(
            "impl: expected CUDA tensors for 'triton' (or CPU tensors with TRITON_INTERPRET=1 set "
            f"before the start), got tensors on {device}"
        )
    for name, x in given.items():
        _, tokens, *_, width = x.shape
        if x.dtype not in KERNEL_FLOATS:
            raise TypeError(f"{name}: expected one of {KERNEL_FLOATS} for Triton, got {x.dtype}")
        if not 1 <= width <= widest:
            raise ValueError(f"{name}: expected a width of 1 to {widest} for Triton, got {width}")
        if width > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a last stride of 1 for Triton, got strides {x.stride()}"
            )
        if tokens > _MAX_TOKENS:
            raise ValueError(
                f"{name}: expected at most {_MAX_TOKENS} tokens for Triton, got {tokens}"
            )
    if "q_rope" in given:
        _joint_width(*next(iter(given.items())), given["q_rope"], _JOINT_COLUMNS[widest])
    return "triton"


def _joint_width(name: str, q: Tensor, q_rope: Tensor, most: int) -> None:
    """Queries and their rotary part share a tile, each padded to the columns it takes."""
    columns, rope_columns = (padded_width(int(x.shape[-1])) for x in (q, q_rope))
    if columns + rope_columns > most:
        raise ValueError(
            f"q_rope: expected at most {most} columns of tiles with {name} for Triton, got "
            f"{columns} + {rope_columns} for widths {q.shape[-1]} + {q_rope.shape[-1]}"
        )


def _interpreting() -> bool:
    """Whether Triton runs its interpreter on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _causal(causal: bool) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {causal!r}")


def _window(window_size: int | None, causal: bool) -> None:
    if window_size is None:
        return
    if isinstance(window_size, bool) or not isinstance(window_size, _INTEGERS):
        raise TypeError(f"window_size: expected an integer or None, got {window_size!r}")
    if window_size < 1:
        raise ValueError(
            f"window_size: expected >= 1 (it counts the token itself), got {window_size}"
        )
    if not causal:
        raise ValueError(f"window_size: expected None when causal=False, got {window_size}")


def _scale(scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(f"scale: expected a float or None, got {scale!r}")
    if not 0 < scale <= _MAX_SCALE:
        raise ValueError(f"scale: expected a finite number > 0, at most 2**127, got {scale}")


def _sinks(sinks: Tensor | None, q: Tensor, sizes: Sizes) -> None:
    if sinks is not None:
        shape("sinks", sinks, "HQ", sizes)
        same_device(q=q, sinks=sinks)
        floating("sinks", sinks)


def _rope_pair(q_name: str, q_rope: Tensor | None, k_name: str, k_rope: Tensor | None) -> None:
    if (q_rope is None) != (k_rope is None):
        absent, present = (q_name, k_name) if q_rope is None else (k_name, q_name)
        raise ValueError(f"{absent}: expected a tensor beside {present}, got None")


def _cache_lengths(cache_lengths: Tensor, sizes: Sizes, device: torch.device) -> None:
    shape("cache_lengths", cache_lengths, "B", sizes)
    _offsets_form("cache_lengths", cache_lengths, device)
    if readable(cache_lengths) and cache_lengths.numel():
        lengths = cache_lengths.tolist()
        low, high = min(lengths), max(lengths)
        if low < 0 or (high > 0 and sizes["S"] == 0):
            raise ValueError(
                f"cache_lengths: expected values >= 0, and 0 without rows, got {low} to {high} "
                f"with S={sizes['S']}"
            )


def _offsets_form(name: str, x: Tensor, device: torch.device) -> None:
    tensor(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def _abridged(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
