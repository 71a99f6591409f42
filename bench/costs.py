"""What a case of attention costs, counted and not measured."""

from tests.cases import AttentionCase

BACKWARD_TO_FORWARD = 2.5  # five products for two


def unmasked_pairs(case: AttentionCase) -> int:
    """Pairs of a query and a key that it sees, in one head of one batch, without a loop over T."""
    tokens = case.q_tokens
    if not case.causal:
        return tokens * tokens
    window = min(case.window_size or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def flops(case: AttentionCase, direction: str) -> float:
    """Floating-point operations of "forward" or "backward"."""
    forward = 2 * case.batch * case.q_heads * unmasked_pairs(case) * (case.width + case.d_v)
    return forward * (BACKWARD_TO_FORWARD if direction == "backward" else 1.0)
