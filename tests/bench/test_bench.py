"""The cost model, the resource report, and the benchmark's path from timing to table."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from bench import candidates, costs, resources, results
from bench.ptx import contracted_sums, unfenced_products
from kernels.core import tiles
from kernels.core.primitives import padded_width
from kernels.core.problem import even_rows
from kernels.core.tiles import Tile
from kernels.reference import visible
from tests.cases import AttentionCase, DecodeCase, GeneticCase, LatentCase

ROOT = Path(__file__).parents[2]
MULTIPLYING = "forward", "dq", "dq_excess", "dkdv", "decode"  # kernels with products
FITNESS = "totals", "fitness", "share", "dg"  # whose programs are priced
OTHERS = "delta", *FITNESS, "gene_decode"


def python(*arguments, **environment):
    outer = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**outer, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 1), (True, 7), (True, 100)]
)
def test_pairs_are_those_that_are_seen(tokens, causal, window):
    position = torch.arange(tokens)
    seen = visible(position, position, causal=causal, window_size=window)
    case = AttentionCase("x", q_tokens=tokens, window_size=window, causal=causal)
    assert costs.unmasked_pairs(case) == int(seen.sum())


def test_flops_are_two_products_forward_and_five_backward():
    case = AttentionCase("x", batch=2, q_tokens=8, q_heads=3, width=16, v_width=32, causal=False)
    assert costs.flops(case, "forward") == 2 * 3 * 64 * 2 * (16 + 32)
    assert costs.flops(case, "backward") == 2.5 * costs.flops(case, "forward")
    latent = LatentCase("x", 2, 8, heads=3, nope=12, rope=4, v_width=32, causal=False)
    assert costs.flops(latent, "forward") == costs.flops(case, "forward")
    genetic = GeneticCase("x", 2, 8, heads=3, width=16, v_width=32, window_size=5)
    selection = AttentionCase("x", 2, 8, q_heads=3, width=16, v_width=32, window_size=5)
    assert costs.flops(genetic, "backward") == costs.flops(selection, "backward")


# `make matrix` compiles all that Hopper has here for the other architectures too, and all packed.
# To disassemble takes as long as to compile, and nobody looks at all of it.
COMPILE = """
import json, pathlib, sys, torch
from dataclasses import asdict
from bench import compiled, resources

