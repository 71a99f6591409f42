"""Packages that import what they export when it is first asked for.

PyTorch takes seconds to import, and flags, their help and what is refused need none of it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any


def exports(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` (PEP 562) of a package.

    Args:
        package: its dotted name.
        names: what it exports, by the module inside it that has them.

    Returns:
        Both; the first one imports a name's module, and raises AttributeError for other names.
    """
    homes = {name: module for module, exported in names.items() for name in exported}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return resolve_name(f"{package}.{homes[name]}:{name}")

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names_of
