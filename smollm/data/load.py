"""Prepared corpora by name, one or several at weights."""

from pathlib import Path

from smollm.data.corpus import ABOUT, Corpus, prepare_command
from smollm.data.mixture import Mixture, parse_weights
from smollm.data.names import AUTO, BUILTIN, BUILTINS, DEFAULT_ROOT, NAME, check_name
from smollm.data.prepare import open_builtin


def load_corpus(name: str = AUTO, root: Path = DEFAULT_ROOT) -> Corpus:
    """Open a prepared corpus; a built-in one is prepared when it is not there yet.

    Args:
        name: a corpus under root, "builtin", "builtin-code", or "auto" (default): the one prepared
            last, except the built-in ones; it falls back to "builtin".
            "NAME=WEIGHT,NAME=WEIGHT" is a `Mixture`.
        root: folder of prepared corpora.

    Raises:
        FileNotFoundError: no such corpus. ValueError: an odd name or weight, it is corrupt, or
            corpora that do not mix.
    """
    if "=" in name or "," in name:
        weights = parse_weights(name)
        for part in weights:
            check_name(part)
            if part == AUTO:
                raise ValueError(f"corpus: expected names of corpora to mix, got {AUTO!r}")
        corpora = [load_corpus(part, root) for part in weights]
        return corpora[0] if len(corpora) == 1 else Mixture(corpora, list(weights.values()))
    if name == AUTO:
        name = _newest(root) or BUILTIN
    check_name(name)
    if name in BUILTINS:
        return open_builtin(root, name)
    if not (root / name / ABOUT).is_file():
        raise FileNotFoundError(
            f"corpus: expected one prepared under {root}/, got {name!r}; prepare it with "
            f"`{prepare_command(root / name)}`, or use --corpus {BUILTIN}"
        )
    return Corpus(root / name)


def _newest(root: Path) -> str | None:
    """The name of the corpus prepared last, but the built-in ones."""
    prepared = [
        (path.stat().st_mtime_ns, path.parent.name)
        for path in root.glob(f"*/{ABOUT}")
        if NAME.fullmatch(path.parent.name) and path.parent.name not in BUILTINS and path.is_file()
    ]
    return max(prepared)[1] if prepared else None
