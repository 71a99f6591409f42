"""What transformers says of who sees whom, in the terms of the ops: no mask of Tq x Tk is made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import readable
from smollm.attention.padding import has_gap

MaskFunction = Callable[..., Any]  # of batch, head, query and key


class Layout(NamedTuple):
    """Who sees whom in one kind of layer, made once a forward and handed to its attention.

    With `cu_seqlens` the keys are the queries' own and the first rows there are, with `lengths`
    they are rows of a cache, and with neither all keys end where the queries end.
    """

    causal: bool
    window_size: int | None = None  # keys that a query sees, its own included
    cu_seqlens: Tensor | None = None  # int32 [N+1], sequences of the flattened [B * T] tokens
    lengths: Tensor | None = None  # int32 [B], tokens of each sequence so far
    rows: Tensor | None = None  # [B, Tk], where they stand in order, if not from row 0 on

    @property
    def ndim(self) -> int:
        """4, so that transformers, which asks masks made ahead of a forward, leaves it alone."""
        return 4


def layout(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | Layout | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Layout | None:
    """The mask function of transformers' `AttentionMaskInterface`.

    Padding becomes sequences of its own, so that nothing is copied, and of packed input the ends
    are found by asking `mask_function` which tokens see the one before them.

    Args:
        batch_size, q_length, kv_length: B, Tq and Tk.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: whether a query sees a key, both by position. Default: causality.
        attention_mask: [B, T], True at real tokens, or a layout, which stays as it is.
        local_size: the window that mask_function has, its own token included.
        use_vmap: whether mask_function was joined with one of the caller's own.
        config: the model's.
        device: where the layout is wanted.

    Returns:
        The layout, None for causality alone.

    Raises:
        NotImplementedError: a mask that is not padding, packing, a window or causality.
        ValueError: a padding mask that is shorter than its tokens.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if isinstance(attention_mask, Layout):
        return attention_mask
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        raise NotImplementedError(f"attention_chunk_size: expected None, got {chunk}")
    if use_vmap:
        raise NotImplementedError(
            "or_mask_function, and_mask_function: expected None, got a mask function"
        )
    used = q_offset + q_length - kv_offset  # rows of keys
    if isinstance(used, Tensor) and q_length > 1 and not torch.compiler.is_compiling():
        used = int(used)
    real = _padding(attention_mask, batch_size, kv_length, kv_offset, used)

    if mask_function is bidirectional_mask_function:
        if real is None:
            return Layout(causal=False)
        _check_own_padding(q_length, kv_length, config)
        cu_seqlens = _cu_seqlens(_alike(real), batch_size, q_length, device)
        return Layout(causal=False, cu_seqlens=cu_seqlens)

    joined = None
    if mask_function not in (None, causal_mask_function) and q_length > 1:
        joined = _sees_previous(mask_function, batch_size, q_length, q_offset, device)
    unpadded = None if local_size is None else Layout(True, local_size)
    if not isinstance(used, Tensor) and used == q_length:  # all keys are the queries' own
        if real is not None:
            joined = _alike(real) if joined is None else joined & _alike(real)
        if joined is not None and _is_known(joined.all()):
            joined = None
        if joined is None and kv_length == q_length:
            return unpadded
        return Layout(True, local_size, _cu_seqlens(joined, batch_size, q_length, device))

    starts = None if real is None else real.int().argmax(dim=1)
    if starts is not None and _is_known((starts == 0).all()):
        starts = None
    if starts is None and not isinstance(used, Tensor) and used == kv_length:
        return unpadded
    lengths = torch.zeros(batch_size, dtype=torch.int64, device=device) + used
    rows = None
    if starts is not None:
        rows = (torch.arange(kv_length, device=device) + starts[:, None]) % kv_length
        lengths = lengths - starts
    return Layout(True, local_size, lengths=lengths.int(), rows=rows)


