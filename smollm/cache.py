"""What generation keeps: named rows per token and layer, in a ring when a window bounds them."""

import torch
from einops import rearrange
from torch import Tensor


class Cache:
    """The caches of all layers, and how many tokens each sequence has put into them.

    Before the layers run, `advance` says which sequence and position every incoming token has;
    each layer then stores its rows. The token at position p stands at row p % capacity.

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
        self.decoding = False
        self._longest = 0
        capacities = (max_tokens if w is None else min(w, max_tokens) for w in windows)
        self.layers = [LayerCache(self, capacity) for capacity in capacities]

    def advance(self, lengths: Tensor, longest: int) -> Tensor:
        """Announce `lengths[b]` <= longest new tokens of each sequence; returns positions [N].

        Raises:
            NotImplementedError: more than one token at once into a cache in use.
            ValueError: more than max_tokens.
        """
        self.decoding = self._longest > 0
        if self.decoding and longest != 1:
            raise NotImplementedError(
                f"cache: expected an empty cache or one token at a time, got {longest} tokens"
            )
        self._longest += longest
        if self._longest > self.max_tokens:
            raise ValueError(
                f"cache: expected at most max_tokens={self.max_tokens}, got {self._longest}"
            )
        batch = torch.arange(len(lengths), device=lengths.device)
        self.sequence = torch.repeat_interleave(batch, lengths)
        first = lengths.cumsum(0) - lengths - self.lengths
        self.position = (
            torch.arange(len(self.sequence), device=lengths.device) - first[self.sequence]
        )
        self.lengths = self.lengths + lengths
        return self.position

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers, while it is within their windows."""
        return sum(layer.row_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all rows of all sequences."""
        return len(self.lengths) * sum(layer.row_bytes * layer.capacity for layer in self.layers)


class LayerCache:
    """One layer's rows, `cache["k"]` of shape [B, capacity, ...], zeros where none was stored."""

    def __init__(self, owner: Cache, capacity: int) -> None:
        self._owner = owner
        self.capacity = capacity
        self._rows: dict[str, Tensor] = {}

    def store(self, **new: Tensor) -> None:
        """Keep the newest rows of each announced token, [B, T, ...] or packed [1, N, ...]."""
        owner = self._owner
        kept: Tensor | slice = slice(None)
        if not owner.decoding:
            oldest = owner.lengths[owner.sequence] - self.capacity
            kept = (owner.position >= oldest).nonzero()[:, 0]
        sequence, row = owner.sequence[kept], owner.position[kept] % self.capacity
        for name, rows in new.items():
            if name not in self._rows:
                shape = (len(owner.lengths), self.capacity, *rows.shape[2:])
                self._rows[name] = rows.new_zeros(shape)
            flat = rearrange(rows, "b t ... -> (b t) ...")
            self._rows[name][sequence, row] = flat[kept].detach()

    def __getitem__(self, name: str) -> Tensor:
        return self._rows[name]

    @property
    def decoding(self) -> bool:
        """Whether the announced tokens continue sequences already in the cache."""
        return self._owner.decoding

    @property
    def lengths(self) -> Tensor:
        """Rows in use by each sequence, int32 [B]."""
        return self._owner.lengths.clamp(max=self.capacity)

    @property
    def positions(self) -> Tensor:
        """Position of the token in each row, int64 [B, capacity]; negative where there is none."""
        newest = self._owner.lengths[:, None].long() - 1
        row = torch.arange(self.capacity, device=newest.device)
        return newest - (newest - row) % self.capacity

    @property
    def row_bytes(self) -> int:
        """Bytes that one token takes in this layer."""
        return sum(x[0, 0].numel() * x.element_size() for x in self._rows.values())
