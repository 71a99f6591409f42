"""What generation keeps: named rows per token and layer, in a ring when a window bounds them."""

import torch
from einops import rearrange
from torch import Tensor

from kernels import ring_positions


class Cache:
    """The caches of all layers, and how many tokens each sequence has put into them.

    Before the layers run, `advance` says which sequence and position every incoming token has;
    each layer then stores its rows. The token at position p stands at row p % capacity, as
    `kernels.attention_decode` expects it.

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
        self.max_tokens = max_tokens
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)  # tokens so far
        self.sequence = self.position = torch.empty(0, dtype=torch.int64, device=device)  # [N]
        self.decoding = False  # whether the announced tokens continue sequences in the cache
        self.announced = 0  # tokens of the longest
        self._longest = 0
        capacities = (max_tokens if w is None else min(w, max_tokens) for w in windows)
        self.layers = [LayerCache(self, capacity) for capacity in capacities]

    def advance(self, lengths: Tensor, longest: int) -> Tensor:
        """Announce `lengths[b]` <= longest new tokens of each sequence; returns positions [N].

        Raises:
            ValueError: more than max_tokens.
        """
        if self._longest + longest > self.max_tokens:
            raise ValueError(
                f"cache: expected at most max_tokens={self.max_tokens}, "
                f"got {self._longest + longest}"
            )
        self.decoding = self.in_use
        self.announced = longest
        self._longest += longest
        batch = torch.arange(len(lengths), device=lengths.device)
        self.sequence = torch.repeat_interleave(batch, lengths)
        first = lengths.cumsum(0) - lengths - self.lengths
        self.position = (
            torch.arange(len(self.sequence), device=lengths.device) - first[self.sequence]
        )
        self.lengths = self.lengths + lengths
        return self.position

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

    def store(self, **new: Tensor) -> dict[str, Tensor]:
        """Keep the newest rows of each announced token, [B, T, ...] or packed [1, N, ...].

        Returns:
            By name, a ring [B, rows, ...] in which announced tokens that continue a sequence find
            all that they see: this layer's own unless they overwrite rows of their windows.
        """
        owner = self._owner
        kept: Tensor | slice = slice(None)
        if owner.announced > self.capacity:
            oldest = owner.lengths[owner.sequence] - self.capacity
            kept = (owner.position >= oldest).nonzero()[:, 0]
        sequence, row = owner.sequence[kept], owner.position[kept] % self.capacity
        overwrites = owner.decoding and owner.announced > 1 and self.capacity < owner.max_tokens
        rings = {}
        for name, rows in new.items():
            if name not in self._rows:
                shape = (len(owner.lengths), self.capacity, *rows.shape[2:])
                self._rows[name] = rows.new_zeros(shape)
            flat = rearrange(rows, "b t ... -> (b t) ...").detach()
            rings[name] = self._joined(self._rows[name], flat) if overwrites else self._rows[name]
            self._rows[name][sequence, row] = flat[kept]
        return rings

    def _joined(self, old: Tensor, new: Tensor) -> Tensor:
        """A ring for one call that holds this layer's rows and all of the new ones."""
        owner = self._owner
        size = self.capacity + owner.announced
        before = ring_positions(owner.lengths - owner.announced, self.capacity)
        ring = old.new_zeros(len(old), size, *old.shape[2:])
        ring[torch.arange(len(old), device=old.device)[:, None], before % size] = old
        ring[owner.sequence, owner.position % size] = new
        return ring

    @property
    def decoding(self) -> bool:
        """Whether the announced tokens continue sequences already in the cache."""
        return self._owner.decoding

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence so far, the announced ones included, int32 [B]."""
        return self._owner.lengths

    @property
    def row_bytes(self) -> int:
        """Bytes that one token takes in this layer."""
        return sum(x[0, 0].numel() * x.element_size() for x in self._rows.values())
