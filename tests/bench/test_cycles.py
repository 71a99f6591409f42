"""The parser of machine code and the model of an SM, on a few instructions written by hand."""

import pytest

from bench import cycles
from bench.sass import matrix_loops, one_pass, parse, unmasked

# As cuobjdump prints it; the control codes were read by hand.
PRINTED = """
        /*0120*/                   MUFU.RCP R0, R0 ;         /* 0x0000000000007308 */
                                                             /* 0x004ea40000001000 */
        /*0b90*/                   STS.128 [R6+UR6], R24 ;   /* 0x00c0001806007988 */
                                                             /* 0x0043e80008000c06 */
        /*0bd0*/              @!PT LDS RZ, [RZ] ;            /* 0x00000000fffff984 */
                                                             /* 0x000fe20000000800 */
        /*1510*/              @!P4 BRA P5, 0x1e20 ;          /* 0x000000080040c947 */
                                                             /* 0x000fea0002800000 */
"""
HGMMA = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
NONE = 7  # of the scoreboards
CHAIN = ("MUFU.EX2 R0, R0", 1, 0, (0,)), ("FADD R0, R0, R0", 4, NONE, (0,))


def listing(*lines):
    """Lines of (text, stall, scoreboard that it writes, scoreboards that it waits for)."""
    text = ""
    for n, line in enumerate(lines):
        body, stall, writes, waits = (*line, *(1, NONE, ())[len(line) - 1 :])
        control = stall | writes << 5 | NONE << 8 | sum(1 << k for k in waits) << 11
        text += f"/*{16 * n:04x}*/ {body} ; /* 0x{0:016x} */\n/* 0x{control << 41:016x} */\n"
    return text


def per_pass(*lines, warps=4, ctas=1, passes=200):
    """Cycles of the lines, of one CTA, in passes without a branch."""
    code = parse(listing(*lines)) * passes
    return cycles.Partition().run(code, warps, ctas, apart=0) / (passes * ctas)


def test_control_codes():
    mufu, sts, lds, bra = parse(PRINTED)
    assert (mufu.address, mufu.name, mufu.opcode) == (0x120, "MUFU", "MUFU.RCP")
    assert (mufu.stall, mufu.writes, mufu.reads, mufu.waits) == (2, 2, NONE, (2,))
    assert (sts.stall, sts.writes, sts.reads, sts.waits) == (4, NONE, 1, (2,))
    assert (lds.stall, lds.writes, lds.reads, lds.waits) == (1, NONE, NONE, ())
    assert (bra.predicate, bra.target, bra.stall) == ("@!P4", 0x1E20, 5)


def test_pipes_and_bytes():
    expected = {  # pipe, bytes of shared memory, bytes of global memory
        "FFMA R0, R1, R2, R3": ("fma", 0, 0),
        "IMAD.MOV.U32 R0, RZ, RZ, R1": ("imad", 0, 0),
        "IADD3 R0, R1, R2, RZ": ("alu", 0, 0),
        "UIADD3 UR4, UR4, 0x1, URZ": ("uniform", 0, 0),
        "MUFU.EX2 R0, R1": ("xu", 0, 0),
        "LDS R0, [R1]": ("memory", 128, 0),
        "LDSM.16.M88.4 R16, [R5]": ("memory", 512, 0),
        "STSM.16.M88.2 [R5], R16": ("memory", 256, 0),
        "@!PT LDS RZ, [RZ]": ("memory", 0, 0),
        "LDGSTS.E.BYPASS.128 [R45], desc[UR14][R38.64], P5": ("memory", 512, 512),
        "LDG.E.64 R0, desc[UR14][R38.64]": ("memory", 0, 256),
        HGMMA: ("tensor", 2 * 16 * (64 + 64), 0),
        "HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24": ("tensor", 2 * 16 * 32, 0),
    }
    code = parse(listing(*((text,) for text in expected)))
    assert {i.text: (i.pipe, i.shared_bytes, i.global_bytes) for i in code} == expected


