"""Every argument contract of the public ops, and the text of every refusal.

Shapes are written as space-separated symbols, `"B T HK D_QK"`. A symbol takes its size from the
first tensor that carries it, and every later tensor must agree.
"""

import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "eager", "triton"]
Environment = Literal["query", "kin", "none"]
Sizes = dict[str, int]

_KERNEL_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS = (*_KERNEL_FLOATS, torch.float64)
_MAX_TOKENS = 2**30  # positions and windows add up inside int32
_INTEGERS: tuple[Any, ...] = (Integral, torch.SymInt)
_MAX_SCALE = 2.0**127  # to base 2 it is finite in fp32 still
_JOINT_COLUMNS = {256: 256, 512: 576}  # of queries and their rotary part, by the widest without

Window = TypeVar("Window", int, int | None)


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
) -> None:
    """Check the arguments of `kernels.attention`."""
    sizes: Sizes = {}
    _shape("q", q, "B Tq HQ D_QK", sizes)
    _shape("k", k, "B Tk HK D_QK", sizes)
    _shape("v", v, "B Tk HV D_V", sizes)
    _head_groups(sizes)
    if sinks is not None:
        _shape("sinks", sinks, "HQ", sizes)
    _alike(q=q, k=k, v=v)
    _same_device(q=q, sinks=sinks)
    _floating("sinks", sinks)
    _causal(causal)
    _window(window_size, causal)
    _scale(scale)
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(
            f"cu_seqlens: expected as many queries as keys, got Tq={sizes['Tq']}, Tk={sizes['Tk']}"
        )
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["Tq"], q.device)


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
) -> None:
    """Check the arguments of `kernels.latent_attention`."""
    sizes: Sizes = {}
    _shape("q_nope", q_nope, "B T H D_NOPE", sizes)
    _shape("k_nope", k_nope, "B T H D_NOPE", sizes)
    _shape("v", v, "B T H D_V", sizes)
    _rope_pair("q_rope", q_rope, "k_rope", k_rope)
    if q_rope is not None and k_rope is not None:
        _shape("q_rope", q_rope, "B T H D_ROPE", sizes)
        _shape("k_rope", k_rope, "B T D_ROPE", sizes)
    _alike(q_nope=q_nope, q_rope=q_rope, k_nope=k_nope, k_rope=k_rope, v=v)
    _causal(causal)
    _window(window_size, causal)
    _scale(scale)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"], v.device)


