"""Tell this project's `kernels` from Hugging Face's package of that name; importing this does."""

import importlib.metadata
import importlib.util
from pathlib import Path

REMEDY = (
    "Hugging Face's `kernels` and this project's share an import name, so that no environment can "
    "hold both: `pip uninstall kernels`, or keep it in another one"
)


def check_distribution() -> None:
    """Refuse to go on where transformers would take this project's `kernels` for the other one.

    Raises:
        ImportError: a distribution of that name is installed.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(f"kernels: expected no distribution of that name, got {version}. {REMEDY}")


_found = importlib.util.find_spec("kernels")  # which imports nothing, PyTorch least of all
_origin = None if _found is None else _found.origin
if _origin is None or not Path(_origin).with_name("mga.py").is_file():
    raise ImportError(f"kernels: expected this project's, got {_origin}. {REMEDY}")
