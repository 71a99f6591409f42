"""How scores before the softmax fall with distance, as models start and as they end.

`python -m bench.studies.mga.distance FOLDER RUN... [--output distance.png]` reads trained runs of a
study's folder, whose mechanism calls `attention` (MGA does without fitness), prints the mean score
of a query and the key so many tokens before it less that of its own key, and draws it.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from smollm.attention import genetic, grouped
from smollm.model import SmolLM
from smollm.studies.evaluate import find_corpus
from smollm.studies.trained import open_run

DISTANCES = (0, 1, 2, 4, 8, 16, 32, 63)
SEQUENCES = 8
FIGURE = Path(__file__).with_name("distance.png")


@torch.no_grad()
def falls(model: SmolLM, ids: Tensor) -> Tensor:
    """The mean over layers, heads and tokens at each of the distances, less that at 0, [distances].

    Args:
        model: of layers that call `attention`.
        ids: [B, T].

    Raises:
        ValueError: a layer calls none, or the sequences are no longer than the distances.
    """
    if ids.shape[1] <= max(DISTANCES):
        raise ValueError(f"ids: expected over {max(DISTANCES)} tokens, got {ids.shape[1]}")
    found: list[Tensor] = []
    with ExitStack() as patched:
        for module in (genetic, grouped):
            seen = _seen_by(module.attention, found)
            patched.enter_context(mock.patch.object(module, "attention", seen))
        model(ids)
    if len(found) != len(model.layers):
        raise ValueError(
            f"model: expected {len(model.layers)} layers that call attention, as MGA with fitness "
            f"does not, got {len(found)}"
        )
    means = torch.stack(found).mean(dim=0)
    return means - means[0]


def _seen_by(attention: Any, found: list[Tensor]) -> Any:
    def seen(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        scale = arguments.get("scale") or q.shape[-1] ** -0.5
        key = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        bias = arguments.get("key_bias")
        means = []
        for distance in DISTANCES:
            tokens = q.shape[1] - distance
            score = scale * (q[:, distance:] * key[:, :tokens]).sum(dim=-1)
            if bias is not None:
                score = score + bias[:, :tokens] - bias[:, distance:]
            means.append(score.double().mean())
        found.append(torch.stack(means))
        return attention(q, k, v, **arguments)

    return seen


def measure(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """A run's falls at its start and at its end, on held-out text."""
    run = open_run(folder, name, "cpu")
    corpus, train = find_corpus(run), run.measured_by
    ids = next(corpus.val.spread(SEQUENCES, train.seq_len, SEQUENCES))
    end = falls(run.model, ids)
    run.model.reset_parameters(run.about["seed"])
    return falls(run.model, ids), end


def draw(measured: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Two panels, of the starts and of the ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for index, (panel, title) in enumerate(zip(panels, ("at the start", "trained"), strict=True)):
        for (name, both), style in zip(measured.items(), cycle(("-", "--", ":", "-."))):
            panel.plot(DISTANCES[1:], both[index][1:], marker="o", linestyle=style, label=name)
        panel.set(title=title, xscale="log", xlabel="tokens before the query")
        panel.set_xticks(DISTANCES[1:], [str(d) for d in DISTANCES[1:]])
        panel.grid(alpha=0.3)
    panels[0].set_ylim(-12, 4)
    panels[0].set_ylabel("mean score less the own token's")
    panels[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.mga.distance")
    parser.add_argument("folder", type=Path, help="of a study, with weights")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="by name, or by variant")
    parser.add_argument("--output", type=Path, default=FIGURE)
    given = parser.parse_args(argv)
    try:
        measured = {name: measure(given.folder, name) for name in given.runs}
    except (OSError, ValueError) as error:
        print(f"distance: {error}", file=sys.stderr)
        return 2
    print("| | | " + " | ".join(map(str, DISTANCES[1:])) + " |")
    print("|:--|:--|" + "--:|" * len(DISTANCES[1:]))
    for name, both in measured.items():
        for when, means in zip(("start", "end"), both, strict=True):
            print(f"| `{name}` | {when} | " + " | ".join(f"{x:+.2f}" for x in means[1:]) + " |")
    draw(measured, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
