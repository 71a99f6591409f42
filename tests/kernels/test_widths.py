"""Every width that the public ops accept has a tile; the others are refused by name."""

import contextlib
import itertools
import re
from functools import cache

import pytest
import torch
import triton

import kernels
from kernels import checks
from kernels.core import backward, decode, tiles
from kernels.core.primitives import padded_width
from kernels.core.problem import Problem, even_rows, is_ragged, without_padding

ARCHITECTURES = 80, 90, 100, 120
DTYPES = torch.float16, torch.bfloat16, torch.float32
ROW = torch.zeros(1, 1, 1, 1024)


@cache
def columns_of(widest, most_rope):
    """The columns of every pair of a width and a rotary part that the ops' checks accept."""
    rows = [ROW[..., :width] for width in range(widest + 2)]
    padded = [padded_width(width) if width else 0 for width in range(widest + 2)]
    accepted = set()
    for width in range(1, widest + 2):
        for rope in range(most_rope + 1):
            inputs = {"q": rows[width], "q_rope": rows[rope] if rope else None}
            with contextlib.suppress(ValueError):
                checks.implementation("triton", inputs, widest)
                accepted.add(padded[width] + padded[rope])
    return accepted


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_accepted_width_has_a_tile(arch, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: arch)
    attention, latents = columns_of(256, 256), columns_of(512, 100)
    assert max(attention) == 256 and max(latents) == 576
    directions = dict.fromkeys(("forward", "dq", "dkdv", "fitness"), attention)
    for direction, columns in (directions | {"decode": attention | latents}).items():
        for dtype in DTYPES:
            q = torch.empty(1, dtype=dtype, device="meta")
            for width in columns:
                for kind in itertools.product((False, True), repeat=3):
                    tile = tiles.choose(direction, q, tiles.Width(width, *kind))
                    assert tile.block_m >= 16, (direction, dtype, width, kind)


def test_a_bias_takes_tiles_of_its_own(monkeypatch):
    """The same whatever the window; where the table has none, those of launches without."""
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    q, bias = (
        torch.empty(1, 4, n, 64, dtype=t, device="meta")
        for n, t in ((2, torch.bfloat16), (2, torch.float64))
    )
    plain = Problem(q, q, q, scale=1.0)
    biased = plain._replace(key_bias=bias[..., 0])
    short = biased._replace(window_size=5)
    table = tiles.HALF_PRECISION[90]
    for problem, direction, expected in (
        (plain, "forward", table["forward"][96]),
        (biased, "forward", table["biased_forward"][64]),
        (short, "forward", table["biased_forward"][64]),
        (biased, "dq", table["biased_dq"][64]),
        (biased, "dkdv", tiles.choose("dkdv", q, tiles.tile_width(plain.kernel_arguments))),
    ):
        width = tiles.tile_width(problem.kernel_arguments)
        assert tiles.choose(direction, q, width) == expected


def test_a_version_of_triton_takes_tiles_of_its_own(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    half, full = (torch.empty(1, dtype=t, device="meta") for t in (torch.bfloat16, torch.float32))
    asked = ("dkdv", half, 64), ("dkdv", half, 96), ("dkdv", full, 64), ("fitness", full, 64)
    chosen = {}
    for version in ("3.6.0", "3.7.1"):
        monkeypatch.setattr(triton, "__version__", version)
        chosen[version] = [
            tiles.choose(direction, q, tiles.Width(width, plain=False))
            for direction, q, width in asked
        ]
    older, newer = chosen.values()
    assert older[0] == tiles.Tile(32, 64, 4, 3) != newer[0]
    assert older[1:3] == newer[1:3]
    assert older[3] == tiles.Tile(16, 16, 4, 1) != newer[3]


@pytest.mark.parametrize(
    ("width", "rope", "served"),
    [
        (128, 64, True),
        (192, 64, True),
        (64, 128, True),
        (128, 128, True),
        (193, 1, False),
        (129, 97, False),
        (256, 1, False),
        (1, 241, False),
    ],
)
def test_joint_widths_of_training(width, rope, served):
    part = ROW[..., :width]
    arguments = part, ROW[..., :rope], part, ROW[0, ..., :rope], ROW[..., :8]
    assert kernels.latent_attention(*arguments, impl="eager").shape == (1, 1, 1, 8)
    if served:
        assert kernels.latent_attention(*arguments, impl="triton").shape == (1, 1, 1, 8)
        return
    columns = f"got {padded_width(width)} + {padded_width(rope)} for widths {width} + {rope}"
    text = f"q_rope: expected at most 256 columns of tiles with q_nope for Triton, {columns}"
    with pytest.raises(ValueError, match=re.escape(text)):
        kernels.latent_attention(*arguments, impl="triton")


@pytest.mark.parametrize(
    ("width", "rope", "served"),
    [(512, 64, True), (384, 128, True), (512, 65, False), (385, 65, False), (320, 257, False)],
)
def test_joint_widths_of_decoding(width, rope, served):
    latent, rotary = ROW[0, ..., :width], ROW[0, ..., :rope]
    length = torch.ones(1, dtype=torch.int32)

    def decode(impl):
        caches = latent[..., :width], rotary[..., :rope]
        return kernels.latent_decode(latent, rotary, *caches, length, scale=1.0, impl=impl)

    assert decode("eager").shape == (1, 1, width)
    if served:
        assert decode("triton").shape == (1, 1, width)
        return
    with pytest.raises(ValueError, match=r"^q_rope: expected .* with q_latent for Triton, got "):
        decode("triton")


PLANES = (1 + torch.arange(2.0 * 9 * 3 * 80)).reshape(2, 9, 3, 80).bfloat16()


@pytest.mark.parametrize(
    ("rows", "ragged"),
    [
        (PLANES, False),
        (PLANES[..., :64], False),
        (PLANES[..., 16:], False),
        (PLANES.transpose(1, 2), False),
        (PLANES[..., :32], False),
        (PLANES[..., :16], True),
        (PLANES[..., :63], True),
        (PLANES[..., 1:65], True),
        (torch.zeros(2, 9, 3, 65)[..., :64], True),
        (torch.zeros(2, 9, 3 * 64 + 1)[..., :-1].unflatten(-1, (3, 64)), True),
    ],
    ids=[
        "whole",
        "first",
        "aligned",
        "heads-first",
        "32",
        "16",
        "width",
        "address",
        "stride",
        "row-stride",
    ],
)
def test_ragged_rows(rows, ragged):
    assert is_ragged(rows) == ragged


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (PLANES[..., :63], 64),
        (PLANES[..., 1:65], 64),
        (PLANES[..., :16], 32),
        (PLANES[..., :1].transpose(-1, 0), 32),
        (PLANES[..., 1:80], 80),
        (PLANES[:0, ..., :7], 32),
    ],
    ids=["width", "address", "narrow", "one-column", "two-tiles", "empty"],
)
def test_even_rows_are_ragged_ones_and_zeros(rows, width):
    even = even_rows(rows)
    assert even.shape == (*rows.shape[:-1], width) and not is_ragged(even)
    assert torch.equal(without_padding(even, rows.shape[-1]), rows)
    assert not even[..., rows.shape[-1] :].any()


