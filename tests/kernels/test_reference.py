"""The oracles against naive loops, against PyTorch, against themselves, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from cases import ATTENTION_CASES, DECODE_CASES, AttentionCase, DecodeCase
from torch.autograd import gradcheck

import kernels
from kernels import reference


def random(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def mask_by_hand(case: AttentionCase) -> torch.Tensor:
    """Who sees whom, token by token, written without `visible`."""
    t_q, t_k = case.q_tokens, case.q_tokens if case.k_tokens is None else case.k_tokens
    sequence = [n for n, length in enumerate(case.lengths or (t_k,)) for _ in range(length)]
    mask = torch.zeros(t_q, t_k, dtype=torch.bool)
    for i in range(t_q):
        for j in range(t_k):
            distance = (i + t_k - t_q) - j
            seen = not case.causal or distance >= 0
            if case.window_size is not None:
                seen = seen and distance < case.window_size
            if case.lengths is not None:
                seen = seen and sequence[i] == sequence[j]
            mask[i, j] = seen
    return mask


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_attention_equals_a_loop_over_rows(case):
    inputs = case.inputs(torch.float64)
    o, lse = kernels.attention(**inputs, **case.arguments, return_lse=True)
    q, k, v, sinks = inputs["q"], inputs["k"], inputs["v"], inputs["sinks"]
    bias = inputs["key_bias"]
    mask = mask_by_hand(case)
    scale = case.width**-0.5 if case.scale is None else case.scale
    heads = range(0, case.q_heads, max(1, case.q_heads // 3))
    for b in range(case.batch):
        for h in heads:
            k_head, v_head = h * k.shape[2] // case.q_heads, h * v.shape[2] // case.q_heads
            for i in range(0, case.q_tokens, 7):
                seen = mask[i]
                scores = scale * k[b, seen, k_head] @ q[b, i, h]
                if bias is not None:
                    scores = scores + bias[b, seen, h]
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double()))
                if scores.numel() == 0:
                    assert o[b, i, h].eq(0).all() and lse[b, i, h] == -torch.inf
                    continue
                weights = scores.softmax(0)[: int(seen.sum())]
                torch.testing.assert_close(o[b, i, h], weights @ v[b, seen, v_head])
                torch.testing.assert_close(lse[b, i, h], scores.logsumexp(0))


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_identity_values_show_exactly_the_mask(case):
    inputs = case.inputs(torch.float64)
    k = inputs["k"]
    tokens = k.shape[1]
    v = torch.eye(tokens, dtype=k.dtype)[None, :, None].expand(case.batch, -1, k.shape[2], -1)
    o = kernels.attention(inputs["q"], k, v, cu_seqlens=inputs["cu_seqlens"], **case.arguments)
    expected = mask_by_hand(case)[None, :, None].expand_as(o)
    assert torch.equal(o != 0, expected)


def test_poison_outside_the_window_changes_no_bit():
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    window, row = 5, 20
    clean = kernels.attention(q, k, v, window_size=window)[:, row]
    for poisoned in (slice(0, row - window + 1), slice(row + 1, None)):
        k2, v2 = k.clone(), v.clone()
        k2[:, poisoned] = v2[:, poisoned] = 1e4
        assert torch.equal(kernels.attention(q, k2, v2, window_size=window)[:, row], clean)


def test_attention_equals_sdpa():
    q, k, v = random(2, 17, 6, 8), random(2, 17, 2, 8), random(2, 17, 2, 8)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(kernels.attention(q, k, v), expected)


def test_a_sink_is_a_key_of_no_value():
    q, k, v, sinks = random(1, 6, 2, 4), random(1, 6, 2, 4), random(1, 6, 2, 4), random(2)
    o, lse = kernels.attention(q, k, v, sinks=sinks, return_lse=True)
    plain, plain_lse = kernels.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks.expand_as(plain_lse)))
    torch.testing.assert_close(o, plain * torch.exp(plain_lse - lse)[..., None])


def test_packed_sequences_equal_separate_calls():
    q, k, v = random(1, 12, 4, 8), random(1, 12, 2, 8), random(1, 12, 2, 8)
    cu_seqlens = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    packed = kernels.attention(q, k, v, cu_seqlens=cu_seqlens, window_size=3)
    parts = [
        kernels.attention(q[:, a:b], k[:, a:b], v[:, a:b], window_size=3)
        for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


def test_fewer_value_heads_equal_repeated_values():
    q, k, v = random(1, 9, 8, 4), random(1, 9, 4, 4), random(1, 9, 2, 6)
    repeated = v.repeat_interleave(2, dim=2)
    torch.testing.assert_close(kernels.attention(q, k, v), kernels.attention(q, k, repeated))


def test_rows_without_keys_have_zero_finite_gradients():
    q, k, v = random(1, 5, 1, 4, grad=True), random(1, 2, 1, 4, grad=True), random(1, 2, 1, 4)
    o, lse = kernels.attention(q, k, v, return_lse=True)
    assert o[:, :3].eq(0).all() and lse[:, :3].eq(-torch.inf).all()
    (o.sum() + lse[:, 3:].sum()).backward()
    assert q.grad[:, :3].eq(0).all() and q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"window_size": 2},
        {"causal": False},
        {"scale": 0.7},
        {"cu_seqlens": torch.tensor([0, 3, 4, 5], dtype=torch.int32)},
    ],
    ids=["causal", "window", "bidirectional", "scale", "packed"],
)
def test_attention_gradients(arguments):
    q, k, v = (
        random(1, 5, 4, 3, grad=True),
        random(1, 5, 2, 3, grad=True),
        random(1, 5, 1, 2, grad=True),
    )
    sinks = random(4, grad=True)

    def op(q, k, v, sinks):
        return kernels.attention(q, k, v, sinks=sinks, return_lse=True, **arguments)

    assert gradcheck(op, (q, k, v, sinks))


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "rope-free"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_latent_attention_is_attention_over_joined_widths(rope, causal):
    q_nope, k_nope, v = random(2, 6, 3, 4), random(2, 6, 3, 4), random(2, 6, 3, 5)
    q_rope, k_rope = (random(2, 6, 3, 2), random(2, 6, 2)) if rope else (None, None)
    o = kernels.latent_attention(q_nope, q_rope, k_nope, k_rope, v, causal=causal)
    scores = torch.einsum("bihd,bjhd->bhij", q_nope, k_nope)
    if rope:
        scores = scores + torch.einsum("bihd,bjd->bhij", q_rope, k_rope)
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    weights = (scores * (6 if rope else 4) ** -0.5).softmax(-1)
    torch.testing.assert_close(o, torch.einsum("bhij,bjhd->bihd", weights, v))


def test_latent_gradients():
    inputs = [
        random(1, 4, 2, 3),
        random(1, 4, 2, 2),
        random(1, 4, 2, 3),
        random(1, 4, 2),
        random(1, 4, 2, 2),
    ]
    inputs = [x.requires_grad_() for x in inputs]
    assert gradcheck(lambda *x: kernels.latent_attention(*x, window_size=3), inputs)
    lengths = torch.tensor([4, 2], dtype=torch.int32)
    decode = [random(2, 2, 3), random(2, 2, 2), random(2, 5, 3), random(2, 5, 2)]
    decode = [x.requires_grad_() for x in decode]
    assert gradcheck(lambda *x: kernels.latent_decode(*x, lengths, scale=0.5), decode)


@pytest.mark.parametrize("window_size", [None, 1, 3, 100])
def test_decode_is_the_last_row(window_size):
    lengths = [1, 5, 7]
    q, k, v, sinks = random(3, 6, 4), random(3, 7, 2, 4), random(3, 7, 2, 5), random(6)
    o = kernels.attention_decode(
        q, k, v, torch.tensor(lengths, dtype=torch.int32), window_size=window_size, sinks=sinks
    )
    for b, n in enumerate(lengths):
        full = kernels.attention(
            q[b : b + 1, None],
            k[b : b + 1, :n],
            v[b : b + 1, :n],
            window_size=window_size,
            sinks=sinks,
        )
        torch.testing.assert_close(o[b], full[0, 0])


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_decode_equals_a_loop_over_queries(case):
    inputs = case.inputs(torch.float64)
    bias = inputs["key_bias"]
    if case.latent:
        o = kernels.latent_decode(**inputs, **case.arguments)
        q, k, v, sinks = inputs["q_latent"], inputs["latent_cache"], inputs["latent_cache"], None
        if case.rope:
            q, k = torch.cat((q, inputs["q_rope"]), -1), torch.cat((k, inputs["rope_cache"]), -1)
        k, v = k[:, :, None], v[:, :, None]
    else:
        o = kernels.attention_decode(**inputs, **case.arguments)
        q, k, v, sinks = inputs["q"], inputs["k_cache"], inputs["v_cache"], inputs["sinks"]
    if case.q_tokens is None:
        q, o = q[:, None], o[:, None]
    scale = case.arguments["scale"] or case.width**-0.5
    heads = range(0, case.q_heads, max(1, case.q_heads // 3))
    for b in range(len(case.lengths)):
        for i in range(0, q.shape[1], 3):
            rows = sorted(case.seen_rows(b, i))
            for h in heads:
                k_head, v_head = h * k.shape[2] // case.q_heads, h * v.shape[2] // case.q_heads
                scores = scale * k[b, rows, k_head] @ q[b, i, h]
                if bias is not None:
                    scores = scores + bias[b, rows, h]
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double()))
                weights = scores.softmax(0)[: len(rows)]
                torch.testing.assert_close(o[b, i, h], weights @ v[b, rows, v_head])


@pytest.mark.parametrize("q_tokens", [None, 4])
def test_a_ring_equals_the_whole_cache(q_tokens):
    """While it holds all that the queries see: window_size + Tq - 1 rows."""
    whole = DecodeCase("", (40, 12, 5), 40, q_tokens, q_heads=6, k_heads=2, width=8, window_size=9)
    inputs = whole.inputs(torch.float64)
    rings = {name: torch.zeros_like(inputs[name][:, :12]) for name in ("k_cache", "v_cache")}
    for name, ring in rings.items():
        for sequence, length in enumerate(whole.lengths):
            for position in range(length):
                ring[sequence, position % 12] = inputs[name][sequence, position]
    expected = kernels.attention_decode(**inputs, window_size=9)
    torch.testing.assert_close(kernels.attention_decode(**inputs | rings, window_size=9), expected)


@pytest.mark.parametrize("window_size", [None, 3])
def test_tokens_at_once_equal_one_at_a_time(window_size):
    q, k, v = random(3, 4, 6, 8), random(3, 10, 2, 8), random(3, 10, 2, 8)
    lengths = torch.tensor([10, 7, 2], dtype=torch.int32)
    at_once = kernels.attention_decode(q, k, v, lengths, window_size=window_size)
    for i in range(4):
        until = (lengths - (3 - i)).clamp(min=0)
        alone = kernels.attention_decode(q[:, i], k, v, until, window_size=window_size)
        torch.testing.assert_close(at_once[:, i], alone)
    assert at_once[2, :2].eq(0).all()


def test_absorbed_decode_equals_expanded_attention():
    lengths = torch.tensor([6, 3], dtype=torch.int32)
    heads, nope, rope, latent_dim = 3, 4, 2, 5
    w_k, w_v = random(heads, nope, latent_dim), random(heads, nope, latent_dim)
    q_nope, q_rope = random(2, heads, nope), random(2, heads, rope)
    latent, k_rope = random(2, 6, latent_dim), random(2, 6, rope)
    scale = (nope + rope) ** -0.5
    q_latent = torch.einsum("bhd,hdc->bhc", q_nope, w_k)
    selected = kernels.latent_decode(q_latent, q_rope, latent, k_rope, lengths, scale=scale)
    absorbed = torch.einsum("bhc,hdc->bhd", selected, w_v)
    k = torch.cat(
        (torch.einsum("bsc,hdc->bshd", latent, w_k), k_rope[:, :, None].expand(-1, -1, heads, -1)),
        -1,
    )
    v = torch.einsum("bsc,hdc->bshd", latent, w_v)
    expanded = kernels.attention_decode(torch.cat((q_nope, q_rope), -1), k, v, lengths)
    torch.testing.assert_close(absorbed, expanded)


def test_rotation_is_llamas():
    x, position, theta = random(1, 5, 2, 6), torch.arange(5), 100.0
    angle = position[:, None] * theta ** (-torch.arange(0, 6, 2) / 6)
    rotated = kernels.rotate(x, angle.cos(), angle.sin())
    z = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * angle.double())[:, None]
    torch.testing.assert_close(rotated, torch.cat((z.real, z.imag), -1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        kernels.rotate(rotated, angle.cos(), -angle.sin()), x, atol=1e-6, rtol=0
    )


def genetic_inputs(environment, tokens=7, heads=4, width=4, value_heads=2):
    g = random(1, tokens, heads, width, grad=True)
    e = random(1, tokens, heads, width, grad=True) if environment == "query" else None
    v = random(1, tokens, value_heads, 3, grad=True)
    pressure = (torch.rand(heads, dtype=torch.float64) + 1).requires_grad_()
    angle = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1])
    return g, e, v, pressure, (angle.cos().double(), angle.sin().double())


ENVIRONMENTS = ["query", "kin", "none"]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("window_size", [1, 3, 100])
def test_genetic_attention_equals_its_definition(environment, window_size):
    g, e, v, pressure, rope = genetic_inputs(environment)
    o = kernels.genetic_attention(
        g, e, v, pressure, window_size=window_size, environment=environment, rope=rope
    )
    gamma = kernels.gene_fitness(g, e, window_size=window_size, environment=environment)
    p = g.sigmoid()
    eps = {"query": e, "kin": g}.get(environment)
    for i in range(7):
        window = slice(max(0, i - window_size + 1), i + 1)
        phi = p[0, window].mean(0)
        unnormalised = (1.0 if eps is None else eps[0, i].sigmoid()) / (phi + 0.5)
        fitness = unnormalised / unnormalised.sum(-1, keepdim=True)
        torch.testing.assert_close(gamma[0, i], fitness)
        r_gamma = kernels.rotate(fitness[None, None], rope[0][i : i + 1], rope[1][i : i + 1])[0, 0]
        r_p = kernels.rotate(p[:, window], rope[0][window], rope[1][window])[0]
        scores = torch.einsum("hd,jhd->hj", r_gamma, r_p) * pressure[:, None] * 2.0
        values = v[0, window].repeat_interleave(2, dim=1)
        torch.testing.assert_close(o[0, i], torch.einsum("hj,jhd->hd", scores.softmax(-1), values))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_genetic_gradients(environment):
    g, e, v, pressure, rope = genetic_inputs(environment, tokens=4, heads=2, value_heads=1)
    for window_size in (1, 2, 9):
        arguments = {"window_size": window_size, "environment": environment}
        inputs = (g, v, pressure) if e is None else (g, v, pressure, e)

        def op(g, v, pressure, e=None, arguments=arguments):
            return kernels.genetic_attention(g, e, v, pressure, rope=rope, **arguments)

        assert gradcheck(op, inputs)
        fitness_inputs = (g,) if e is None else (g, e)
        assert gradcheck(lambda *x, a=arguments: kernels.gene_fitness(*x, **a), fitness_inputs)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_genetic_backward_formulas(environment):
    """The hand-written backward that the kernels will use, against autograd."""
    g, e, v, pressure, (cos, sin) = genetic_inputs(environment)
    window, width = 3, 4
    arguments = {"window_size": window, "environment": environment}
    o = kernels.genetic_attention(g, e, v, pressure, rope=(cos, sin), **arguments)
    upstream = torch.randn_like(o)
    o.backward(upstream)

    p = g.detach().sigmoid()
    gamma = kernels.gene_fitness(g.detach(), None if e is None else e.detach(), **arguments)
    q = kernels.rotate(gamma * pressure.detach()[:, None] * 2.0, cos, sin).requires_grad_()
    k = kernels.rotate(p, cos, sin).requires_grad_()
    kernels.attention(q, k, v.detach(), scale=1.0, window_size=window).backward(upstream)
    dq, dk = kernels.rotate(q.grad, cos, -sin), kernels.rotate(k.grad, cos, -sin)

    kappa = pressure.detach()[:, None]
    torch.testing.assert_close(pressure.grad, width**0.5 * (dq * gamma).sum((0, 1, 3)))
    dgamma = kappa * width**0.5 * dq
    dl = gamma * (dgamma - (dgamma * gamma).sum(-1, keepdim=True))
    seen = torch.ones(7, 7).tril().triu(1 - window).double()
    share = seen / seen.sum(1, keepdim=True)
    phi = torch.einsum("ij,bjhd->bihd", share, p)
    dphi = -dl / (phi + 0.5)
    dp = dk + torch.einsum("ij,bihd->bjhd", share, dphi)
    dg = dp * p * (1 - p)
    if environment == "kin":
        dg = dg + (1 - p) * dl
    if environment == "query":
        torch.testing.assert_close(e.grad, (-e.detach()).sigmoid() * dl)
    torch.testing.assert_close(g.grad, dg)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_genetic_attention_sees_its_window_only(environment):
    g, e, v, pressure, rope = genetic_inputs(environment, tokens=12)
    window, row = 4, 7
    arguments = {"window_size": window, "environment": environment, "rope": rope}
    with torch.no_grad():
        clean = kernels.genetic_attention(g, e, v, pressure, **arguments)[:, row]
        for outside in (slice(0, row - window + 1), slice(row + 1, None)):
            g2, v2 = g.clone(), v.clone()
            g2[:, outside], v2[:, outside] = 50.0, 1e4
            e2 = None if e is None else e.clone()
            if e2 is not None:
                e2[:, outside] = -50.0
            changed = kernels.genetic_attention(g2, e2, v2, pressure, **arguments)[:, row]
            assert torch.equal(changed, clean)


def test_a_window_of_one_selects_oneself():
    g, e, v, pressure, rope = genetic_inputs("query")
    o = kernels.genetic_attention(g, e, v, pressure, window_size=1, rope=rope)
    torch.testing.assert_close(o, v.repeat_interleave(2, dim=2))


def test_packed_genetic_attention_equals_separate_calls():
    g, e, v, pressure, _ = genetic_inputs("query")
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = kernels.genetic_attention(g, e, v, pressure, window_size=3, cu_seqlens=cu_seqlens)
    parts = [
        kernels.genetic_attention(g[:, s], e[:, s], v[:, s], pressure, window_size=3)
        for s in (slice(0, 3), slice(3, 7))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


def test_the_closed_form_is_the_replicators_limit():
    """dx/dt = x (f - mean f) with fitness falling in x (phi + 1/2) settles where all f agree."""
    g = random(1, 4, 1, 5)
    gamma = kernels.gene_fitness(g, window_size=4, environment="none")[0, -1, 0]
    rarity = g.sigmoid()[0, :, 0].mean(0) + 0.5
    x = torch.full((5,), 0.2, dtype=torch.float64)
    for _ in range(2000):
        fitness = -x * rarity
        x = x + 0.5 * x * (fitness - (x * fitness).sum())
        x = x / x.sum()  # rounding would otherwise drift off the simplex
    torch.testing.assert_close(x, gamma, atol=1e-6, rtol=0)


def test_an_open_environment_is_the_published_form():
    """With e = 0 the query's environment re-weighs nothing; "none" is the normalised rarity."""
    g = random(2, 6, 3, 4)
    none = kernels.gene_fitness(g, window_size=3, environment="none")
    query = kernels.gene_fitness(g, torch.zeros_like(g), window_size=3)
    torch.testing.assert_close(query, none)
    torch.testing.assert_close(none.sum(-1), torch.ones(2, 6, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(dtype):
    q = torch.randn(1, 8, 2, 16).to(dtype)
    o, lse = kernels.attention(q, q, q, return_lse=True)
    assert o.dtype == dtype and lse.dtype == torch.float32
    gamma = kernels.gene_fitness(q, q, window_size=3)
    assert gamma.dtype == torch.float32
    pressure = torch.ones(2)
    assert kernels.genetic_attention(q, q, q, pressure, window_size=3).dtype == dtype


def test_visible_draws_the_documented_mask():
    position = torch.arange(4)
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    assert torch.equal(reference.visible(position, position, window_size=3), expected)