file, read = sys.argv[1], [f"{name}_kernel\\0".encode() for name in sys.argv[2:]]
flags = ["--arch", "90", "--width", "64", "--dtype", "bfloat16", "--json"]
shape = 64, torch.bfloat16
disassemble = compiled._disassemble
compiled._disassemble = lambda cubin: (
    disassemble(cubin) if any(b"\\0" + name in cubin for name in read) else ""
)
assert resources.main([*flags, file]) == 0
found = {"90": json.loads(pathlib.Path(file).read_text())["rows"]}
more = {
    "100": resources.attention_rows(100, *shape),
    "packed": [
        *resources._direction_rows(90, "forward", resources._problem(*shape, 0, packed=True)),
        *resources.fitness_rows(90, *shape, packed=True),
    ],
    "biased": resources._direction_rows(90, "dq", resources._problem(*shape, 0, biased=True)),
}
found |= {k: [asdict(row) | {"faults": row.faults} for row in rows] for k, rows in more.items()}
pathlib.Path(file).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of the SmolLM shape, compiled with no GPU: for two architectures, and packed."""
    file = tmp_path_factory.mktemp("compiled") / "rows.json"
    flags = file, *MULTIPLYING, *FITNESS
    done = python("-c", COMPILE, *flags, TRITON_INTERPRET="0", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_the_smollm_shape_compiles_within_its_registers(arch, compiled):
    """With no faults, and on Hopper wgmma, not serialised.

    The Triton that the tiles were chosen with spills nothing at all.
    """
    rows = compiled[str(arch)]
    assert not any(row.get("faults") for row in rows)  # of Hopper the report's exit status told
    assert {row["arch"] for row in rows} == {arch}
    attention = {"forward", "delta", "dq", "dkdv", "dq_excess"}
    kernels = {*MULTIPLYING, *OTHERS} if arch == 90 else attention
    assert {row["kernel"] for row in rows} == kernels
    if (arch, triton.__version__) == (90, "3.7.1"):  # of bench/results/predicted-sm_90.txt
        tiles = [(*row["cycles"], row["kernel"], row["block_m"]) for row in rows if row["cycles"]]
        assert tiles == [
            (373, 488, "forward", 128),
            (586, 585, "forward", 64),
            (445, 513, "dq", 128),
            (801, 976, "dkdv", 64),
            (594, 735, "dq_excess", 128),
            (251, "totals", 32),
            (1359, "fitness", 32),
            (1943, "share", 32),
            (1463, "dg", 32),
        ]
    for row in rows:
        assert row["spill_bytes"] == 0 or not triton.__version__.startswith("3.7.")
        assert row["ctas_per_sm"] >= 1
        if row["kernel"] in MULTIPLYING:
            height = row["block_n" if row["kernel"] == "dkdv" else "block_m"]
            wgmma = arch == 90 and height >= 64  # fewer rows are too few for it
            used = {name for name, count in row["instructions"].items() if count}
            assert "LDGSTS" in used or row["num_stages"] == 1
            assert "HGMMA" in used if wgmma else used & {"HMMA", "UTCHMMA"}


@pytest.mark.slow
def test_biased_launches_compile(compiled):
    """In tiles of their own, whose keys' biases take registers."""
    (row,) = compiled["biased"]
    assert row["kernel"] == "dq"
    assert not row["faults"] or triton.__version__.startswith("3.6.")  # whose loop spills
    tile = tiles.HALF_PRECISION[90]["biased_dq"][64]
    assert (row["block_m"], row["block_n"]) == (tile.block_m, tile.block_n)


@pytest.mark.slow
def test_packed_launches_compile(compiled):
    """Sinks, and fitness without selection, take branches that the report's others do not."""
    rows = compiled["packed"]
    assert [row["kernel"] for row in rows] == ["forward", "totals", "fitness", "share", "dg"]
    assert not any(row["faults"] for row in rows)


def test_candidates_are_ranked_by_predicted_cycles(monkeypatch):
    """Those that spill come last, however few cycles they take."""
    first, slow, faulty = Tile(64, 64, 4, 2), Tile(128, 64, 4, 3), Tile(32, 128, 8, 2)
    found = {first: (801, 0), slow: (900, 0), faulty: (500, 72)}

    def compiled(arch, direction, problem):
        tile = candidates.table(arch)[direction][64]
        cycles, spilled = found[tile]
        row = dataclasses.replace(GOOD_ROW, kernel=direction, num_stages=tile.num_stages)
        return [
            dataclasses.replace(
                row, block_m=tile.block_m, cycles=(cycles, cycles), spill_bytes=spilled
            )
        ]

    monkeypatch.setattr(resources, "_direction_rows", compiled)
    monkeypatch.setattr(
        candidates, "ALTERNATIVES", {90: {"dkdv": {64: ((32, 128, 8, 2), (128, 64, 4, 3))}}}
    )
    monkeypatch.setitem(tiles.HALF_PRECISION, 90, {"dkdv": {64: first}})
    monkeypatch.setattr(tiles, "BY_TRITON", {})
    (rows,) = resources.ranked_rows(90, 64, torch.bfloat16).values()
    assert [row.block_m for row in rows] == [64, 128, 32]


def test_every_padded_width_has_its_rows():
    even = {int(even_rows(torch.empty(d)).numel()) for d in range(1, 257)}
    assert even == {d for d, _ in resources.EVEN_WIDTHS}
    walked = resources.EVERY_WIDTH + resources.EVERY_LATENT_WIDTH
    for ragged in (False, True):
        columns = {padded_width(d) for d, _ in walked if bool(d % 16) == ragged}
        assert columns == {padded_width(d) for d in range(1, 513)}