def test_even_rows_are_no_copy():
    assert even_rows(PLANES) is PLANES
    problem = Problem(PLANES, PLANES[..., 1:65], PLANES[..., 1:], q_rope=PLANES)
    even = problem.even
    assert even.q is PLANES and even.q_rope is PLANES and even.k_rope is None
    assert even.k.shape[-1] == 64 and even.v.shape[-1] == 80


def width_of(d_qk=64, d_v=64, d_rope=0, ragged=False):
    return tiles.row_width(d_qk, d_rope, d_v, ragged, short=False)


def test_rows_of_two_parts_take_the_tiles_of_wider_ones():
    assert width_of(128).columns == 128
    assert width_of(64, d_rope=64).columns == 192
    assert width_of(128, d_rope=64).columns == 192


@pytest.mark.parametrize(("q_tokens", "q_heads", "k_heads", "rows"), [
    (1, 9, 3, 16), (2, 9, 3, 16), (5, 9, 3, 16), (6, 9, 3, 32), (16, 9, 3, 64), (64, 9, 3, 64),
    (16, 9, 9, 16), (1, 32, 1, 32),
])  # fmt: skip
def test_new_tokens_and_heads_of_a_group_share_a_tile(
    q_tokens, q_heads, k_heads, rows, monkeypatch
):
    """And few rows have tiles of more keys, further ahead."""
    launched = {}
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(decode, "launch", lambda *_, **given: launched.update(given))
    q, k = (
        torch.empty(2, t, h, 64, dtype=torch.bfloat16, device="meta")
        for t, h in ((q_tokens, q_heads), (99, k_heads))
    )
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    decode.launch_decode(q, k, k, None, None, lengths, None, None, None, 1.0)
    assert launched["BLOCK_M"] == rows
    assert (launched["BLOCK_N"], launched["num_stages"]) == ((64, 4) if rows == 16 else (32, 3))


@pytest.mark.parametrize("name", [None, "q", "k", "v"])
def test_one_ragged_tensor_makes_a_decoding_plain(name, monkeypatch):
    launched = {}
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(decode, "launch", lambda *_, **given: launched.update(given))
    memory = torch.empty(2, 40, 3, 66, dtype=torch.bfloat16, device="meta")
    even = memory[..., :64].contiguous()
    rows = dict.fromkeys("qkv", even) | ({name: memory[..., 1:65]} if name else {})
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    decode.launch_decode(*rows.values(), None, None, lengths, None, None, None, 1.0)
    table = tiles.PLAIN if name else tiles.HALF_PRECISION[90]
    assert launched["BLOCK_N"] == table["decode"][64].block_n
    assert launched["num_stages"] == table["decode"][64].num_stages


@pytest.mark.parametrize("tokens", [64, 63])
def test_the_number_of_tokens_makes_no_tile_plain(tokens, monkeypatch):
    """Even where rows of the lse, as many numbers, begin off multiples of 16."""
    stages = []
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(backward, "launch", lambda *_, **given: stages.append(given))
    q = torch.empty(2, tokens, 3, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(2, 3, 1, tokens, device="meta")
    backward.launch_backward(Problem(q, q, q), q, lse, q, q, None, False)
    chosen = [given["num_stages"] for given in stages[1:]]
    assert chosen == [tiles.HALF_PRECISION[90][name][64].num_stages for name in ("dq", "dkdv")]


@pytest.mark.parametrize(
    ("d_qk", "d_v", "plain"),
    [(32, 64, False), (32, 80, True), (32, 256, True), (48, 256, False), (64, 256, False)],
)
def test_narrow_keys_of_wide_values_are_plain(d_qk, d_v, plain):
    assert width_of(d_qk, d_v).plain == plain
