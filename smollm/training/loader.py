"""The batches that steps train on, made ready one step ahead."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import torch
from torch import Tensor

from smollm.data import Corpus, document_boundaries
from smollm.training.config import TrainConfig
from smollm.training.parallel import World


class Batch(NamedTuple):
    """What the model takes, on the CPU."""

    ids: Tensor  # int64 [B, T]; with a document mask packed into [1, B * T]
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, ids: Tensor, eos_id: int, document_mask: bool) -> Self:
        """Of tokens [B, T]; a document mask keeps their documents apart."""
        if not document_mask:
            return cls(ids, None)
        return cls(ids.view(1, -1), document_boundaries(ids, eos_id))

    @property
    def num_targets(self) -> int:
        """All tokens but the first of each sequence."""
        sequences = len(self.ids) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return self.ids.numel() - sequences

    def pinned(self) -> Self:
        """The same in memory that a GPU reads while the CPU goes on."""
        boundaries = None if self.cu_seqlens is None else self.cu_seqlens.pin_memory()
        return type(self)(self.ids.pin_memory(), boundaries)

    def to(self, device: torch.device) -> Self:
        """The same on a device; copies of pinned memory wait for nothing."""
        ids, boundaries = self
        if boundaries is not None:
            boundaries = boundaries.to(device, non_blocking=True)
        return type(self)(ids.to(device, non_blocking=True), boundaries)


class Loader:
    """The micro-batches of each step; while one step runs, a thread makes those of the next.

    Several processes share a step's micro-batches out among them, or else the rows of each.

    Args:
        corpus, config, world: the run's.
    """

    def __init__(self, corpus: Corpus, config: TrainConfig, world: World) -> None:
        self.seconds_waited = 0.0
        self._corpus, self._config, self._world = corpus, config, world
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def step(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step, by its number from 0."""
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._make, step)
        batches = self._ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._make, step + 1)
        self.seconds_waited += time.perf_counter() - began
        return batches

    def _make(self, step: int) -> list[Batch]:
        config, world = self._config, self._world
        indices = range(step * config.grad_accum, (step + 1) * config.grad_accum)
        whole = config.grad_accum % world.size == 0
        batches = []
        for index in indices[world.rank :: world.size] if whole else indices:
            ids = self._corpus.train.batch(index, config.batch_size, config.seq_len, config.seed)
            rows = ids if whole else ids[world.rank :: world.size].contiguous()
            batch = Batch.of(rows, self._corpus.eos_id, config.document_mask)
            batches.append(batch.pinned() if world.device.type == "cuda" else batch)
        return batches