def packed(
    layout: Layout,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    q_length: int,
    kv_length: int,
) -> Layout:
    """The layout of tokens of which the caller says where their sequences end.

    This goes before what `position_ids` say, which some models keep from their masks.

    Args:
        layout: what is known of who sees whom otherwise.
        cu_seq_lens_q, cu_seq_lens_k: [N+1], offsets of the sequences; the same, or both None.
        q_length, kv_length: Tq and Tk.

    Raises:
        NotImplementedError: keys that are not the queries' own.
    """
    ends, others = cu_seq_lens_q, cu_seq_lens_k
    if ends is None and others is None:
        return layout
    is_own = q_length == kv_length or layout.cu_seqlens is not None
    if layout.lengths is not None or not is_own:
        raise NotImplementedError(
            "cu_seq_lens_q, cu_seq_lens_k: expected None where a cache holds tokens, got "
            f"Tq={q_length}, Tk={kv_length}"
        )
    if ends is None or others is None or ends.shape != others.shape or _differ(ends, others):
        raise NotImplementedError(
            "cu_seq_lens_q, cu_seq_lens_k: expected the same offsets, got two that differ"
        )
    return layout._replace(cu_seqlens=ends.int())


def _differ(x: Tensor, y: Tensor) -> bool:
    """Whether they do, on CPU alone: reading them from a GPU would stall the stream."""
    return readable(x) and readable(y) and not torch.equal(x, y)


def _is_known(holds: Tensor) -> bool:
    """Whether it holds, False in a compiled graph, which may not branch on values."""
    return not torch.compiler.is_compiling() and bool(holds)


def _padding(
    attention_mask: Tensor | None,
    batch_size: int,
    kv_length: int,
    kv_offset: int,
    used: int | Tensor,
) -> Tensor | None:
    """Which of the keys are real, [B, rows in use], or None if all are known to be."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise NotImplementedError(
            f"attention_mask: expected padding [B, T], got {list(attention_mask.shape)}"
        )
    keys = kv_length if isinstance(used, Tensor) else min(used, kv_length)
    real = attention_mask.bool().expand(batch_size, -1)[:, kv_offset : kv_offset + keys]
    if real.shape[1] < keys and not isinstance(used, Tensor):
        raise ValueError(
            f"attention_mask: expected [B={batch_size}, T={keys + kv_offset}] (cached tokens "
            f"included), got {list(attention_mask.shape)}"
        )
    if _is_known(real.all()):
        return None
    _require(~has_gap(real).any(), "attention_mask: expected padding at the ends only, got a gap")
    return real


def _check_own_padding(q_length: int, kv_length: int, config: Any) -> None:
    """Padded keys of cross-attention are not the queries' own, which no op serves."""
    flags = ("is_encoder_decoder", "add_cross_attention")
    crosses = any(getattr(config, flag, False) for flag in flags)
    if q_length != kv_length or crosses:
        raise NotImplementedError(
            "attention_mask: expected no padding where there is cross-attention, got some "
            f"(Tq={q_length}, Tk={kv_length})"
        )


def _alike(real: Tensor) -> Tensor:
    """Whether each token but the first is real as the one before it is, [B, T-1]."""
    return real[:, 1:] == real[:, :-1]


def _sees_previous(
    mask_function: MaskFunction,
    batch_size: int,
    q_length: int,
    q_offset: int | Tensor,
    device: torch.device | str,
) -> Tensor:
    """Whether each query but the first sees the one before it, [B or 1, Tq-1].

    Causal masks, under windows and packed or not, are told by this; none of them looks ahead.
    """
    positions = torch.arange(q_length, device=device)[None] + q_offset
    earlier, later = positions[:, :-1], positions[:, 1:]
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    looks_ahead = mask_function(batch, head, earlier, later).any()
    _require(~looks_ahead, "attention_mask: expected a causal mask, got one that looks ahead")
    sees: Tensor = mask_function(batch, head, later, earlier)
    return sees


def _require(holds: Tensor, text: str) -> None:
    """Raise unless it holds; in a compiled graph, which may not branch on it, when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, text)
    elif not bool(holds):
        raise NotImplementedError(text)


def _cu_seqlens(
    joined: Tensor | None, batch_size: int, tokens: int, device: torch.device | str
) -> Tensor:
    """Offsets of the sequences of [B * T] tokens; joined [B or 1, T-1] says which follow on.

    In a compiled graph, whose sizes may not depend on values, empty sequences end the list.
    """
    begins = torch.ones(batch_size, tokens, dtype=torch.bool, device=device)
    begins[:, 1:] = False if joined is None else ~joined
    total, begins = batch_size * tokens, begins.flatten()
    if torch.compiler.is_compiling():
        places = torch.arange(total, device=device)
        offsets = torch.where(begins, places, total).sort().values
    else:
        offsets = begins.nonzero()[:, 0]
    return F.pad(offsets, (0, 1), value=total).int()