def test_waits_for_some_of_many():
    wait, groups, other = parse(
        listing(("DEPBAR.LE SB0, 0x2",), ("WARPGROUP.DEPBAR.LE gsb0, 0x1",), ("NOP",))
    )
    assert (wait.allowed, wait.allowed_groups) == ((0, 2), None)
    assert (groups.allowed, groups.allowed_groups) == (None, 1)
    assert (other.allowed, other.allowed_groups) == (None, None)


def test_the_loop_of_products_and_its_mask():
    """An outer loop around a loop of products, whose branch skips a mask, and a plain loop."""
    code = parse(
        listing(
            ("MOV R0, RZ",),
            (HGMMA,),  # 0x10
            ("@P0 BRA 0x40",),
            ("FSEL R0, R1, R2, P1",),
            ("FADD R0, R0, R1",),  # 0x40
            ("@P1 BRA 0x10",),
            ("@P2 BRA 0x0",),
            ("FMUL R0, R0, R1",),  # 0x70
            ("@P3 BRA 0x70",),
            ("EXIT",),
            (HGMMA,),  # 0xa0
            ("BRA 0xa0",),
        )
    )
    (body,) = matrix_loops(code)
    assert [i.address for i in body] == [0x10, 0x20, 0x30, 0x40, 0x50]
    assert [i.name for i in unmasked(body)] == ["HGMMA", "BRA", "FADD", "BRA"]


STRAIGHT = listing(
    ("@P0 BRA 0x30",),  # around a loop
    ("FADD R0, R0, R1",),  # 0x10
    ("@P1 BRA 0x10",),
    ("@P2 EXIT",),
    ("@P3 BRA 0x60",),  # 0x40, around what few need
    ("FSEL R0, R1, R2, P1",),
    ("@P4 BRA 0xa0",),  # 0x60, to what few need
    ("FMUL R0, R0, R1",),
    ("EXIT",),
    ("BRA 0x90",),
    ("FADD R0, R1, R2",),  # 0xa0
    ("BRA 0x70",),
)


def test_a_program_passes_its_loops_once():
    """It enters them, and skips what another branch may skip."""
    path = [0x00, 0x10, 0x20, 0x30, 0x40, 0x60, 0x70, 0x80]
    assert [i.address for i in one_pass(parse(STRAIGHT))] == path


def test_a_chain_takes_its_latencies():
    """Each waits for the one before: by its scoreboard, or by the stall that the compiler set."""
    assert per_pass(*CHAIN) == pytest.approx(cycles.XU_LATENCY + 4, rel=0.01)
    free = ("MUFU.EX2 R0, R1", 1, 0), ("FADD R2, R2, R2", 4)
    assert per_pass(*free) == pytest.approx(cycles.INTERVAL["xu"], rel=0.01)
    assert per_pass(("FADD R0, R0, R0", 13)) == pytest.approx(13, rel=0.01)
    read = ("LDS.128 R0, [R0]", 1, 0, (0,))
    of_rate = 4 * 512 / cycles.SHARED_BYTES
    assert per_pass(read) == pytest.approx(of_rate + cycles.SHARED_LATENCY, rel=0.01)
    assert per_pass(read, ctas=8) == pytest.approx(of_rate, rel=0.02)


def test_what_never_runs_takes_a_slot_alone():
    assert per_pass(("@!PT LDS RZ, [RZ]",)) == pytest.approx(1, rel=0.01)
    assert per_pass(("LDS R0, [R1]",)) == pytest.approx(cycles.INTERVAL["memory"], rel=0.01)


