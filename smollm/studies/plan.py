"""What a study runs: its flags, and the runs that follow from them."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from smollm.attention import MECHANISMS, SharedOptions
from smollm.model.config import ModelConfig
from smollm.studies.fields import assignment, changed, check_values, with_flags
from smollm.studies.plan_file import PLAN, read_plan
from smollm.training.checks import check_config, check_ranges
from smollm.training.config import PRESETS, Config, Preset

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
OF_ATTENTION = {"layers", "window_pattern", "nope_every"} | {
    field.name for field in fields(SharedOptions)
} - {"embed_dim", "norm_eps", "bias", "dropout"}  # what reaches the arguments of a module alone


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    mechanism: str
    config: Config  # its own
    point: dict[str, str]  # what the grid varies, as it was given
    seed: int | None  # where the study has several

    @property
    def name(self) -> str:
        """What its files are called by."""
        varied = self.point | ({} if self.seed is None else {"seed": str(self.seed)})
        return "-".join((self.mechanism, *(f"{name}={value}" for name, value in varied.items())))


def parse(argv: Sequence[str]) -> Config:
    """Read train.py's flags, or `study FILE [flags]`; a preset or a file has the others' defaults.

    Without a preset it is PyTorch that tells which one this machine's is. Help and what is refused
    do not wait for that: they have the defaults of what the driver suggests.

    Raises:
        ValueError: a file that is none. SystemExit: flags that are refused, on stderr.
    """
    argv = list(argv)
    if argv[:1] == ["study"]:
        if len(argv) < 2 or argv[1].startswith("-"):
            raise ValueError("study: expected the path of a study's file")
        argv = [*read_plan(Path(argv[1])), *argv[2:]]
    chooser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    chooser.add_argument("--resume", type=Path)
    resume = chooser.parse_known_args(argv)[0].resume
    if resume is not None:
        argv = [*read_plan(resume / PLAN), f"--output-dir={resume}", *argv]
    chooser.add_argument("--preset", choices=get_args(Preset))
    preset = chooser.parse_known_args(argv)[0].preset
    if preset is not None:
        return with_flags(PRESETS[preset], argv)
    suggested = PRESETS["ablation" if NVIDIA_DRIVER.exists() else "cpu"]
    config = with_flags(suggested, argv)
    check_ranges(config)
    import torch

    chosen = PRESETS["ablation" if torch.cuda.is_available() else "cpu"]
    return config if chosen is suggested else with_flags(chosen, argv)


def check(config: Config) -> None:
    """Refuse what could only fail later, in any of the study's runs.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    if config.resume is not None and config.overwrite:
        raise ValueError("overwrite: expected no --resume beside it, got both")
    if config.resume is not None and config.output_dir != config.resume:
        raise ValueError(f"output_dir: expected {config.resume} to resume, got {config.output_dir}")
    check_ranges(config)
    planned = cells(config)
    check_config(config, vocab_size=1)
    for cell in planned:
        check_config(replace(cell.config, variants=(cell.mechanism,)), vocab_size=1)


def cells(config: Config) -> list[Cell]:
    """The runs of a study: seed by seed, point by point of the grid, mechanism by mechanism.

    A field of the grid that makes no difference to a mechanism does not multiply its runs.

    Raises:
        ValueError: a grid or an override that cannot be read; the text names the field.
    """
    grid = [assignment("grid", text) for text in config.grid]
    values = {name: check_values("grid", name, text.split(",")) for name, text in grid}
    if len(values) < len(grid):
        raise ValueError(f"grid: expected each field once, got {' '.join(config.grid)}")
    if config.match != "none" and "ffn_hidden_dim" in values:
        raise ValueError("match: expected no grid over ffn_hidden_dim, which it chooses, got one")
    overrides = {mechanism: dict[str, str]() for mechanism in MECHANISMS}
    for text in config.override:
        name, value = assignment("override", text)
        mechanism, _, field = name.partition(".")
        if mechanism not in overrides:
            raise ValueError(f"override: expected VARIANT.FIELD=VALUE, got {text!r}")
        overrides[mechanism][field] = check_values("override", field, [value])[0]
    found: dict[str, Cell] = {}
    seeds: tuple[int | None, ...] = config.seeds or (None,)
    varied = {
        mechanism: _varied(mechanism, config, values, overrides[mechanism])
        for mechanism in config.mechanisms
    }
    for seed, point in itertools.product(seeds, _points(values)):
        for mechanism in config.mechanisms:
            own = {name: value for name, value in point.items() if name in varied[mechanism]}
            flags = overrides[mechanism] | point | ({} if seed is None else {"seed": str(seed)})
            cell = Cell(mechanism, changed(config, flags), own, seed)
            if config.match != "none":
                first = config.mechanisms[0]
                target = changed(config, overrides[first] | point)
                cell = replace(cell, config=_matched(cell, first, target))
            found.setdefault(cell.name, cell)
    return list(found.values())


def _matched(cell: Cell, first: str, target: Config) -> Config:
    """The cell's config with the feed-forward width that comes closest to the first variant's cost.

    A layer's cost is linear in that width, so that of two widths tells it.

    Raises:
        ValueError: there is no such width, or the embeddings differ, whose cost is left out.
    """
    for name in ("embed_dim", "tie_embeddings"):
        ours, theirs = (getattr(config.model, name) for config in (cell.config, target))
        if ours != theirs:
            raise ValueError(
                f"match: expected {first}'s {name}={theirs} in {cell.mechanism}, got {ours}"
            )
    wanted = _cost(first, target, target.model.ffn_hidden_dim)
    base = _cost(cell.mechanism, cell.config, 1)
    slope = _cost(cell.mechanism, cell.config, 2) - base
    width = 1 + round((wanted - base) / slope)
    if width < 1:
        raise ValueError(
            f"match: expected room for a feed-forward layer in {cell.mechanism}, whose attention "
            f"alone has more {target.match} than all of {first}"
        )
    return replace(cell.config, model=replace(cell.config.model, ffn_hidden_dim=width))


def _cost(mechanism: str, config: Config, width: int) -> int:
    """Parameters or FLOPs per token with a feed-forward width, as the config matches them."""
    flags = tuple((config.model.flags | {"ffn_hidden_dim": width}).items())
    return _costs(mechanism, flags, config.train.seq_len)[config.match]


@cache
def _costs(mechanism: str, flags: tuple[tuple[str, Any], ...], seq_len: int) -> dict[str, int]:
    import torch

    from smollm.model.build import build_model

    with torch.device("meta"):
        model = build_model(mechanism, ModelConfig.of(**dict(flags)), vocab_size=1)
    return {"params": model.count_parameters(), "flops": model.flops_per_token(seq_len)}


def _varied(
    mechanism: str, config: Config, values: dict[str, list[str]], overrides: dict[str, str]
) -> set[str]:
    """The grid's fields that make a difference to a mechanism's runs."""

    def described(name: str, value: str) -> tuple[Any, ...]:
        given = changed(config, overrides | {name: value})
        model = given.model
        layers = itertools.cycle(model.layer_arguments(mechanism))
        shape = {field.name: getattr(model, field.name) for field in fields(model)}
        del shape["mechanisms"]
        for field_name in OF_ATTENTION:
            del shape[field_name]
        return list(itertools.islice(layers, model.num_layers)), shape, given.train

    found = set()
    for name, given in values.items():
        first, *others = (described(name, value) for value in given)
        if any(other != first for other in others):
            found.add(name)
    return found


def _points(values: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    for point in itertools.product(*values.values()):
        yield dict(zip(values, point, strict=True))
