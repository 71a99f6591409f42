"""Plant one fault at a time in a copy of the kernels; each must fail the parity tests.

`make mutants` or `python tests/mutants.py`; exits with 1 when a fault survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRIMITIVES, SOFTMAX, FORWARD, BACKWARD, DECODE, GENE_DECODE, FITNESS, WINDOWS, PROBLEM, OP = (
    f"kernels/{name}.py"
    for name in (
        "core/primitives", "core/softmax", "core/forward", "core/backward", "core/decode",
        "core/gene_decode", "core/fitness", "core/windows", "core/problem", "attention",
    )
)  # fmt: skip
MUTANTS = {
    "window off by one": (PROBLEM, "UNLIMITED) - 1", "UNLIMITED)"),
    "wrong kv head": (FORWARD, "head * k_heads // q_heads", "head % k_heads"),
    "wrong kv head in dq": (BACKWARD, "head * k_heads // q_heads", "head % k_heads"),
    "scale 1 % off": (PROBLEM, "return scale * LOG2_E", "return 1.01 * scale * LOG2_E"),
    "one dropped key in the forward": (PRIMITIVES, "partner[None, :] - first[:, None]",
                                       "partner[None, :] - first[:, None] - 1"),
    "one key too many in the forward": (PRIMITIVES, "place.to(tl.uint32) <",
                                        "place.to(tl.uint32) <="),
    "one dropped key": (PRIMITIVES, "partner[None, :] >= first", "partner[None, :] > first"),
    "one key too many": (PRIMITIVES, "partner[None, :] < end", "partner[None, :] <= end"),
    "o not rescaled": (FORWARD, "scale_rows(o, rescale[:, None])", "o"),
    "row sum not rescaled": (SOFTMAX, "row_sum * rescale +", "row_sum +"),
    "left edge unmasked": (PRIMITIVES, "(start < bounds[1]) |", "(start < bounds[0]) |"),
    "right edge unmasked": (PRIMITIVES, "PARTNER_BLOCK > bounds[2])", "PARTNER_BLOCK > bounds[3])"),
    "softmax of no keys is nan": (SOFTMAX, "tl.maximum(new_max_log2, LOWEST)", "new_max_log2"),
    "heads restart where the last ended": (BACKWARD, "tl.where(turns != 0, bounds[0], start)",
                                           "start"),
    "lse of the first head for all": (BACKWARD, "lse_log2_ptr += turns * LSE_PARTS * q_tokens",
                                      "lse_log2_ptr += 0 * turns"),
    "sequences aligned at the start": (PROBLEM, "\"shift\": k_tokens - q_tokens,", "\"shift\": 0,"),
    "packed tokens in the next sequence": (PROBLEM, "right=True", "right=False"),
    "dlse of the wrong sign": (BACKWARD, "delta -= load_vector(dlse", "delta += load_vector(dlse"),
    "delta of o as stored": (BACKWARD, "whole += rest[part].to(tl.float32)", "whole += 0.0"),
    "rest of the wrong sign": (PRIMITIVES, "tiles[part] - cast(tiles[part], dtype).to(tl.float32)",
                               "cast(tiles[part], dtype).to(tl.float32) - tiles[part]"),
    "delta left out": (SOFTMAX, "weights * (dweights - delta)", "weights * dweights"),
    "dq not scaled": (BACKWARD, "    dq = scale_rows(dq, scale_log2 / LOG2_E)\n", ""),
    "a query head left out of dk": (BACKWARD, "BLOCK_M) * heads)", "BLOCK_M) * (heads - 1))"),
    "a key head left out of dv": (BACKWARD, "+ 1) * k_per_v)", "+ 1) * k_per_v - 1)"),
    "sinks left out of the sum": (FORWARD, "row_sum += 1.0", "row_sum += 0.0"),
    "dsinks of the wrong sign": (OP, "dsinks = -(", "dsinks = ("),
    "scores without their bias": (SOFTMAX, " + difference * LOG2_E", ""),
    "bias without the digits of fp64": (PROBLEM, "rest = bias - parts[0]",
                                        "rest = bias - bias"),
    "bias of the first head for all": (BACKWARD, "bias_ptr += turns * BIAS_PARTS * k_tokens",
                                       "bias_ptr += 0 * turns"),
    "dbias of all heads so far": (BACKWARD, "tl.where(turns != 0, 0.0, dbias)", "dbias"),
    "sinks beside other scores": (FORWARD, "sinks -= tl.reshape", "sinks -= 0.0 * tl.reshape"),
    "rope left out of the scores": (PRIMITIVES, "range(len(a))", "range(1)"),
    "a head left out of dk_rope": (BACKWARD, "shares.sum(2)", "shares[:, :, 1:].sum(2)"),
    "rope at another head": (FORWARD, "k_rope_ptr, k_rope_strides, batch, 0,",
                             "k_rope_ptr, k_rope_strides, batch * 0, 0,"),
    "columns past the first tile unmasked": (PRIMITIVES, "BLOCK, D - MAIN, REST),)",
                                             "BLOCK, REST, REST),)"),
    "decode: newest key unseen": (DECODE, "// group + 1  # positions", "// group  # positions"),
    "decode: window off by one": (DECODE, "first = tl.maximum(end - window,",
                                  "first = tl.maximum(end - window - 1,"),
    "decode: ring not turned": (DECODE, "(begin // capacity + turn)", "turn"),
    "decode: a split too short": (DECODE, "split_begin + tiles_of_split",
                                  "split_begin - 1 + tiles_of_split"),
    "decode: sinks in every split": (DECODE, "tl.where(split == 0, sinks * LOG2_E, row_max_log2)",
                                     "sinks * LOG2_E"),
    "decode: splits not weighed": (DECODE, "partial * tl.exp2(part_log2 - lse_log2)[:, None]",
                                   "partial / splits"),
    "decode: wrong value head": (DECODE, "k_head * v_heads // k_heads", "k_head % v_heads"),
    "genes: newest left out": (GENE_DECODE, "token + 1\n", "token\n"),
    "genes: window off by one": (GENE_DECODE, "end - window,", "end - window - 1,"),
    "genes: overwritten rows counted": (GENE_DECODE, "length - capacity)", "-capacity)"),
    "genes: ring not turned": (GENE_DECODE, "begin, stop = 0, rest", "begin, stop = 0, 0"),
    "genes: rows behind the window": (GENE_DECODE, "start, begin, stop, BLOCK",
                                      "start, 0, capacity, BLOCK"),
    "genes: a tile replaces the last": (GENE_DECODE, "add_rows(sums, sum_rows(genes))",
                                        "sum_rows(genes)"),
    "genes: every window full": (GENE_DECODE, "tl.maximum(end - first, 1)",
                                 "(0 * end + window)"),
    "genes: one environment for all": (GENE_DECODE, "load_halves(logits_matrix, token",
                                       "load_halves(logits_matrix, 0"),
    "genes: one pressure for all": (GENE_DECODE, "pressure_ptr + head", "pressure_ptr"),
    "genes: one rotation for all": (GENE_DECODE, "sin_ptr + table, token,", "sin_ptr + table, 0,"),
    "fitness: a total too many": (WINDOWS, "begin, BLOCK), end // BLOCK",
                                  "begin, BLOCK), end // BLOCK + 1"),
    "fitness: a total too early": (WINDOWS, "tl.cdiv(begin, BLOCK), end", "begin // BLOCK, end"),
    "fitness: totals left out": (WINDOWS, "range(first_block, end_block, BLOCK)",
                                 "range(end_block, end_block, BLOCK)"),
    "fitness: one rest for both": (WINDOWS, "(tail, end) if side else (begin, head_end)",
                                   "(begin, head_end)"),
    "fitness: far a token too near": (WINDOWS, "shift = -behind", "shift = 1 - behind"),
    "fitness: far gradients a token too near": (WINDOWS, "shift = behind", "shift = behind - 1"),
    "fitness: the last begins too late": (WINDOWS, "run_end - 1 - behind", "run_end - 2 - behind"),
    "fitness: a run past its window": (WINDOWS, "tl.minimum(begin + behind + 1, end), stop",
                                       "end, stop"),
    "fitness: a run past its sequence": (WINDOWS, "tl.minimum(begin + behind + 1, end), stop",
                                         "begin + behind + 1, stop"),
    "fitness: a segment counted twice": (WINDOWS, "there < here", "there <= here"),
    "fitness: far summed forward": (WINDOWS, "far[part], not LOOKS_BACK", "far[part], LOOKS_BACK"),
    "fitness: every window full": (FITNESS, "population = (end - first)",
                                   "population = (0 * end + behind + 1)"),
    "fitness: eps underflows": (FITNESS, "tl.minimum(most_of_columns(known), 0.0)",
                                "0.0 * most_of_columns(known)"),
    "fitness: padding counted": (FITNESS, "weights = keep_columns(weights, 0.0, D_FIRST, D_SECOND)",
                                 ""),
    "fitness: one pressure for all": (FITNESS, " + head).to(tl.float32) * scale if SELECTS else 1.0"
                                      "\n    q, _,",
                                      ").to(tl.float32) * scale if SELECTS else 1.0\n    q, _,"),
    "fitness: shares summed behind": (FITNESS, "False, False,", "False, True,"),
    "fitness: shares of no mean": (FITNESS, "reciprocal(commonness[part]) * one_share",
                                   "reciprocal(commonness[part])"),
    "fitness: dgamma not centred": (FITNESS, "(dgamma[part] - mean)", "dgamma[part]"),
    "fitness: dgamma rotated again": (FITNESS, "rotate(dgamma, cos, scale_rows(sin, -1.0))",
                                      "rotate(dgamma, cos, sin)"),
    "fitness: dk rotated again": (FITNESS, "rotate(dk, cos, scale_rows(sin, -1.0))",
                                  "rotate(dk, cos, sin)"),
    "fitness: dk left out": (FITNESS, "dp = add_rows(dp, dk)", "dp = add_rows(dp, dp)"),
    "fitness: kin left out": (FITNESS, 'ARE_KIN=environment == "kin"', "ARE_KIN=False"),
    "fitness: excess left in": (FITNESS, " - excess * genes[part]", ""),
    "fitness: excess of the wrong sign": (FITNESS, "- excess * genes", "+ excess * genes"),
}  # fmt: skip


def survives(file: str, old: str, new: str) -> bool:
    """Whether the parity tests pass with the fault in a copy of the project."""
    source = (ROOT / file).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{file}: expected {old!r} once, got it {source.count(old)} times")
    names = {
        FITNESS: ("genetic",), WINDOWS: ("genetic",), GENE_DECODE: ("genetic_decode",)
    }.get(file, ("decode", "latent", "attention"))  # fmt: skip
    tests = [f"tests/kernels/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-k", "test_parity", *tests]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "copy")
        skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "ablation_results")
        shutil.copytree(ROOT, copy, ignore=skipped)
        (copy / file).write_text(source.replace(old, new))
        done = subprocess.run(command, cwd=copy, capture_output=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout.decode() + done.stderr.decode())
    return done.returncode == 0


def main() -> int:
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda mutant: survives(*mutant), MUTANTS.values())
        for name, survived in zip(MUTANTS, results, strict=True):
            survivors += survived
            print(f"{'SURVIVED' if survived else 'caught':8}  {name}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
