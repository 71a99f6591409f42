"""Ours and its peers behind one signature: attention as a function of the tensors of a case."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn as typed_varlen_attn

import kernels
from tests.cases import AttentionCase, LatentCase

Attention = Callable[..., Tensor]
varlen_attn: Callable[..., Any] = typed_varlen_attn  # its keywords vary with the version


def ours(case: AttentionCase) -> Attention:
    return lambda q, k, v: kernels.attention(q, k, v, **case.arguments, impl="triton")


def eager(case: AttentionCase) -> Attention | None:
    """The oracle, as far as T x T fits."""
    if case.q_tokens > 4096:
        return None
    return lambda q, k, v: kernels.attention(q, k, v, **case.arguments, impl="eager")


def sdpa(case: AttentionCase, backend: SDPBackend) -> Attention | None:
    """F.scaled_dot_product_attention with one backend; it has no windows."""
    if case.window_size is not None:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = case.q_heads != case.k_heads
        with sdpa_kernel([backend]):
            o = F.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, scale=case.scale, enable_gqa=gqa
            )
        return o.transpose(1, 2)

    return run


def flex(case: AttentionCase) -> Attention:
    """FlexAttention compiled, with the block mask made beforehand."""
    tokens, window = case.q_tokens, case.window_size or case.q_tokens

    def seen(_batch: Tensor, _head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t >= s) & (t - s < window) if case.causal else t - s < tokens

    mask = create_block_mask(seen, None, None, tokens, tokens, device="cuda")
    compiled = _compiled_flex()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = case.q_heads != case.k_heads
        o = compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=gqa)
        return o.transpose(1, 2)

    return run


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def varlen(case: AttentionCase) -> Attention:
    """torch.nn.attention.varlen over the batch as packed sequences."""
    tokens = case.q_tokens
    offsets = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * tokens
    options: dict[str, Any] = {"window_size": (-1, -1), "scale": case.scale}
    if case.causal:
        options["window_size"] = (-1 if case.window_size is None else case.window_size - 1, 0)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = case.q_heads != case.k_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = (x.flatten(0, 1) for x in (q, k, v))
        o: Tensor = varlen_attn(*packed, offsets, offsets, tokens, tokens, **options).view(q.shape)
        return o

    return run


SYSTEMS: dict[str, Callable[[AttentionCase], Attention | None]] = {"ours": ours}
if torch.cuda.is_available():
    SYSTEMS |= {
        "sdpa cudnn": lambda case: sdpa(case, SDPBackend.CUDNN_ATTENTION),
        "sdpa flash": lambda case: sdpa(case, SDPBackend.FLASH_ATTENTION),
        "flex": flex,
        "varlen": varlen,
    }
else:
    SYSTEMS["sdpa math"] = lambda case: sdpa(case, SDPBackend.MATH)
SYSTEMS["eager"] = eager


def system(name: str, case: AttentionCase | LatentCase) -> Attention | None:
    """A system for a case, or None if it does not serve it; peers get MLA's heads joined."""
    if isinstance(case, AttentionCase):
        return SYSTEMS[name](case)
    attend = SYSTEMS[name](case.joined)
    if attend is None:
        return None
    if name in ("ours", "eager"):
        impl: Any = "triton" if name == "ours" else "eager"
        return lambda *tensors: kernels.latent_attention(
            *tensors, window_size=case.window_size, impl=impl
        )
    return lambda *tensors: attend(*join(*tensors))


def join(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """MLA's parts as the q, k and v of plain attention, the rope key copied to every head."""
    k_rope = k_rope[:, :, None].expand_as(q_rope)
    return torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v