def test_short_windows_weigh_masked_tiles():
    """In a window of 256, 64 queries meet 3 interior and 2 masked tiles, 128 queries 2 and 4."""
    small = dataclasses.replace(GOOD_ROW, cycles=(585, 576))
    large = dataclasses.replace(small, block_m=128, cycles=(383, 540))
    assert resources._cost(small, 256) == 3 * 585 + 2 * 576
    assert resources._cost(large, 256) == 2 * 383 + 4 * 540
    assert resources._cost(large, None) == 383
    assert resources._cost(GOOD_ROW, 256) == float("inf")


GOOD_ROW = resources.Row(
    arch=90, kernel="dq", dtype="bfloat16", width="64", block_m=64, block_n=64, num_warps=4,
    num_stages=2, registers=150, spill_bytes=0, shared_bytes=49152, ctas_per_sm=3,
    instructions=dict.fromkeys(resources.INSTRUCTIONS, 1), warnings=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spill_bytes": 64}, None),
        ({"spill_bytes": 72}, "spills 72 bytes"),
        ({"spill_bytes": 72, "loop_spills": 1}, "spills 72 bytes"),
        ({"spill_bytes": 512, "loop_spills": 0}, None),
        ({"spill_bytes": 520, "loop_spills": 0}, "spills 520 bytes"),
        ({"warnings": ("ptxas info : (C7510) ...",)}, "wgmma serialised"),
        ({"warnings": ("ptxas info : (C7512) ...",)}, "wgmma serialised"),
        ({"warnings": ("ptxas info : (C7515) ...",)}, "wgmma serialised"),
        ({"unfenced": 2}, "2 wgmma unfenced"),
        ({"contracted": 1}, "1 sums fused with products"),
        ({"shared_bytes": 240_000}, "too much shared memory"),
        ({"instructions": dict.fromkeys(resources.INSTRUCTIONS, 0)}, "no wgmma"),
        ({"instructions": dict.fromkeys(resources.INSTRUCTIONS, 0), "width": "62"}, None),
    ],
    ids=[
        "none",
        "spills few",
        "spills",
        "spills-in-a-loop",
        "spills-outside",
        "spills-much-outside",
        "C7510",
        "C7512",
        "C7515",
        "unfenced",
        "contracted",
        "shared",
        "wgmma",
        "ragged",
    ],
)
def test_a_tile_with_a_fault_fails_the_report(change, fault, tmp_path, monkeypatch, capsys):
    row = dataclasses.replace(GOOD_ROW, **change)
    monkeypatch.setattr(resources, "compiled_rows", lambda *_: [row])
    summary = tmp_path / "summary.txt"
    flags = ["--arch", "90", "--width", "64", "--dtype", "bfloat16", "--summary", str(summary)]
    assert resources.main(flags) == (1 if fault else 0)
    printed = capsys.readouterr().out
    assert (fault or "dq") in printed
    assert printed.endswith(f"\n1 kernels, {1 if fault else 0} with faults\n")
    line = f"bfloat16 {row.width}: dq 64x64/4/2 150{f' {fault}' if fault else ''}"
    assert line in summary.read_text().splitlines()


def test_products_whose_operands_are_written_behind_the_fence_are_counted():
    fence, product = "wgmma.fence.sync.aligned;", "wgmma.mma_async.m64n8k16 {%r1}, {%r5,%r6}, %rd1;"
    written, shared = "mov.b32 %r6, {%rs1, %rs2};", "wgmma.mma_async.m64n8k16 {%r6}, %rd2, %rd1;"
    assert unfenced_products("\n".join((written, fence, "add.s32 %r7, %r6, 1;", product))) == 0
    assert unfenced_products("\n".join((fence, written, product, shared, product))) == 2
    assert unfenced_products("\n".join((fence, written, shared, fence, product))) == 0