def test_copies_arrive_behind_the_latency_of_l2():
    copy = "LDGSTS.E.BYPASS.128 [R45], desc[UR14][R38.64]", 1
    of_l2 = 4 * 512 / cycles.L2_BYTES
    committed = copy, ("LDGDEPBAR", 1, 0)
    latency = of_l2 + cycles.L2_LATENCY
    at_once = per_pass(*committed, ("DEPBAR.LE SB0, 0x0",))
    assert latency < at_once < latency + cycles.L2_JITTER
    one_later = per_pass(*committed, ("DEPBAR.LE SB0, 0x1",))
    assert one_later == pytest.approx(at_once / 2, rel=0.1)
    rate_bound = per_pass(*[copy] * 8, ("LDGDEPBAR", 1, 0), ("DEPBAR.LE SB0, 0x1",))
    assert rate_bound == pytest.approx(8 * of_l2, rel=0.02)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FADD R0, R1, R2", 1),
        ("IADD3 R0, R1, R2, RZ", 2),
        ("MUFU.EX2 R0, R1", 8),
        ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24", 64),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24", 20),  # its operands take longer
        ("HMMA.16816.F32.BF16 R24, R4, R8, R24", 6.5),
    ],
)
@pytest.mark.parametrize("ctas", [1, 3])
def test_a_pipe_has_its_throughput(text, expected, ctas):
    assert per_pass((text,), ctas=ctas) == pytest.approx(expected, rel=0.02)


def test_resident_ctas_hide_latencies_until_a_pipe_is_full():
    alone = per_pass(*CHAIN)
    assert per_pass(*CHAIN, ctas=2) == pytest.approx(alone / 2, rel=0.05)
    assert per_pass(*CHAIN, ctas=8) == pytest.approx(cycles.INTERVAL["xu"], rel=0.05)
    product = (HGMMA, 1), ("WARPGROUP.DEPBAR.LE gsb0, 0x0",)
    assert per_pass(*product) >= 32 + cycles.WGMMA_LATENCY
    assert per_pass(*product, ctas=4) == pytest.approx(32, rel=0.05)


def test_the_steady_state_is_that_of_one_of_the_resident_ctas():
    """No matter how far apart they start, of which the mean is taken, and of how many passes."""
    body = parse(listing(*[("FADD R0, R1, R2",)] * 600))
    for ctas in (1, 2):
        assert cycles.steady_cycles(body, warps=4, ctas=ctas) == pytest.approx(600, rel=0.01)


def test_warps_of_a_cta_meet_at_its_barrier():
    barrier = [("BAR.SYNC.DEFER_BLOCKING 0x0",)]
    work = [("MUFU.EX2 R0, R0", 1, 0, (0,))] * 10
    alone = per_pass(*work, warps=4)
    assert per_pass(*work, warps=8) == pytest.approx(alone, rel=0.02)
    met = per_pass(*work, *barrier, warps=8)
    assert alone + cycles.BARRIER / 2 < met < alone + cycles.BARRIER + cycles.BARRIER_JITTER


def test_cycles_are_of_64_by_64_scores():
    loop = [(HGMMA, 1), ("WARPGROUP.DEPBAR.LE gsb0, 0x0",), ("@P0 BRA 0x50",)]
    masked = listing(*loop, *[("FSEL R0, R1, R2, P1", 2)] * 2, ("@P1 BRA 0x0",), ("EXIT",))
    interior, edge = cycles.tile_cycles(masked, 64, 64, warps=4, ctas=1)
    assert interior < edge
    smaller = cycles.tile_cycles(masked, 32, 64, warps=4, ctas=1)
    assert smaller == pytest.approx((2 * interior, 2 * edge), abs=1)
    assert cycles.tile_cycles(listing(("EXIT",)), 64, 64, warps=4, ctas=1) is None
    assert cycles.tile_cycles(masked, 64, 64, warps=4, ctas=0) is None


def test_a_program_takes_the_cycles_of_its_path():
    work = [("MUFU.EX2 R0, R0", 1, 0, (0,))] * 50
    for ctas in (1, 2):
        alone = listing(*work, ("EXIT",))
        skipping = listing(("@P0 BRA 0x20",), ("FSEL R0, R1, R2, P1", 15), *work, ("EXIT",))
        for text in (alone, skipping):
            (taken,) = cycles.program_cycles(text, 4, ctas)
            assert taken == pytest.approx(50 * cycles.XU_LATENCY / ctas, rel=0.05)
    assert cycles.program_cycles(alone, 4, ctas=0) is None
    assert cycles.program_cycles("", 4, ctas=1) is None
