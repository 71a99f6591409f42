"""A study as a file, which the command line reads and every study leaves in its folder."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smollm.attention import MECHANISMS
from smollm.files import write_atomically
from smollm.studies.fields import as_flags, as_text, assignment
from smollm.training.config import Config

PLAN = Path("study.toml")


def write_plan(folder: Path, config: Config) -> None:
    """Write study.toml into a folder."""
    text = plan_text(config)
    write_atomically(folder / PLAN, lambda file: file.write(text.encode()))


def plan_text(config: Config) -> str:
    """A file that `python train.py study` runs again; every field that makes results is in it."""
    plain: dict[str, Any] = {"preset": config.preset, "variants": config.mechanisms}
    plain |= {"seeds": config.seeds, "match": config.match}
    lines = ["# python train.py study study.toml --output-dir FOLDER", ""]
    lines += _toml(plain | asdict(config.train) | config.model.flags)
    if config.grid:
        lines += ["", "[grid]"]
        lines += _toml({n: v.split(",") for n, v in (assignment("grid", g) for g in config.grid)})
    for mechanism in MECHANISMS:
        own = [o.partition(".")[2] for o in config.override if o.startswith(f"{mechanism}.")]
        if own:
            lines += ["", f"[{mechanism}]", *_toml(dict(assignment("override", o) for o in own))]
    return "\n".join(lines) + "\n"


def read_plan(path: Path) -> list[str]:
    """A study's file as flags.

    Each key is a flag's name; a table `[grid]` has lists of values, a table of a mechanism's name
    what is its own.

    Raises:
        ValueError: there is none, or it is not TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a study's file, got {error}") from error
    tables = {name: content.pop(name) for name in ("grid", *MECHANISMS) if name in content}
    flags = [flag for name, value in content.items() for flag in as_flags(name, value)]
    grid = tables.pop("grid", {})
    for name, table in (("grid", grid), *tables.items()):
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name}: expected a table, got {table!r}")
    points = [
        f"{name}={','.join(map(as_text, values if isinstance(values, list) else [values]))}"
        for name, values in grid.items()
    ]
    own = [
        f"{variant}.{name}={as_text(value)}"
        for variant, table in tables.items()
        for name, value in table.items()
    ]
    return [*flags, *as_flags("grid", points), *as_flags("override", own)]


def _toml(values: dict[str, Any]) -> list[str]:
    """Plain values as lines; what is None has no line."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            lines.append(f"{name} = [{', '.join(map(_toml_value, value))}]")
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value)}")
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value))
