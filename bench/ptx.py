"""What Triton's PTX gets wrong in some tiles, and ptxas does not tell."""

import re

PRODUCT = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{([^}]*)\}")  # one whose A is registers
RESULT = re.compile(r"(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)")
NO_RESULT = "st.", "bar.", "cp.", "bra", "fence"


def unfenced_products(ptx: str) -> int:
    """How many wgmma of sm_90 read A from registers that are written behind the last fence.

    Nothing orders the two then: `wgmma.fence` names no registers, so compilers may move what
    computes them behind it.
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


def contracted_sums(ptx: str) -> int:
    """How many sums over lanes add what another has rounded to a product that is not.

    Lanes that hold copies of a sum then disagree on its last bit, and any of them may be stored.
    """
    products, shuffled = set(), set()
    count = 0
    for line in map(str.strip, ptx.splitlines()):
        name, _, rest = line.partition(" ")
        result, *operands = (operand.strip(" \t;") for operand in rest.split(","))
        if name.startswith("shfl.sync.bfly"):
            shuffled.add(result)
        elif name.startswith("mul."):
            products.add(result)
        elif name.startswith("fma."):
            count += operands[-1] in shuffled
        elif name.startswith("add."):  # which ptxas may fuse with a product
            count += not shuffled.isdisjoint(operands) and not products.isdisjoint(operands)
    return count
