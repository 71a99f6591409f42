"""A study as a file, which the command line reads and every study leaves in its folder."""

import json
import re
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smollm.files import write_atomically
from smollm.studies.fields import as_flags, as_text, assignment
from smollm.studies.variants import GRID, own_fields
from smollm.training.config import Config

PLAN = Path("study.toml")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")  # needs no quotes


def write_plan(folder: Path, config: Config) -> None:
    """Write study.toml into a folder."""
    text = plan_text(config)
    write_atomically(folder / PLAN, lambda file: file.write(text.encode()))


def plan_text(config: Config) -> str:
    """A file that `python train.py study` runs again; every field that makes results is in it."""
    plain: dict[str, Any] = {"preset": config.preset, "variants": config.chosen}
    plain |= {"seeds": config.seeds, "match": config.match}
    lines = ["# python train.py study study.toml --output-dir FOLDER", ""]
    lines += _toml(plain | asdict(config.train) | config.model.flags)
    if config.grid:
        lines += ["", f"[{GRID}]"]
        lines += _toml({n: v.split(",") for n, v in (assignment("grid", g) for g in config.grid)})
    for variant, own in own_fields(config).items():
        key = variant if BARE_KEY.fullmatch(variant) else f'"{variant}"'
        lines += ["", f"[{key}]", *_toml(own)]
    return "\n".join(lines) + "\n"


def read_plan(path: Path) -> list[str]:
    """A study's file as flags.

    Each key is a flag's name; a table `[grid]` has lists of values, a table of a variant's name
    what is its own.

    Raises:
        ValueError: there is none, or it is not TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a study's file, got {error}") from error
    grid = content.pop(GRID, {})
    if not isinstance(grid, dict):
        raise ValueError(f"{path}: {GRID}: expected a table, got {grid!r}")
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    flags = [
        flag
        for name, value in content.items()
        if name not in tables
        for flag in as_flags(name, value)
    ]
    points = [
        f"{name}={','.join(map(as_text, values if isinstance(values, list) else [values]))}"
        for name, values in grid.items()
    ]
    own = [
        f"{variant}.{name}={as_text(value)}"
        for variant, table in tables.items()
        for name, value in table.items()
    ]
    return [*flags, *as_flags(GRID, points), *as_flags("override", own)]


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
