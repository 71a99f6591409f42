"""What a case of attention costs, counted and not measured."""

from tests.cases import AttentionCase, DecodeCase, LatentCase

BACKWARD_TO_FORWARD = 2.5  # five products for two


def unmasked_pairs(case: AttentionCase) -> int:
    """Pairs of a query and a key that it sees, in one head of one batch, without a loop over T."""
    tokens = case.q_tokens
    if not case.causal:
        return tokens * tokens
    window = min(case.window_size or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def flops(case: AttentionCase | LatentCase, direction: str) -> float:
    """Floating-point operations of "forward" or "backward"."""
    if isinstance(case, LatentCase):
        case = case.joined
    forward = 2 * case.batch * case.q_heads * unmasked_pairs(case) * (case.width + case.d_v)
    return forward * (BACKWARD_TO_FORWARD if direction == "backward" else 1.0)


def cache_bytes(case: DecodeCase) -> int:
    """Bytes of the cached rows that one decoding step reads, in a type of two bytes."""
    width = case.width + case.rope
    if not case.latent:
        v_heads = case.k_heads if case.v_heads is None else case.v_heads
        v_width = case.width if case.v_width is None else case.v_width
        width = case.k_heads * case.width + v_heads * v_width
    seen = (len(case.seen_rows(sequence, 0)) for sequence in range(len(case.lengths)))
    return 2 * width * sum(seen)
