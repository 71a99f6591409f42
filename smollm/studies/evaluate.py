"""`python train.py evaluate RUN`: a trained run's loss on held-out documents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from smollm.attention.options import LARGEST, Range
from smollm.studies import OK
from smollm.studies.choice import Choice
from smollm.training.checks import check_val_tokens
from smollm.training.config import Device

if TYPE_CHECKING:
    from smollm.data import Corpus
    from smollm.studies.trained import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Evaluate(Choice):
    """Score a run on held-out documents, as its own validation did."""

    corpus: str | None = None
    """A prepared corpus of the run's tokenizer, or NAME=WEIGHT,NAME=WEIGHT; by default the one that
    it was trained on."""
    data_dir: Path | None = None
    """Folder of prepared corpora; the run's by default."""
    val_tokens: Annotated[int | None, Range(1, LARGEST)] = None
    """At most so many tokens; as many as in the run by default."""
    device: Device = "auto"
    """"auto" is a GPU if there is one."""


def main(argv: Sequence[str]) -> int:
    """Run `train.py evaluate`; returns its exit status.

    Raises:
        ValueError, OSError: what is refused. SystemExit: flags that are none.
    """
    given = Evaluate.parse(argv)
    run = given.open(given.device)
    corpus = find_corpus(run, given.corpus, given.data_dir)
    measured = score(run, corpus, given.val_tokens)
    print(f"{run.path}, {run.steps:,} steps, on {corpus.name} (sha256 {corpus.sha256[:12]}):")
    print(f"loss {measured['val_loss']:.4f} nats per token")
    print(f"perplexity {measured['perplexity']:,.2f}")
    print(f"{measured['bits_per_byte']:.4f} bits per byte")
    return OK


def find_corpus(run: "TrainedRun", name: str | None = None, root: Path | None = None) -> "Corpus":
    """Open a corpus that a run can be scored on.

    Args:
        run: the run.
        name: the corpus's; by default the one that the run was trained on, unchanged.
        root: folder of prepared corpora; the run's by default.

    Raises:
        ValueError: a corpus of another tokenizer, or not what the run was trained on.
        FileNotFoundError: there is none.
    """
    from smollm.data import load_corpus

    train = run.about["config"]["train"]
    own = run.about.get("corpus", train["corpus"])
    corpus = load_corpus(own if name is None else name, root or Path(train["data_dir"]))
    if corpus.tokenizer.to_str() != run.tokenizer.to_str():
        raise ValueError(
            f"corpus: expected one of {run.path}'s tokenizer, got {corpus.name!r} of another"
        )
    if name is None and corpus.sha256 != run.about["corpus_sha256"]:
        raise ValueError(
            f"corpus: expected the one that {run.path} was trained on (sha256 "
            f"{run.about['corpus_sha256'][:12]}), got {corpus.name!r} of {corpus.sha256[:12]}; "
            f"--corpus {corpus.name} scores it on that one"
        )
    return corpus


def score(run: "TrainedRun", corpus: "Corpus", val_tokens: int | None = None) -> dict[str, float]:
    """What `training.metrics.evaluate` measures, in windows as the run's own.

    On the run's corpus, device and number of threads that is to the bit what it recorded.

    Raises:
        ValueError: too few tokens.
    """
    from smollm.training.metrics import evaluate
    from smollm.training.parallel import World

    config = run.measured_by
    if val_tokens is not None:
        config = replace(config, val_tokens=val_tokens)
    check_val_tokens(config)
    device = run.model.embed_tokens.weight.device
    return evaluate(run.model, corpus, config, World(0, 1, device))
