"""What a model refuses: prototypes, ids, labels and caches that do not fit it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels import check_cu_seqlens, readable
from smollm.attention.base import Attention
from smollm.attention.cache import Cache
from smollm.model.head import IGNORED

INTEGERS = (torch.int32, torch.int64)


def checked_prototypes(
    given: Attention | Sequence[Attention], num_layers: int, embed_dim: int
) -> list[Attention]:
    """Each layer's prototype, of one for all of them or of one each."""
    modules = [given] * num_layers if isinstance(given, Attention) else given
    if not isinstance(modules, Iterable) or not all(isinstance(m, Attention) for m in modules):
        raise TypeError(
            "attention_module: expected an instance of smollm.attention.Attention, or a sequence "
            f"of them, got {given!r}"
        )
    prototypes = list(modules)
    if len(prototypes) != num_layers:
        raise ValueError(
            f"attention_module: expected one, or num_layers={num_layers} of them, got "
            f"{len(prototypes)}"
        )
    for prototype in prototypes:
        if prototype.embed_dim != embed_dim:
            raise ValueError(
                f"attention_module: expected embed_dim={embed_dim}, got {prototype.embed_dim}"
            )
    return prototypes


def check_labels(
    labels: Tensor | None, input_ids: Tensor, with_logits: bool, vocab_size: int
) -> None:
    """Refuse labels that are not of the ids, or no tokens."""
    if labels is None:
        if not with_logits:
            raise ValueError("labels: expected the input ids with with_logits=False, got None")
        return
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels: expected input_ids' shape {list(input_ids.shape)}, got {list(labels.shape)}"
        )
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if readable(labels) and labels.numel():
        used = labels[labels != IGNORED]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < vocab_size:
            raise ValueError(
                f"labels: expected {IGNORED} or values from 0 to {vocab_size - 1}, got "
                f"{int(used.min())} to {int(used.max())}"
            )


def check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Cache | None,
    *,
    windows: list[int | None],
    max_seq_len: int,
    vocab_size: int,
) -> None:
    """Refuse ids, offsets and a cache that do not fit together, or not a model of this shape."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids: expected [B, T], got {list(input_ids.shape)}")
    if input_ids.dtype not in INTEGERS:
        raise TypeError(f"input_ids: expected integers, got {input_ids.dtype}")
    if cu_seqlens is not None and (attention_mask is not None or cache is not None):
        raise ValueError("cu_seqlens: expected None beside attention_mask or cache")
    batch, longest = input_ids.shape
    check_cu_seqlens(cu_seqlens, batch, longest, input_ids.device)
    if cache is not None:
        if cache.windows != windows:
            raise ValueError(
                f"cache: expected one for {len(windows)} layers with this model's windows, "
                f"got one for windows {cache.windows}"
            )
        if len(cache.lengths) != batch:
            raise ValueError(
                f"input_ids: expected the cache's B={len(cache.lengths)} sequences, got {batch}"
            )
    has_values = readable(input_ids)
    if cu_seqlens is not None:
        longest = int(cu_seqlens.diff().max()) if has_values else 0
    if cache is not None:
        longest += int(cache.lengths.max()) if has_values else 0
    if longest > max_seq_len:
        raise ValueError(
            f"input_ids: expected at most max_seq_len={max_seq_len} tokens in a sequence, got "
            f"{longest}"
        )
    if has_values and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise ValueError(
            f"input_ids: expected values from 0 to {vocab_size - 1}, got "
            f"{int(input_ids.min())} to {int(input_ids.max())}"
        )
