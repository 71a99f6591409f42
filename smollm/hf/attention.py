"""`attention()` and `attention_decode()` under Hugging Face's models."""

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kernels import attention, attention_decode
from smollm.hf.library import load_transformers
from smollm.hf.masks import Layout, layout, packed

Impl = Literal["auto", "eager", "sdpa", "triton"]
# What models hand on to attention although it changes nothing there, or has been heeded already.
HEEDED = {
    "cache",
    "cache_position",
    "deterministic",
    "hidden_states",
    "ignore_index",
    "layer_idx",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "use_cache",
}


def register(name: str = "smollm", impl: Impl = "auto") -> None:
    """Let models of transformers run on this project's attention.

        smollm.hf.register()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="smollm")

    Serves causal and bidirectional attention, grouped heads, windows, sinks, padding, input packed
    by `position_ids` (where a model's masks heed them) or `cu_seq_lens_q` and `cu_seq_lens_k`, and
    dynamic and static caches, of which padded ones are copied at each step. It is tested with
    transformers 5.17 and 5.24.

    Args:
        name: what `attn_implementation` will call it, an identifier without "flash" in it, by which
            transformers would take it for flash-attn. Default "smollm".
        impl: as `kernels.attention` takes it. Default "auto".

    Raises:
        ImportError: transformers is missing, or Hugging Face's package `kernels` is installed.
        ValueError: another name or impl, or a name that transformers has itself.
        NotImplementedError: of models when they run: soft caps, dropout in training, position
            biases, attention in chunks, paged caches, masks that are not padding, padded
            cross-attention, weights of attention as output, and arguments that are not known.

    Source: the attention interface of transformers.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {get_args(Impl)}, got {impl!r}")
    if not name.isidentifier() or "flash" in name:
        raise ValueError(f"name: expected an identifier without 'flash' in it, got {name!r}")
    transformers = load_transformers()
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if ALL_MASK_ATTENTION_FUNCTIONS.get(name, layout) is not layout:
        raise ValueError(f"name: expected one that transformers has not got, got {name!r}")
    transformers.AttentionInterface.register(name, partial(attend, impl=impl))
    transformers.AttentionMaskInterface.register(name, layout)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    *,
    impl: Impl = "auto",
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' `AttentionInterface`.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        query: [B, HQ, Tq, D_QK].
        key, value: [B, HK, Tk, D_QK] and [B, HK, Tk, D_V], those in the cache included.
        attention_mask: what `layout` made. A window of its own goes before sliding_window.
        dropout: of weights, 0 alone is served.
        scaling: factor on the scores. Default D_QK ** -0.5.
        sliding_window: keys that a query sees, its own included. Default unlimited.
        softcap: None alone is served.
        is_causal: see `module`; counts where attention_mask is None.
        s_aux: [HQ], sinks.
        cu_seq_lens_q, cu_seq_lens_k: [N+1], offsets of the sequences packed into B=1; the same.
            They go before `position_ids`. Default None.
        impl: as `kernels.attention` takes it.
        rest: refused, unless it is None, False or in `HEEDED`.

    Returns:
        [B, Tq, HQ, D_V], contiguous, and None for the weights.
    """
    _refuse(dropout, attention_mask, {"softcap": softcap, **rest})
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        attention_mask = Layout(bool(causal), sliding_window)
    told = packed(attention_mask, cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2])
    causal, window_size, cu_seqlens, lengths, rows = told
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if lengths is not None:
        if rows is not None:
            k, v = (_in_order(x, rows) for x in (k, v))
        o = attention_decode(
            q, k, v, lengths, window_size=window_size, scale=scaling, sinks=s_aux, impl=impl
        )
        return o.contiguous(), None
    if cu_seqlens is not None:  # of the queries' own tokens, which a static cache begins with
        q, k, v = (x[:, : query.shape[2]].reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    o = attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        scale=scaling,
        cu_seqlens=cu_seqlens,
        sinks=s_aux,
        impl=impl,
    )
    return o.reshape(query.shape[0], query.shape[2], *o.shape[2:]).contiguous(), None


def _refuse(dropout: float, attention_mask: Any, rest: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(f"dropout: expected 0 in training, got {dropout}")
    if attention_mask is not None and not isinstance(attention_mask, Layout):
        raise NotImplementedError(
            f"attention_mask: expected padding [B, T], got {type(attention_mask).__name__} "
            f"{list(attention_mask.shape)}"
        )
    for name, value in rest.items():
        if name not in HEEDED and value is not None and value is not False:
            raise NotImplementedError(
                f"{name}: expected None (attention() has no such thing), got {_short(value)}"
            )


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _in_order(x: Tensor, rows: Tensor) -> Tensor:
    """[B, Tk, H, D] with row rows[b, i] of each sequence in place i."""
    return x[torch.arange(len(rows), device=rows.device)[:, None], rows]
