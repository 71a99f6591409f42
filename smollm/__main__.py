"""`python -m smollm`: what each mechanism costs at SmolLM2-135M's shape."""

import math

import torch
from rich.console import Console
from rich.table import Table

from smollm.attention import MECHANISMS
from smollm.model.config import ModelConfig, build_model
from smollm.training.config import PRESETS

VOCAB_SIZE = 49152
TOKENS = 64


def main() -> None:
    """Build each model in bfloat16, run a forward pass through it, and print its costs."""
    config = PRESETS["smollm2-135m"].model
    costs = {row.title: _costs(name, config) for name, row in MECHANISMS.items()}
    view = Table(title=f"SmolLM2-135M's shape, T = {config.max_seq_len}")
    view.add_column("")
    for mechanism in costs:
        view.add_column(mechanism, justify="right")
    for name in costs["MHA"]:
        view.add_row(name, *(column[name] for column in costs.values()))
    console = Console()
    console.print(view)
    console.print(
        f"FLOPs are training's, forward and backward. The loss is an untrained model's on {TOKENS} "
        f"random tokens; a uniform guess has {math.log(VOCAB_SIZE):.2f}."
    )


def _costs(mechanism: str, config: ModelConfig) -> dict[str, str]:
    torch.manual_seed(0)
    model = build_model(mechanism, config, VOCAB_SIZE).to(torch.bfloat16).eval()
    ids = torch.randint(VOCAB_SIZE, (1, TOKENS))
    cache = model.new_cache(1, config.max_seq_len)
    with torch.no_grad():
        loss = model(ids, labels=ids, cache=cache)["loss"]
    parts = {part: f"{count:,}" for part, count in model.parameters_by_part().items() if count}
    return parts | {
        "parameters": f"{model.count_parameters():,}",
        "cache bytes/token": f"{cache.bytes_per_token:,}",
        "cache rows at most": f"{cache.layers[0].capacity:,}",
        "GFLOPs/token": f"{3 * model.flops_per_token(config.max_seq_len) / 1e9:.2f}",
        "untrained loss": f"{float(loss):.2f}",
    }


if __name__ == "__main__":
    main()
