"""The variants of a study: their names, and the fields that are their own."""

import re
from dataclasses import fields

from smollm.attention import MECHANISMS
from smollm.model.config import ModelConfig
from smollm.studies.fields import FIELDS, VALUE, assignment, check_values
from smollm.training.config import Config

NAME = re.compile(r"[A-Za-z0-9_]+([+-][A-Za-z0-9_]+|\.[0-9][A-Za-z0-9_]*)*")
RUN = re.compile(
    rf"(?P<variant>{NAME.pattern})(-[A-Za-z0-9_]+={VALUE.pattern})*"
)  # its files' name
GRID = "grid"  # the table beside those of variants
KEYS = FIELDS | {field.name for field in fields(Config)} | {GRID}  # of a study's file


def variant_of(run: str) -> str | None:
    """The variant in a run's name, or None of what is no run's name."""
    found = RUN.fullmatch(run)
    return None if found is None else found["variant"]


def check_variants(config: Config) -> None:
    """Refuse variants that cannot be told apart, or have no name for files.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    chosen = config.chosen
    if config.only_mga and config.variants not in (Config.variants, ("mga",)):
        raise ValueError(
            f"only_mga: expected no other variants beside it, got {' '.join(config.variants)}"
        )
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"variants: expected distinct ones, got {' '.join(chosen) or 'none'}")
    for name in chosen:
        if not NAME.fullmatch(name) or name in KEYS:
            raise ValueError(
                "variants: expected names of letters, digits and _, joined by - or + or with . "
                f"before a digit, none of them a field's, got {name!r}"
            )
    layers = "+".join(config.model.layers)
    if layers and len(chosen) > 1:
        raise ValueError(
            f"layers: expected them of one variant, since all {len(chosen)} would be alike, got "
            f"{layers}; choose it with --variants NAME, or give them to one with --override "
            f"NAME.layers={layers}"
        )


def own_fields(config: Config) -> dict[str, dict[str, str]]:
    """The fields that are a variant's own, as text by variant.

    Of variants that are not trained those may be there that could be.

    Raises:
        ValueError: an override that cannot be read, or is of no variant.
    """
    own: dict[str, dict[str, str]] = {}
    for text in config.override:
        variant = text.partition("=")[0].rpartition(".")[0]
        field, value = assignment("override", text.removeprefix(f"{variant}."))
        if not variant:
            raise ValueError(f"override: expected VARIANT.FIELD=VALUE, got {text!r}")
        own.setdefault(variant, {})[field] = check_values("override", field, [value])[0]
    for variant, given in own.items():
        if variant not in config.chosen and not of_mechanisms(variant) and "layers" not in given:
            raise ValueError(
                f"override: expected a field of {', '.join(config.chosen)}, in a study's file a "
                f"table of that name, got one of {variant!r}"
            )
    return own


def check_layers(variant: str, model: ModelConfig) -> None:
    """Refuse a variant whose layers nothing tells, or its name and its `layers` differently.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if not model.layers and not of_mechanisms(variant):
        raise ValueError(
            f'variants: expected {", ".join(MECHANISMS)}, several of them joined by "+", or a name '
            f"that layers are given to, as by --override {variant}.layers=mha, got {variant!r}"
        )
    if model.layers and of_mechanisms(variant) and list(model.layers) != variant.split("+"):
        raise ValueError(
            f"layers: expected none of {variant}, whose name tells them, got "
            f"{'+'.join(model.layers)}; --variants takes another name for it"
        )


def of_mechanisms(variant: str) -> bool:
    """Whether it is named after the mechanisms of its layers."""
    return all(name in MECHANISMS for name in variant.split("+"))
