"""Fields of a run as text: what flags, grids, overrides and a study's file say of them.

As one text the items of a field that has several, such as window_pattern, are joined by "+".
"""

import re
from dataclasses import fields, replace
from functools import cache
from inspect import getdoc
from typing import Any, get_args, get_origin, get_type_hints

import tyro

from smollm.model.config import ModelConfig
from smollm.training.config import Config, TrainConfig

VALUE = re.compile(r"[A-Za-z0-9.+_-]+")
TRAIN_FIELDS = {field.name for field in fields(TrainConfig)}
OF_ALL_RUNS = {
    "seed",
    "corpus",
    "data_dir",
    "device",
}  # --seeds varies the first, nothing the others
NOTHING = "None"  # of a field without a value, or without items
FIELDS = (TRAIN_FIELDS | set(ModelConfig().flags)) - OF_ALL_RUNS


def with_flags(config: Config, flags: list[str]) -> Config:
    """A config with some of train.py's flags changed.

    Raises:
        SystemExit: flags that are none; stderr says which.
    """
    return tyro.cli(
        Config,
        prog="train.py",
        description=f"{getdoc(Config)}\n\nDefaults shown are those of --preset {config.preset}.",
        args=flags,
        default=config,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def changed(config: Config, values: dict[str, str]) -> Config:
    """A config with some fields given as text."""
    given = {name: _value(name, text) for name, text in values.items()}
    train = {name: value for name, value in given.items() if name in TRAIN_FIELDS}
    model = {name: value for name, value in given.items() if name not in TRAIN_FIELDS}
    return replace(
        config,
        train=replace(config.train, **train),
        model=ModelConfig.of(**(config.model.flags | model)),
    )


def assignment(flag: str, text: str) -> tuple[str, str]:
    """The field and the value of FIELD=VALUE.

    Raises:
        ValueError: it is none.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{flag}: expected FIELD=VALUE, got {text!r}")
    return name.strip().replace("-", "_"), value.strip()


def check_values(flag: str, name: str, values: list[str]) -> list[str]:
    """The values, which a run's field may have and its files be called by.

    Raises:
        ValueError: no such field, values that are none, or one twice.
    """
    if name not in FIELDS:
        raise ValueError(
            f"{flag}: expected a field of training or of the model, but {sorted(OF_ALL_RUNS)}, got "
            f"{name!r}"
        )
    for value in values:
        if not VALUE.fullmatch(value):
            raise ValueError(f"{flag}: expected {name}=VALUE, got {name}={value}")
    if len(set(values)) < len(values):
        raise ValueError(f"{flag}: expected distinct values of {name}, got {','.join(values)}")
    return values


def as_flags(name: str, value: Any) -> list[str]:
    """A field as the command line has it."""
    flag = f"--{name.replace('_', '-')}"
    if word(value) in ("true", "false"):
        return [flag if word(value) == "true" else f"--no-{flag[2:]}"]
    if isinstance(value, list | tuple):
        return [flag, *map(word, value)]
    return [f"{flag}={word(value)}"]


def as_text(value: Any) -> str:
    """A field as a grid or an override has it."""
    return "+".join(map(word, value)) or NOTHING if isinstance(value, list) else word(value)


def word(value: Any) -> str:
    """A plain value as a word of the command line."""
    if isinstance(value, float):
        return repr(value).replace("e+", "e")  # "+" joins items
    return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def _value(name: str, text: str) -> Any:
    """What a flag makes of a field's text."""
    value: Any = text
    if isinstance(_of(Config(), name), tuple) and text == NOTHING:
        value = []
    elif _has_items(name):
        value = text.split("+")
    return _of(with_flags(Config(), as_flags(name, value)), name)


def _of(config: Config, name: str) -> Any:
    return getattr(config.train, name) if name in TRAIN_FIELDS else config.model.flags[name]


def _has_items(name: str) -> bool:
    parts = (TrainConfig, ModelConfig, *map(type, ModelConfig().mechanisms.values()))
    (hint,) = {hints[name] for part in parts if name in (hints := get_type_hints(part))}
    return any(get_origin(part) is tuple for part in (hint, *get_args(hint)))
