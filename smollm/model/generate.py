"""Generation: greedy or sampled, batched, with every mechanism's own cache."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smollm.attention.cache import Cache
from smollm.attention.padding import packing
from smollm.model.replay import repeated

STEPS_AT_ONCE = 16  # between two looks at a GPU, which each wait for it
ROUNDING = 1e-6  # of sums of probabilities that were rounded to fp32


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate inside; every submodule has its own mode back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


class Generator(nn.Module):
    """A language model that continues prompts; it supplies what is declared here."""

    vocab_size: int
    max_seq_len: int
    lm_head: nn.Module

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, embed_dim] and positions."""
        raise NotImplementedError

    def new_cache(self, batch_size: int, max_tokens: int) -> Cache:
        """An empty cache."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        use_cache: bool = True,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Continue each prompt by max_new_tokens tokens, in evaluation mode.

        On a GPU the steps behind the first few are replays of a CUDA graph of one of them, so
        Python's part of a step, such as a hook, runs in those few alone.

        Args:
            input_ids: prompts [B, T].
            max_new_tokens: tokens to add, >= 0.
            attention_mask: [B, T], True at real tokens, padding on the left. Default none.
            temperature: 0 (default) is greedy; else logits are divided by it and sampled, from
                torch's global generator.
            top_k: sample from the k most likely tokens only.
            top_p: sample from the fewest most likely tokens whose probabilities reach top_p; 1 is
                all of them.
            eos_token_id: a sequence that has drawn it is filled up with it.
            use_cache: False recomputes the whole sequence for every token.
            on_token: called with the tokens [B] of each step as soon as they are there.

        Returns:
            [B, T + max_new_tokens], the prompts included.

        Raises:
            ValueError, TypeError: a setting out of range, a mask that is not padding on the left,
                or more than max_seq_len tokens in all.
        """
        self._check_generation(
            input_ids, max_new_tokens, attention_mask, temperature, top_k, top_p, eos_token_id
        )
        batch, prompt = input_ids.shape
        device, filler = input_ids.device, 0 if eos_token_id is None else eos_token_id
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids = torch.cat((input_ids, input_ids.new_full((batch, max_new_tokens), filler)), dim=1)
        mask = torch.cat((mask.long(), mask.new_ones(batch, max_new_tokens)), dim=1)
        end = torch.full((1,), prompt, device=device)
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        cache = self.new_cache(batch, ids.shape[1]) if use_cache else None
        patience = 1 if device.type == "cpu" else STEPS_AT_ONCE

        def extend(hidden: Tensor) -> None:
            token = _choose(self.lm_head(hidden[:, -1]).float(), temperature, top_k, top_p)
            new = torch.where(finished, filler, token).to(ids.dtype)
            ids.index_copy_(1, end, new[:, None])
            end.add_(1)
            if eos_token_id is not None:
                finished.logical_or_(token == eos_token_id)

        def step() -> None:
            hidden, _ = self.encode(ids.index_select(1, end - 1), cache=cache)
            extend(hidden)

        next_step = repeated(step, max_new_tokens - 1, device)
        with evaluation_mode(self):
            for count in range(max_new_tokens):
                if cache is None or count == 0:
                    known = slice(prompt + count)
                    visible = None if attention_mask is None else mask[:, known]
                    extend(self.encode(ids[:, known], visible, cache=cache)[0])
                else:
                    next_step()
                if on_token is not None:
                    on_token(ids[:, prompt + count])
                if eos_token_id is not None and count % patience == 0 and bool(finished.all()):
                    break
        return ids

    def _check_generation(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        eos_token_id: int | None,
    ) -> None:
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids: expected [B, T], got {list(input_ids.shape)}")
        for name, count, least in (("max_new_tokens", max_new_tokens, 0), ("top_k", top_k, 1)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise TypeError(f"{name}: expected an integer, got {count!r}")
            if count is not None and count < least:
                raise ValueError(f"{name}: expected >= {least}, got {count}")
        total = input_ids.shape[1] + max_new_tokens
        if total > self.max_seq_len:
            raise ValueError(
                f"max_new_tokens: expected at most max_seq_len={self.max_seq_len} tokens with the "
                f"prompt, got {total}"
            )
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected >= 0, got {temperature}")
        if temperature == 0 and (top_k is not None or top_p is not None):
            raise ValueError("temperature: expected > 0 with top_k or top_p, got 0 (greedy)")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {top_p}")
        if attention_mask is not None:
            packing(attention_mask, *input_ids.shape)
            if not bool(attention_mask[:, -1].all()):
                raise ValueError(
                    "attention_mask: expected padding on the left, got it on the right"
                )
        if eos_token_id is not None and not 0 <= eos_token_id < self.vocab_size:
            raise ValueError(
                f"eos_token_id: expected 0 to {self.vocab_size - 1}, got {eos_token_id}"
            )


def _choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token per row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability, token = _distribution(logits, temperature, top_k, top_p)
    # As torch.multinomial draws, whose checks of the probabilities may wait for a GPU.
    rank = (probability / torch.empty_like(probability).exponential_()).argmax(dim=-1, keepdim=True)
    return token.gather(1, rank)[:, 0]


def _distribution(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """Probabilities, unnormalised with top_p, and tokens of each row, the likeliest first."""
    logits, token = logits.double().sort(dim=-1, descending=True)
    if top_k is not None:
        logits, token = logits[:, :top_k], token[:, :top_k]
    # However small the temperature, the likeliest token keeps a logit of 0.
    probability = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        reached = probability.cumsum(dim=-1) - probability  # by the likelier tokens alone
        probability = probability.masked_fill((reached > 0) & (reached >= top_p - ROUNDING), 0.0)
    return probability, token