def test_sums_over_lanes_that_are_fused_with_products_are_counted():
    """Rounded first, or added to what no other lane has, a product may be fused."""
    product, other = "mul.f32 \t%r3, %r1, %r2;", "shfl.sync.bfly.b32 \t%r4, %r3, 16, 31, -1;"
    rounded = "fma.rn.f32 \t%r3, %r1, %r2, 0f00000000;"
    fused, added = "fma.rn.f32 \t%r5, %r1, %r2, %r4;", "add.f32 \t%r5, %r3, %r4;"
    own = "fma.rn.f32 \t%r5, %r4, %r2, %r1;"
    assert contracted_sums("\n".join((product, other, fused))) == 1
    assert contracted_sums("\n".join((product, other, added))) == 1
    assert contracted_sums("\n".join((rounded, other, added, own))) == 0


@pytest.mark.slow
def test_host_times_are_of_every_op():
    done = python("-m", "bench.bench_host", "--rounds", "1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    bare, *ops = done.stdout.splitlines()[2:]
    assert bare.split()[-1] == "1.0"
    assert {line.split()[0] for line in ops} == {
        "attention", "latent_attention", "genetic_attention",
        "attention_decode", "latent_decode", "genetic_decode",
    }  # fmt: skip
    assert all(float(line.split()[-1]) > 1 for line in ops)


def test_cache_bytes_are_those_of_the_rows_that_are_seen():
    case = DecodeCase("x", (40, 3), q_heads=6, k_heads=2, v_heads=1, width=16, window_size=10)
    assert costs.cache_bytes(case) == 2 * (10 + 3) * (2 * 16 + 16)
    latent = DecodeCase("x", (40, 3), 40, width=24, rope=8, latent=True)
    assert costs.cache_bytes(latent) == 2 * 43 * 32


def test_fitness_bytes_are_those_of_its_inputs_and_outputs():
    case = GeneticCase("x", tokens=33, heads=3, width=16)
    of_g = case.inputs(torch.bfloat16)["g"].nbytes
    assert costs.fitness_bytes(case, "forward") == 4 * of_g  # g, e to q, k
    assert costs.fitness_bytes(case, "backward") == 6 * of_g  # g, e, dq, dk to dg, de
    kin = dataclasses.replace(case, environment="kin")
    assert costs.fitness_bytes(kin, "forward") == 3 * of_g
    assert costs.fitness_bytes(kin, "backward") == 4 * of_g


@pytest.mark.slow
def test_from_timing_to_table(tmp_path):
    raw = tmp_path / "raw.json"
    files = [f"bench/bench_{name}.py" for name in ("attention", "decode", "genetic")]
    done = python(
        "-m", "pytest", "-n", "0", "-p", "tests.conftest", *files, f"--benchmark-json={raw}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert results.main(["collect", str(raw), "--output", str(tmp_path)]) == 0
    collected = json.loads((tmp_path / "no-gpu.json").read_text())
    training = {"ours", "sdpa math", "eager"}
    decoding = {"ours", "sdpa", "copy"}
    selection = {"ours", "attention", "eager"}
    assert {(r["case"], r["direction"], r["system"], r["unit"]) for r in collected["rows"]} == {
        *((case, direction, system, "TFLOP/s")
          for case in ("tiny", "tiny-mla")
          for direction in ("forward", "backward")
          for system in training),
        *((case, "decode", system, "GB/s")
          for case in ("gqa-9-3-2-40", "mla-9-288+32-2-40")
          for system in decoding),
        *(("tiny-mga", direction, system, "TFLOP/s")
          for direction in ("forward", "backward")
          for system in selection),
        *(("tiny-mga fitness", direction, system, "GB/s")
          for direction in ("forward", "backward")
          for system in ("ours", "copy")),
    }  # fmt: skip
    assert all(r["milliseconds"] > 0 and r["rate"] > 0 for r in collected["rows"])
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    for _ in range(2):  # a second table takes the first one's place
        results.main(["render", str(tmp_path / "no-gpu.json"), "--readme", str(readme)])
    assert readme.read_text().count("| tiny | backward |") == 1
    assert readme.read_text().count("| gqa-9-3-2-40 | decode |") == 1
    assert (tmp_path / "no-gpu.png").read_bytes().startswith(b"\x89PNG")
