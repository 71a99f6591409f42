"""`python -m smollm`: what each mechanism costs at SmolLM2-135M's shape."""

from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from smollm.attention import MECHANISMS
from smollm.model.build import build_model
from smollm.model.config import ModelConfig
from smollm.training.config import PRESETS

VOCAB_SIZE = 49152


def main() -> None:
    """Describe each model, fill a layer's cache in bfloat16, and print the costs."""
    config = PRESETS["smollm2-135m"].model
    costs = {row.title: _costs(name, config) for name, row in MECHANISMS.items()}
    view = Table(
        title=f"SmolLM2-135M's shape, T = {config.max_seq_len}",
        caption="FLOPs are training's, forward and backward.",
    )
    view.add_column("")
    for mechanism in costs:
        view.add_column(mechanism, justify="right")
    for name in costs["MHA"]:
        view.add_row(name, *(column[name] for column in costs.values()))
    Console().print(view)


def _costs(mechanism: str, config: ModelConfig) -> dict[str, str]:
    with torch.device("meta"):
        model = build_model(mechanism, config, VOCAB_SIZE)
    layer = build_model(mechanism, replace(config, num_layers=1), 1).to(torch.bfloat16).eval()
    cache = layer.new_cache(1, config.max_seq_len)
    with torch.no_grad():
        layer.encode(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    parts = {part: f"{count:,}" for part, count in model.parameters_by_part().items() if count}
    return parts | {
        "parameters": f"{model.count_parameters():,}",
        "cache bytes/token": f"{config.num_layers * cache.bytes_per_token:,}",
        "cache rows at most": f"{cache.layers[0].capacity:,}",
        "GFLOPs/token": f"{3 * model.flops_per_token(config.max_seq_len) / 1e9:.2f}",
    }


if __name__ == "__main__":
    main()
