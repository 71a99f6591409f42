"""`python train.py sample RUN`: a trained run continues a prompt."""

import codecs
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from smollm.attention.options import INF, LARGEST, Range
from smollm.studies import OK
from smollm.studies.choice import Choice
from smollm.training.config import Device

if TYPE_CHECKING:
    from smollm.studies.trained import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Sample(Choice):
    """Continue a prompt with what a run has learnt, up to the end of the document."""

    prompt: str | None = None
    """What to continue; by default standard input, without the newline at its end. On a terminal
    a new document is begun."""
    max_new_tokens: Annotated[int, Range(1, LARGEST)] = 128
    """Tokens at most."""
    temperature: Annotated[float, Range(0, INF, "[)")] = 0.8
    """Divides the logits that tokens are drawn by; 0 takes the likeliest."""
    top_k: Annotated[int | None, Range(1, LARGEST)] = None
    """Draw from the likeliest so many alone."""
    top_p: Annotated[float | None, Range(0, 1, "(]")] = None
    """Draw from the fewest likeliest ones that have this probability together."""
    seed: Annotated[int | None, Range(0, 2**63 - 1)] = None
    """Draws the same text again; another every time by default."""
    device: Device = "auto"
    """"auto" is a GPU if there is one."""


def main(argv: Sequence[str]) -> int:
    """Run `train.py sample`; returns its exit status.

    Raises:
        ValueError, OSError: what is refused. SystemExit: flags that are none.
    """
    given = Sample.parse(argv)
    prompt = given.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    run = given.open(given.device)
    try:
        continue_prompt(run, prompt, given, _write)
    except KeyboardInterrupt:
        _write("\n")
        raise
    _write("\n")
    return OK


def continue_prompt(
    run: "TrainedRun", prompt: str, options: Sample, write: Callable[[str], object]
) -> None:
    """Write a prompt, and what follows it as soon as it is there.

    A token of a byte-level tokenizer may end inside a character, which then waits for the rest.

    Raises:
        ValueError: a setting that generation refuses, or no room in the model for so many tokens.
    """
    import torch

    from smollm.data.tokenizer import spellings
    from smollm.training.metrics import autocast

    end = run.about.get("eos_id")
    ids: list[int] = run.tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids and end is None:
        raise ValueError("prompt: expected text, as the run names no token that begins it, got ''")
    if len(ids) >= (most := run.model.max_seq_len):
        raise ValueError(f"prompt: expected fewer than max_seq_len={most} tokens, got {len(ids)}")
    spelled, decoder = spellings(run.tokenizer), codecs.getincrementaldecoder("utf-8")("replace")
    device = run.model.embed_tokens.weight.device
    torch.manual_seed(torch.seed() if options.seed is None else options.seed)
    started = False

    def show(token: "torch.Tensor") -> None:
        nonlocal started
        if not started:  # nothing of it was refused
            write(prompt)
            started = True
        write(decoder.decode(spelled[int(token)]))

    with autocast(run.measured_by, device):
        run.model.generate(
            torch.tensor([ids or [end]], device=device),
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_token_id=end,
            on_token=show,
        )
    write(decoder.decode(b"", final=True))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