def gene_fitness(
    g: Tensor,
    e: Tensor | None,
    *,
    window_size: int | None,
    environment: str,
    cu_seqlens: Tensor | None,
) -> None:
    """Check the arguments of `kernels.gene_fitness`."""
    sizes: Sizes = {}
    _shape("g", g, "B T H D", sizes)
    if environment not in get_args(Environment):
        raise ValueError(
            f"environment: expected one of {get_args(Environment)}, got {environment!r}"
        )
    if (environment == "query") != (e is not None):
        expected = "a tensor [B, T, H, D]" if environment == "query" else "None"
        got = "None" if e is None else f"a tensor {list(e.shape)}"
        raise ValueError(f"e: expected {expected} for environment={environment!r}, got {got}")
    if e is not None:
        _shape("e", e, "B T H D", sizes)
    _alike(g=g, e=e)
    if window_size is None:
        raise ValueError("window_size: expected an integer >= 1 (the population), got None")
    _window(window_size, causal=True)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"], g.device)


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
    gene_fitness(g, e, window_size=window_size, environment=environment, cu_seqlens=cu_seqlens)
    sizes: Sizes = {}
    _shape("g", g, "B T H D", sizes)
    _shape("v", v, "B T HV D_V", sizes)
    _multiple("H", "HV", sizes)
    _shape("selection_pressure", selection_pressure, "H", sizes)
    _alike(g=g, v=v)
    _floating("selection_pressure", selection_pressure)
    _same_device(g=g, selection_pressure=selection_pressure)
    if rope is not None:
        if sizes["D"] % 2:
            raise ValueError(f"rope: expected an even width D to rotate, got D={sizes['D']}")
        sizes["D/2"] = sizes["D"] // 2
        if len(rope) != 2:
            raise ValueError(f"rope: expected a pair (cos, sin), got {len(rope)} tables")
        for name, table in zip(("rope cos", "rope sin"), rope, strict=True):
            _shape(name, table, "T D/2", sizes)
            _floating(name, table)
            _same_device(**{"g": g, name: table})


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    window_size: int | None,
    scale: float | None,
    sinks: Tensor | None,
) -> None:
    """Check the arguments of `kernels.attention_decode`."""
    sizes: Sizes = {}
    _shape("q", q, "B HQ D_QK" if q.dim() == 3 else "B Tq HQ D_QK", sizes)
    _shape("k_cache", k_cache, "B S HK D_QK", sizes)
    _shape("v_cache", v_cache, "B S HV D_V", sizes)
    _head_groups(sizes)
    if sinks is not None:
        _shape("sinks", sinks, "HQ", sizes)
    _alike(q=q, k_cache=k_cache, v_cache=v_cache)
    _same_device(q=q, sinks=sinks)
    _floating("sinks", sinks)
    _cache_lengths(cache_lengths, sizes, q.device)
    _window(window_size, causal=True)
    _scale(scale)


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor | None,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    cache_lengths: Tensor,
    *,
    window_size: int | None,
    scale: float,
) -> None:
    """Check the arguments of `kernels.latent_decode`."""
    sizes: Sizes = {}
    tokens = "" if q_latent.dim() == 3 else "Tq "
    _shape("q_latent", q_latent, f"B {tokens}H D_LATENT", sizes)
    _shape("latent_cache", latent_cache, "B S D_LATENT", sizes)
    _rope_pair("q_rope", q_rope, "rope_cache", rope_cache)
    if q_rope is not None and rope_cache is not None:
        _shape("q_rope", q_rope, f"B {tokens}H D_ROPE", sizes)
        _shape("rope_cache", rope_cache, "B S D_ROPE", sizes)
    _alike(q_latent=q_latent, q_rope=q_rope, latent_cache=latent_cache, rope_cache=rope_cache)
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
    if _readable(cu_seqlens):
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
    impl: str, inputs: Mapping[str, Tensor | None], widest: int = 256
) -> Literal["eager", "triton"]:
    """Resolve `impl` for an op's inputs by name; what the kernels cannot serve is refused."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {get_args(Impl)}, got {impl!r}")
    given = {name: x for name, x in inputs.items() if x is not None}
    device = next(iter(given.values())).device.type
    if impl == "eager" or (impl == "auto" and device != "cuda"):
        return "eager"
    if device != "cuda" and not (device == "cpu" and _interpreting()):
        raise ValueError(
            "impl: expected CUDA tensors for 'triton' (or CPU tensors with TRITON_INTERPRET=1 set "
            f"before the start), got tensors on {device}"
        )
    for name, x in given.items():
        if x.dtype not in _KERNEL_FLOATS:
            raise TypeError(f"{name}: expected one of {_KERNEL_FLOATS} for Triton, got {x.dtype}")
        if not 1 <= x.shape[-1] <= widest:
            raise ValueError(
                f"{name}: expected a width of 1 to {widest} for Triton, got {x.shape[-1]}"
            )
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a last stride of 1 for Triton, got strides {x.stride()}"
            )
        if x.shape[1] > _MAX_TOKENS:
            raise ValueError(
                f"{name}: expected at most {_MAX_TOKENS} tokens for Triton, got {x.shape[1]}"
            )
    if "q_rope" in given:
        _joint_width(*next(iter(given.items())), given["q_rope"], _JOINT_COLUMNS[widest])
    return "triton"


def _joint_width(name: str, q: Tensor, q_rope: Tensor, most: int) -> None:
    """Queries and their rotary part share a tile, each padded to the columns it takes."""
    from kernels.core.primitives import padded_width

    columns, rope_columns = (padded_width(int(x.shape[-1])) for x in (q, q_rope))
    if columns + rope_columns > most:
        raise ValueError(
            f"q_rope: expected at most {most} columns of tiles with {name} for Triton, got "
            f"{columns} + {rope_columns} for widths {q.shape[-1]} + {q_rope.shape[-1]}"
        )


def _interpreting() -> bool:
    """Whether Triton runs its interpreter on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _shape(name: str, x: Tensor, symbols: str, sizes: Sizes) -> None:
    """Match x against its symbols, learning the sizes of those not seen before."""
    names = symbols.split()
    _tensor(name, x)
    known = [sizes.get(symbol) for symbol in names]
    if x.dim() != len(names) or any(
        size is not None and size != actual for size, actual in zip(known, x.shape, strict=True)
    ):
        expected = ", ".join(
            symbol if size is None else f"{symbol}={size}"
            for symbol, size in zip(names, known, strict=True)
        )
        raise ValueError(f"{name}: expected [{expected}], got {list(x.shape)}")
    sizes.update(zip(names, x.shape, strict=True))


def _head_groups(sizes: Sizes) -> None:
    _multiple("HQ", "HK", sizes)
    _multiple("HK", "HV", sizes)


def _multiple(many: str, few: str, sizes: Sizes) -> None:
    if sizes[few] == 0 or sizes[many] % sizes[few]:
        raise ValueError(
            f"heads: expected {many} a multiple of {few}, got {many}={sizes[many]}, "
            f"{few}={sizes[few]}"
        )


def _alike(**tensors: Tensor | None) -> None:
    """All floating, of one type, on one device; the first tensor sets both."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, reference = next(iter(given.items()))
    _same_device(**given)
    for name, x in given.items():
        _floating(name, x)
        if x.dtype != reference.dtype:
            raise TypeError(f"{name}: expected {first}'s type {reference.dtype}, got {x.dtype}")


def _floating(name: str, x: Tensor | None) -> None:
    if x is not None and x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating type {_FLOATS}, got {x.dtype}")


def _same_device(**tensors: Tensor | None) -> None:
    given = {name: x for name, x in tensors.items() if x is not None}
    first, reference = next(iter(given.items()))
    for name, x in given.items():
        if x.device != reference.device:
            raise ValueError(
                f"{name}: expected {first}'s device {reference.device}, got {x.device}"
            )


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


def _rope_pair(q_name: str, q_rope: Tensor | None, k_name: str, k_rope: Tensor | None) -> None:
    if (q_rope is None) != (k_rope is None):
        absent, present = (q_name, k_name) if q_rope is None else (k_name, q_name)
        raise ValueError(f"{absent}: expected a tensor beside {present}, got None")


def _cache_lengths(cache_lengths: Tensor, sizes: Sizes, device: torch.device) -> None:
    _shape("cache_lengths", cache_lengths, "B", sizes)
    _offsets_form("cache_lengths", cache_lengths, device)
    if _readable(cache_lengths) and cache_lengths.numel():
        low, high = int(cache_lengths.min()), int(cache_lengths.max())
        if low < 0 or (high > 0 and sizes["S"] == 0):
            raise ValueError(
                f"cache_lengths: expected values >= 0, and 0 without rows, got {low} to {high} "
                f"with S={sizes['S']}"
            )


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _offsets_form(name: str, x: Tensor, device: torch.device) -> None:
    _tensor(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _abridged(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
