"""What a study runs: its flags, and the runs that follow from them."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from smollm.attention import SharedOptions
from smollm.model.config import ModelConfig
from smollm.studies.fields import assignment, changed, check_values, with_flags
from smollm.studies.plan_file import PLAN, read_plan
from smollm.studies.variants import check_layers, check_variants, own_fields
from smollm.training.checks import check_config, check_ranges
from smollm.training.config import PRESETS, Config, Preset

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
OF_ATTENTION = {"layers", "window_pattern", "nope_every"} | {
    field.name for field in fields(SharedOptions)
} - {"embed_dim", "norm_eps", "bias", "dropout"}  # what reaches the arguments of a module alone


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    variant: str
    config: Config  # its own
    point: dict[str, str]  # what the grid varies, as it was given
    seed: int | None  # where the study has several

    @property
    def name(self) -> str:
        """What its files are called by."""
        varied = self.point | ({} if self.seed is None else {"seed": str(self.seed)})
        return "-".join((self.variant, *(f"{name}={value}" for name, value in varied.items())))


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
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds: expected distinct ones, got {config.seeds}")
    for cell in cells(replace(config, seeds=())):
        check_config(replace(cell.config, variants=(cell.variant,)), vocab_size=1)


def cells(config: Config) -> list[Cell]:
    """The runs of a study: seed by seed, point by point of the grid, variant by variant.

    A field of the grid that makes no difference to a variant does not multiply its runs.

    Raises:
        ValueError: a grid, an override or a variant that is none; the text names the field.
    """
    check_variants(config)
    grid = [assignment("grid", text) for text in config.grid]
    values = {name: check_values("grid", name, text.split(",")) for name, text in grid}
    if len(values) < len(grid):
        raise ValueError(f"grid: expected each field once, got {' '.join(config.grid)}")
    if config.match != "none" and "ffn_hidden_dim" in values:
        raise ValueError("match: expected no grid over ffn_hidden_dim, which it chooses, got one")
    own = own_fields(config)
    found: dict[str, Cell] = {}
    seeds: tuple[int | None, ...] = config.seeds or (None,)
    points = [
        dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())
    ]
    varied = {
        variant: _varied(
            variant, [changed(config, own.get(variant, {}) | p) for p in points], points
        )
        for variant in config.chosen
    }
    for seed, point in itertools.product(seeds, points):
        for variant in config.chosen:
            shown = {name: value for name, value in point.items() if name in varied[variant]}
            flags = own.get(variant, {}) | point | ({} if seed is None else {"seed": str(seed)})
            cell = Cell(variant, changed(config, flags), shown, seed)
            if config.match != "none":
                first = config.chosen[0]
                target = changed(config, own.get(first, {}) | point)
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
                f"match: expected {first}'s {name}={theirs} in {cell.variant}, got {ours}"
            )
    wanted = _cost(first, target, target.model.ffn_hidden_dim)
    base = _cost(cell.variant, cell.config, 1)
    slope = _cost(cell.variant, cell.config, 2) - base
    width = 1 + round((wanted - base) / slope)
    if width < 1:
        raise ValueError(
            f"match: expected room for a feed-forward layer in {cell.variant}, whose attention "
            f"alone has more {target.match} than all of {first}"
        )
    return replace(cell.config, model=replace(cell.config.model, ffn_hidden_dim=width))


def _cost(variant: str, config: Config, width: int) -> int:
    """Parameters or FLOPs per token with a feed-forward width, as the config matches them."""
    flags = tuple((config.model.flags | {"ffn_hidden_dim": width}).items())
    return _costs(variant, flags, config.train.seq_len)[config.match]


@cache
def _costs(variant: str, flags: tuple[tuple[str, Any], ...], seq_len: int) -> dict[str, int]:
    import torch

    from smollm.model.build import build_model

    with torch.device("meta"):
        model = build_model(variant, ModelConfig.of(**dict(flags)), vocab_size=1)
    return {"params": model.count_parameters(), "flops": model.flops_per_token(seq_len)}


def _varied(variant: str, configs: Sequence[Config], points: Sequence[dict[str, str]]) -> set[str]:
    """The grid's fields in which alone two points differ that make other runs of a variant."""
    found = set()
    described = [_described(variant, config) for config in configs]
    for name in points[0]:
        others: dict[Any, Any] = {}
        for point, run in zip(points, described, strict=True):
            rest = tuple(value for field, value in point.items() if field != name)
            if others.setdefault(rest, run) != run:
                found.add(name)
    return found


def _described(variant: str, config: Config) -> tuple[Any, ...]:
    """All that a variant's run follows from."""
    model = config.model
    check_layers(variant, model)
    layers = itertools.cycle(model.layer_arguments(variant))
    shape = {field.name: getattr(model, field.name) for field in fields(model)}
    for name in {"mechanisms", *OF_ATTENTION}:
        del shape[name]
    return list(itertools.islice(layers, model.num_layers)), shape, config.train
