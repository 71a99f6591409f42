"""Machine code of sm_90 as `cuobjdump -sass` prints it: instructions, control codes, loops.

The control code of an instruction, in the upper bits of its second word, says for how many cycles
its warp stalls behind it, which of six scoreboards count it until its result is there or its
operands are read, and which of them must be empty before it may issue.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

NO_SCOREBOARD = 7
FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA32I"}
XU = {"MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "I2FP"}
MEMORY = {
    "LDS", "LDSM", "STS", "STSM", "SHFL", "LDG", "STG", "LDGSTS", "LDL", "STL", "ATOM", "ATOMG",
    "ATOMS", "RED", "LDC",
}  # fmt: skip
CONTROL = {
    "BRA", "BAR", "DEPBAR", "LDGDEPBAR", "EXIT", "NOP", "WARPGROUP", "BSSY", "BSYNC", "WARPSYNC",
    "MEMBAR", "FENCE", "SYNCS", "ERRBAR", "CCTL", "ELECT", "YIELD", "CALL", "RET", "R2B", "B2R",
}  # fmt: skip
FIRST_WORD = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\*\s*0x[0-9a-f]{16}\s*\*/")
SECOND_WORD = re.compile(r"\s*/\*\s*0x([0-9a-f]{16})\s*\*/")


@dataclass(frozen=True)
class Instruction:
    """One instruction with its control code."""

    address: int
    text: str
    predicate: str
    opcode: str  # with its modifiers
    stall: int  # cycles until the next of its warp may issue
    writes: int  # scoreboard that counts it until its result is there
    reads: int  # scoreboard that counts it until its operands are read
    waits: tuple[int, ...]  # scoreboards that must be empty
    target: int | None  # address that it branches to

    @cached_property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @cached_property
    def is_live(self) -> bool:
        """Whether it can do anything: @!PT never does."""
        return self.predicate not in ("@!PT", "@!UPT")

    @cached_property
    def pipe(self) -> str:
        """The pipe that executes it."""
        if self.name in ("HGMMA", "HMMA"):
            return "tensor"
        for pipe, names in (("fma", FMA), ("xu", XU), ("memory", MEMORY), ("control", CONTROL)):
            if self.name in names:
                return pipe
        if self.name.startswith("IMAD"):
            return "imad"
        return "uniform" if self.name[0] == "U" or self.name in ("R2UR", "S2UR") else "alu"

    @cached_property
    def needs(self) -> str:
        """What must be free for it to issue: its pipe, or the queue of one of the tensor core."""
        if self.pipe == "tensor":
            return "queue"
        return self.pipe if self.is_live else "nothing"

    @cached_property
    def tensor_cycles(self) -> float:
        """How long the tensor core of a sub-partition is busy with it, at 1024 FLOP a cycle."""
        if self.name == "HMMA":
            return 6.5  # m16n8k16 has 0.62 of the rate of wgmma
        m, n, k = self._shape
        return 2 * m * n * k / 4096  # a sub-partition does a quarter of a wgmma

    @cached_property
    def shared_bytes(self) -> int:
        """Shared memory that a warp, or of wgmma a warpgroup, reads or writes."""
        if not self.is_live:
            return 0
        if self.name == "HGMMA":
            m, n, k = self._shape
            a_in_registers = "gdesc" not in self.text.split(",")[1]
            return 2 * k * (n if a_in_registers else m + n)
        if self.name in ("LDSM", "STSM"):
            matrices = re.search(r"\.(\d)$|\.MT?88\.(\d)", self.opcode)
            return 128 * int((matrices and (matrices[1] or matrices[2])) or 4)
        return self._lane_bytes if self.name in ("LDS", "STS", "LDGSTS") else 0

    @cached_property
    def global_bytes(self) -> int:
        """Global memory that a warp reads."""
        return self._lane_bytes if self.name in ("LDGSTS", "LDG") and self.is_live else 0

    @cached_property
    def allowed(self) -> tuple[int, int] | None:
        """Of a DEPBAR.LE, the scoreboard that it waits for and how many that may still count."""
        found = re.search(r"DEPBAR\.LE SB(\d), 0x([0-9a-f]+)", self.text)
        return (int(found[1]), int(found[2], 16)) if found else None

    @cached_property
    def allowed_groups(self) -> int | None:
        """Of a WARPGROUP.DEPBAR, how many groups of wgmma may still run."""
        found = re.search(r"WARPGROUP\.DEPBAR\S* gsb\d, 0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        m, n, k = re.findall(r"\d+", re.search(r"\d+x\d+x\d+", self.opcode)[0])  # type: ignore[index]
        return int(m), int(n), int(k)

    @cached_property
    def _lane_bytes(self) -> int:
        bits = re.search(r"\.(64|128)\b", self.opcode)
        return 32 * (int(bits[1]) // 8 if bits else 4)


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing with their encodings."""
    words: list[tuple[int, str, int]] = []
    for line in listing.splitlines():
        if first := FIRST_WORD.match(line):
            words.append((int(first[1], 16), first[2].rstrip(" ;"), 0))
        elif words and (second := SECOND_WORD.match(line)):
            words[-1] = (*words[-1][:2], int(second[1], 16))
    return [_instruction(*entry) for entry in words]


def _instruction(address: int, text: str, second_word: int) -> Instruction:
    control = second_word >> 41
    guard = re.match(r"(@!?U?P\w+)\s+", text)
    body = text[guard.end() :] if guard else text
    branch = re.match(r"BRA\S*\s+(?:\S+,\s*)*`?\(?\.?(?:0x)?([0-9a-f]+)", body)
    return Instruction(
        address=address,
        text=text,
        predicate=guard[1] if guard else "",
        opcode=body.split()[0],
        stall=control & 15,
        writes=control >> 5 & 7,
        reads=control >> 8 & 7,
        waits=tuple(k for k in range(6) if control >> 11 >> k & 1),
        target=int(branch[1], 16) if branch else None,
    )


def matrix_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops that multiply matrices."""
    index = {i.address: n for n, i in enumerate(code)}
    end = max((n for n, i in enumerate(code) if i.name == "EXIT"), default=len(code))
    loops = [
        (index[i.target], n)
        for n, i in enumerate(code[:end])  # behind it stand only the retries of waits
        if i.target in index and i.target < i.address
    ]
    found = [(a, b) for a, b in loops if any(i.pipe == "tensor" for i in code[a : b + 1])]
    return [
        list(code[a : b + 1])
        for a, b in sorted(found)
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)
    ]


def one_pass(code: Sequence[Instruction]) -> list[Instruction]:
    """The path through each loop once, and past what other branches forward may skip."""
    end = max((n for n, i in enumerate(code) if i.name == "EXIT"), default=len(code) - 1)
    kept, until = [], 0
    loops = [i.address for i in code[:end] if i.target is not None and i.target < i.address]
    for i in code[: end + 1]:
        if i.address < until:
            continue
        kept.append(i)
        if i.target is not None and i.address < i.target <= code[end].address:
            enters = any(i.address < address < i.target for address in loops)
            until = until if enters else i.target
    return kept


def unmasked(body: Sequence[Instruction]) -> list[Instruction]:
    """A loop's body without what its own forward branches skip: the mask of an edge tile."""
    kept, until = [], 0
    for i in body:
        if i.address < until:
            continue
        kept.append(i)
        if i.target is not None and i.address < i.target <= body[-1].address:
            until = i.target
    return kept
