"""What generation keeps: named rows per token and layer, in a ring when a window bounds them."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import ring_positions


class Step(NamedTuple):
    """Tokens on their way into a cache."""

    sequence: Tensor  # [N], of each token
    position: Tensor  # [N], in its sequence
    lengths: Tensor  # int32 [B], of the sequences once they are in
    longest: int  # tokens of the sequence that gains the most
    decoding: bool  # whether they continue sequences in the cache


class Places(NamedTuple):
    """Where a ring keeps tokens on their way into it."""

    kept: Tensor | None  # which of them, if not all
    rows: tuple[Tensor, Tensor]  # each one's sequence, and its row there


class Cache:
    """The caches of all layers, and how many tokens each sequence has put into them.

    Before the layers run, `begin` says which sequence and position every incoming token has; each
    layer then stores its rows, and `commit` makes the tokens part of their sequences. What fails in
    between leaves the sequences as they were. The token at position p stands at row p % capacity,
    as `kernels.attention_decode` expects it. Rows and lengths are updated in place, and of a step
    of one token for each sequence Python decides nothing, so such a step can be replayed.

    Args:
        windows: each layer's window_size; a layer keeps no more rows than its window.
        batch_size: sequences.
        max_tokens: the most tokens that a sequence will reach.
        device: where the rows live.
    """

    def __init__(
        self,
        windows: list[int | None],
        batch_size: int,
        max_tokens: int,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, size in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if size < 1:
                raise ValueError(f"{name}: expected >= 1, got {size}")
        self.windows = windows
        self.max_tokens = max_tokens
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)  # tokens so far
        self._longest = 0
        self._step: Step | None = None
        self._places: dict[int, Places] = {}  # of the step, by capacity
        capacities = (max_tokens if w is None else min(w, max_tokens) for w in windows)
        self.layers = [LayerCache(self, capacity) for capacity in capacities]

    def begin(self, lengths: Tensor, longest: int, tokens: int) -> Step:
        """Announce `lengths[b]` <= longest new tokens of each sequence, `tokens` in all.

        Raises:
            ValueError: more than max_tokens.
        """
        if self._longest + longest > self.max_tokens:
            raise ValueError(
                f"cache: expected at most max_tokens={self.max_tokens}, "
                f"got {self._longest + longest}"
            )
        batch = torch.arange(len(lengths), device=lengths.device)
        sequence = torch.repeat_interleave(batch, lengths, output_size=tokens)
        first = lengths.cumsum(0) - lengths - self.lengths
        position = torch.arange(tokens, device=lengths.device) - first[sequence]
        self._step = Step(sequence, position, self.lengths + lengths, longest, self.in_use)
        self._places = {}
        return self._step

    def places(self, capacity: int) -> Places:
        """Where rings of so many rows keep the announced tokens, the same in every layer."""
        if capacity not in self._places:
            step, kept = self.step, None
            if step.longest > capacity:
                oldest = step.lengths[step.sequence] - capacity
                kept = (step.position >= oldest).nonzero()[:, 0]
            sequence, position = (x if kept is None else x[kept] for x in step[:2])
            self._places[capacity] = Places(kept, (sequence, position % capacity))
        return self._places[capacity]

    def commit(self) -> None:
        """The announced tokens are part of their sequences now, in every layer."""
        for layer in self.layers:
            layer.commit()
        self.lengths.copy_(self.step.lengths)
        self._longest += self.step.longest
        self._step = None

    @property
    def step(self) -> Step:
        """What `begin` announced."""
        if self._step is None:
            raise ValueError("cache: expected tokens announced by begin(), got none")
        return self._step

    @property
    def in_use(self) -> bool:
        """Whether it holds tokens."""
        return self._longest > 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers, while it is within their windows."""
        return sum(layer.row_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all rows of all sequences."""
        return len(self.lengths) * sum(layer.row_bytes * layer.capacity for layer in self.layers)


class LayerCache:
    """One layer's rows by name, [B, capacity, ...], zeros where none was stored."""

    def __init__(self, owner: Cache, capacity: int) -> None:
        self._owner = owner
        self.capacity = capacity
        self._rows: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}  # rows that would overwrite some still in sight

    @torch.no_grad()
    def store(self, **new: Tensor) -> dict[str, Tensor]:
        """Keep the newest rows of each announced token, [B, T, ...] or packed [1, N, ...].

        Returns:
            By name, a ring [B, rows, ...] in which announced tokens that continue a sequence find
            all that they see: this layer's own unless they overwrite rows of their windows.

        Raises:
            ValueError: rows of other names, shapes or types than those of the tokens before.
        """
        step = self._owner.step
        flat = {name: x.flatten(0, 1) for name, x in new.items()}
        self._waiting = {}
        if not step.decoding:  # whatever a call that failed has left is of no sequence
            shape = len(step.lengths), self.capacity
            self._rows = {name: x.new_zeros(*shape, *x.shape[1:]) for name, x in flat.items()}
        self._check(flat)
        if step.decoding and step.longest > 1 and self.capacity < self._owner.max_tokens:
            self._waiting = flat
            return {name: self._joined(self._rows[name], x) for name, x in flat.items()}
        self._keep(flat)
        return self._rows

    def newest(self, name: str) -> Tensor:
        """The row of each sequence's newest token before the announced ones, [B, ...]."""
        rows, lengths = self._rows[name], self._owner.lengths
        batch = torch.arange(len(lengths), device=lengths.device)
        return rows[batch, (lengths.long() - 1) % self.capacity]

    def commit(self) -> None:
        """Store the rows that `store` had to hold back."""
        self._keep(self._waiting)
        self._waiting = {}

    def _keep(self, flat: dict[str, Tensor]) -> None:
        kept, rows = self._owner.places(self.capacity)
        for name, x in flat.items():
            self._rows[name].index_put_(rows, x if kept is None else x[kept])

    def _joined(self, old: Tensor, new: Tensor) -> Tensor:
        """A ring for one call that holds this layer's rows and all of the new ones."""
        step, size = self._owner.step, self.capacity + self._owner.step.longest
        before = ring_positions(self._owner.lengths, self.capacity)
        ring = old.new_zeros(len(old), size, *old.shape[2:])
        ring[torch.arange(len(old), device=old.device)[:, None], before % size] = old
        ring[step.sequence, step.position % size] = new
        return ring

    def _check(self, flat: dict[str, Tensor]) -> None:
        held = {name: (x.shape[2:], x.dtype) for name, x in self._rows.items()}
        given = {name: (x.shape[1:], x.dtype) for name, x in flat.items()}
        if held != given:
            raise ValueError(f"cache: expected rows as those it holds, {held}, got {given}")

    @property
    def decoding(self) -> bool:
        """Whether the announced tokens continue sequences already in the cache."""
        return self._owner.step.decoding

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence so far, the announced ones included, int32 [B]."""
        return self._owner.step.lengths

    @property
    def row_bytes(self) -> int:
        """Bytes that one token takes in this layer."""
        return sum(x[0, 0].numel() * x.element_size() for x in self._rows.values())
