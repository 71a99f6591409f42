"""What a case of attention costs, counted and not measured."""

from tests.cases import AttentionCase, DecodeCase, GeneticCase, LatentCase

BACKWARD_TO_FORWARD = 2.5  # five products for two


def unmasked_pairs(case: AttentionCase) -> int:
    """Pairs of a query and a key that it sees, in one head of one batch, without a loop over T."""
    tokens = case.q_tokens
    if not case.causal:
        return tokens * tokens
    window = min(case.window_size or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def flops(case: AttentionCase | LatentCase | GeneticCase, direction: str) -> float:
    """Floating-point operations of "forward" or "backward"; of MGA, those of its selection."""
    if isinstance(case, LatentCase):
        case = case.joined
    if isinstance(case, GeneticCase):
        case = case.selection
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


def fitness_bytes(case: GeneticCase, direction: str) -> int:
    """Bytes that MGA's fitness reads and writes once, in a type of two bytes, without tables.

    Its "forward" takes g and e to q and k, its "backward" reads g, e, dq, dk and writes dg and de.
    """
    of_g = 2 * case.batch * case.tokens * case.heads * case.width
    environments = 1 if case.environment == "query" else 0
    tensors = 3 + environments if direction == "forward" else 4 + 2 * environments
    return tensors * of_g
