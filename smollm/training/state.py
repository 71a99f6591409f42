"""Checkpoints of a run: what its next step depends on, each one whole or absent, the last few kept.

The data and the random numbers of a step follow from the config and the step's number alone, so a
checkpoint holds neither a position in the corpus nor the state of a generator.
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from smollm.data import Corpus
from smollm.files import json_text, write_json
from smollm.model.checkpoint import write_tensors
from smollm.training.config import Config
from smollm.training.metrics import dtype_name

SEAL = re.compile(r"step_\d{9}\.json", re.ASCII)
FREE = ("data_dir", "corpus", "device", "log", "save_every", "keep_checkpoints")  # change no result


def identity(
    mechanism: str, config: Config, corpus: Corpus, device: torch.device
) -> dict[str, Any]:
    """All that a run's result depends on, as plain values by name."""
    train = {name: value for name, value in asdict(config.train).items() if name not in FREE}
    train["dtype"] = dtype_name(config.train, device)
    named = {"mechanism": mechanism, "corpus_sha256": corpus.sha256, "device": device.type}
    plain: dict[str, Any] = json.loads(json_text(named | config.model.flags | train))
    return plain


def origin(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Where a run's weights come from, as plain values that are kept beside them."""
    return {
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "eos_id": corpus.eos_id,
        "seed": config.train.seed,
        "config": config.plain,
    }


def differences(expected: dict[str, Any], got: dict[str, Any]) -> str:
    """The fields in which an identity is another one, in words; empty where there are none."""
    names = [name for name in expected | got if expected.get(name) != got.get(name)]
    return ", ".join(f"{n}={got.get(n)!r} instead of {expected.get(n)!r}" for n in names)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed a process's generators for one step, so that a resumed run draws what it would have."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)


class Checkpoints:
    """The checkpoints in a run's folder.

    `step_000000040.pt` is one, once `step_000000040.json` seals it with its digest and says of
    which run it is: a process killed in between leaves none.

    Args:
        folder: made when the first is saved.
        keep: how many of the latest stay.
        about: the run's `identity`.
    """

    def __init__(self, folder: Path, keep: int, about: dict[str, Any]) -> None:
        self._folder, self._keep, self._about = folder, keep, about

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Write one, and remove those that are no longer among the latest.

        Raises:
            OSError: it cannot be written; the older ones are still there.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:09}.pt"
        write_tensors(path, content)
        seal = {"step": step, "sha256": _digest(path), "run": self._about}
        write_json(path.with_suffix(".json"), seal)
        for old in self._seals()[: -self._keep]:
            _remove(old)

    def check(self) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            ValueError: naming the fields that differ.
        """
        for seal in self._seals():
            about = _read(seal)
            if about is not None and (other := differences(about["run"], self._about)):
                raise ValueError(
                    f"resume: expected the run of {seal.with_suffix('.pt')}, got {other}"
                )

    def newest(self, say: Callable[[str], object]) -> dict[str, Any] | None:
        """The content of the latest undamaged one, on the CPU; None where there is none.

        Args:
            say: told of each damaged one, which is removed.

        Raises:
            ValueError: as `check`.
        """
        self.check()

        def drop(seal: Path) -> None:
            say(f"{seal.with_suffix('.pt')} is damaged; going on from the one before it")
            _remove(seal)

        return newest_checkpoint(self._folder, drop)

    def _seals(self) -> list[Path]:
        return _seals(self._folder)


def newest_checkpoint(
    folder: Path, damaged: Callable[[Path], object] = lambda seal: None
) -> dict[str, Any] | None:
    """The content of a folder's latest undamaged checkpoint, on the CPU; None where there is none.

    Args:
        folder: of a run's checkpoints.
        damaged: called with the seal of each damaged one.
    """
    for seal in reversed(_seals(folder)):
        path, about = seal.with_suffix(".pt"), _read(seal)
        if about is not None and path.is_file() and _digest(path) == about["sha256"]:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return content
        damaged(seal)
    return None


def checkpoint_files(folder: Path) -> list[Path]:
    """Every file in a folder that saving checkpoints wrote, whole or not."""
    ours = re.compile(r"\.?step_\d{9}\.(pt|json)(\.\w+\.tmp)?", re.ASCII)
    return [path for path in folder.glob("*") if ours.fullmatch(path.name)]


def clear_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a folder, and what a killed process left of one."""
    for file in checkpoint_files(folder):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # someone else's files are in it
        folder.rmdir()


def _seals(folder: Path) -> list[Path]:
    """By step."""
    return sorted(path for path in folder.glob("step_*.json") if SEAL.match(path.name))


def _read(seal: Path) -> dict[str, Any] | None:
    """What a seal says; None where it is damaged."""
    with suppress(ValueError, OSError):
        about = json.loads(seal.read_text(encoding="utf-8"))
        if isinstance(about, dict) and isinstance(about.get("run"), dict) and "sha256" in about:
            return about
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(seal: Path) -> None:
    """The seal first: without it there is no checkpoint."""
    seal.unlink(missing_ok=True)
    seal.with_suffix(".pt").unlink(missing_ok=True)
