"""What corpora are called, and what flags have by default; needs no PyTorch."""

import re
from pathlib import Path

DEFAULT_ROOT = Path(".data")
AUTO, BUILTIN, BUILTIN_CODE = "auto", "builtin", "builtin-code"
BUILTINS = (BUILTIN, BUILTIN_CODE)  # need no network
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
SMOLLM_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
HELD_OUT = 0.005  # of the documents


def check_name(name: str) -> None:
    """Refuse what does not name one folder under the root.

    Raises:
        ValueError: it does not.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            "corpus: expected a name of letters, digits, '.', '_' and '-' that begins with a "
            f"letter, a digit or '_', at most 100 long, got {name!r:.120}"
        )
