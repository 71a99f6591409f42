"""What Triton's PTX gets wrong on sm_90 in some tiles, and ptxas does not tell."""

import re

PRODUCT = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{([^}]*)\}")  # one whose A is registers
RESULT = re.compile(r"(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)")
NO_RESULT = "st.", "bar.", "cp.", "bra", "fence"


def unfenced_products(ptx: str) -> int:
    """How many wgmma read A from registers that are written behind the last `wgmma.fence`.

    Nothing orders the two then: the fence names no registers, so compilers may move what computes
    them behind it.
    """
    written: set[str] = set()
    count = 0
    for line in map(str.strip, ptx.splitlines()):
        if line.startswith("wgmma.fence"):
            written.clear()
        elif line.startswith("wgmma"):
            operand = PRODUCT.match(line)
            count += bool(operand and written & set(re.findall(r"%\w+", operand[1])))
        elif not line.startswith(NO_RESULT) and (result := RESULT.match(line)):
            written.update(re.findall(r"%\w+", result[1]))
    return count
