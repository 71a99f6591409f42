"""Token shards on disk, and batches that are a pure function of the step."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smollm.data.order import shuffled
from smollm.files import write_atomically

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256  # llm.c's layout
HEADER_BYTES = 4 * HEADER_WORDS
MAX_VOCAB = 65_536  # ids are uint16
MAX_TOKENS = 2**31 - 1  # the header counts in int32

Tokens = npt.NDArray[np.uint16]


def write_shard(path: Path, tokens: Tokens) -> str:
    """Write tokens as a shard: 256 int32 (magic, version, count, zeros), then uint16 ids.

    Returns:
        The file's sha256.
    """
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    parts = header.data, np.ascontiguousarray(tokens, dtype="<u2").data
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        for part in parts:
            file.write(part)
            digest.update(part)

    write_atomically(path, write)
    return digest.hexdigest()


def is_shard(path: Path) -> bool:
    """Whether a file begins as a shard does."""
    with path.open("rb") as file:
        return file.read(8) == np.array([MAGIC, VERSION], dtype="<i4").tobytes()


def open_shard(path: Path) -> Tokens:
    """Map a shard's tokens into memory.

    Raises:
        ValueError: corrupt shard: its header or its size is not what it should be.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = np.frombuffer(file.read(12), dtype="<i4") if size >= HEADER_BYTES else ()
        if len(header) != 3:
            raise ValueError(
                f"{path}: corrupt shard: expected {HEADER_BYTES} bytes of header, got {size}"
            )
        magic, version, count = map(int, header)
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError(
                f"{path}: corrupt shard: expected magic {MAGIC}, version {VERSION}, "
                f"got {magic}, {version}"
            )
        if count < 0:
            raise ValueError(f"{path}: corrupt shard: expected a count >= 0, got {count}")
        expected = HEADER_BYTES + 2 * count
        if size == expected and count == 0:
            return np.zeros(0, dtype="<u2")
        try:
            if size == expected:
                return np.memmap(file, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
        except ValueError:  # the file shrank since its size was read
            size = os.fstat(file.fileno()).st_size
        raise ValueError(
            f"{path}: corrupt shard: expected {expected} bytes for its {count} tokens, got {size}"
        )


class Windows(ABC):
    """Windows of tokens: batches to train on, and a pass over them to validate on."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens in all shards."""

    @abstractmethod
    def num_windows(self, seq_len: int) -> int:
        """Windows of seq_len tokens.

        Raises:
            ValueError: there is not one.
        """

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Tensor:
        """The batch of a step: the same arguments always give the same tokens.

        It has the examples from step * batch_size on.

        Returns:
            int64 [batch_size, seq_len].
        """
        examples = range(step * batch_size, (step + 1) * batch_size)
        return self.examples(examples, seq_len, (seed,))

    @abstractmethod
    def examples(self, numbers: Sequence[int], seq_len: int, key: tuple[int, ...]) -> Tensor:
        """Examples of an endless stream, each a function of its number.

        Args:
            numbers: the examples', >= 0.
            seq_len: tokens in a window.
            key: seeds the order.

        Returns:
            int64 [len(numbers), seq_len].
        """

    @abstractmethod
    def sequential(self, batch_size: int, seq_len: int) -> Iterator[Tensor]:
        """Every window once, in file order, int64 [<= batch_size, seq_len] at a time."""

    @abstractmethod
    def spread(self, batch_size: int, seq_len: int, most: int) -> Iterator[Tensor]:
        """At most `most` windows from all over, int64 [<= batch_size, seq_len] at a time."""


class TokenWindows(Windows):
    """Non-overlapping windows of tokens over shards; none straddles two of them.

    Args:
        shards: the tokens of each shard.
        name: how errors call it.
    """

    def __init__(self, shards: Sequence[Tokens], name: str = "corpus") -> None:
        self._shards = list(shards)
        self._name = name

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(len(shard) for shard in self._shards)

    @property
    def last_token(self) -> int | None:
        """What ends the last document; None where there is no token."""
        return next((int(shard[-1]) for shard in reversed(self._shards) if len(shard)), None)

    def num_windows(self, seq_len: int) -> int:
        """Windows of seq_len tokens.

        Raises:
            ValueError: there is not one.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len: expected >= 1, got {seq_len}")
        count = sum(len(shard) // seq_len for shard in self._shards)
        if count == 0:
            raise ValueError(
                f"seq_len: expected at most the tokens of a shard of {self._name} "
                f"({max(map(len, self._shards), default=0)}), got {seq_len}"
            )
        return count

    def examples(self, numbers: Sequence[int], seq_len: int, key: tuple[int, ...]) -> Tensor:
        """Examples of an endless stream.

        Example i is window i mod n of epoch i div n's own permutation of all n windows, so that
        an epoch shows every window once.
        """
        windows = shuffled(numbers, self.num_windows(seq_len), key).tolist()
        rows = [self._window(window, seq_len) for window in windows]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def sequential(self, batch_size: int, seq_len: int) -> Iterator[Tensor]:
        """Every window once, in file order, int64 [<= batch_size, seq_len] at a time."""
        return self.spread(batch_size, seq_len, self.num_windows(seq_len))

    def spread(self, batch_size: int, seq_len: int, most: int) -> Iterator[Tensor]:
        """At most `most` windows, evenly spaced over all of them in file order.

        Window i of n out of N stands at floor((i + 1/2) N / n): in the middle of its n-th.

        Yields:
            int64 [<= batch_size, seq_len].
        """
        count = self.num_windows(seq_len)
        for name, value in (("batch_size", batch_size), ("most", most)):
            if value < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        most = min(most, count)
        for start in range(0, most, batch_size):
            places = range(start, min(start + batch_size, most))
            rows = [self._window((2 * i + 1) * count // (2 * most), seq_len) for i in places]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))

    def _window(self, index: int, seq_len: int) -> Tokens:
        for shard in self._shards:
            here = len(shard) // seq_len
            if index < here:
                return shard[index * seq_len : (index + 1) * seq_len]
            index -= here
        raise IndexError(index)


def document_boundaries(input_ids: Tensor, eos_id: int) -> Tensor:
    """Offsets of the documents in a batch that is flattened to one row.

    Every row starts a sequence, and so does every token after an eos, which belongs to the
    document that it ends.

    Args:
        input_ids: [B, T].
        eos_id: the token that ends a document.

    Returns:
        cu_seqlens int32 [N+1], from 0 to B T, strictly increasing.
    """
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    starts[:, 0] = True
    starts[:, 1:] = input_ids[:, :-1] == eos_id
    offsets = starts.flatten().nonzero()[:, 0].to(torch.int32)
    return torch.cat((offsets, offsets.new_tensor([input_ids.numel()])))
