"""The configuration of a study and its presets.

Every field is a flag of train.py; its docstring is the flag's help.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smollm.attention import MECHANISMS
from smollm.attention.options import INF, LARGEST, Range
from smollm.files import json_text
from smollm.model.config import ModelConfig
from smollm.training.trackers import Tracker

Preset = Literal["cpu", "ablation", "smollm2-135m"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class TrainConfig:
    """Data, optimisation and reporting of each run."""

    corpus: str = "auto"
    """Prepared corpus to train on. "auto": the newest that `python -m smollm.data` prepared,
    else "builtin", which needs no network, as "builtin-code". NAME=WEIGHT,NAME=WEIGHT mixes
    several, by the share of the tokens that each has."""
    data_dir: Path = Path(".data")
    """Folder of prepared corpora."""
    seq_len: Annotated[int, Range(2, LARGEST)] = 512
    """Tokens in a training sequence."""
    batch_size: Annotated[int, Range(1, LARGEST)] = 4
    """Sequences in a micro-batch."""
    grad_accum: Annotated[int, Range(1, LARGEST)] = 1
    """Micro-batches in a step."""
    steps: Annotated[int, Range(1, LARGEST)] = 1000
    """Optimizer steps of each run."""
    document_mask: bool = False
    """Keep attention and targets inside documents."""
    lr: Annotated[float, Range(0, INF, "()")] = 3e-3
    """Peak learning rate."""
    warmup_steps: Annotated[int, Range(0, LARGEST)] = 50
    """Steps of linear warm-up, at most all."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """The rate after the warm-up: flat, then linear to 0 ("wsd"); half a cosine to 0; flat."""
    decay_fraction: Annotated[float, Range(0, 1)] = 0.2
    """Last part of the steps, in which "wsd" falls linearly to 0; where it overlaps the warm-up,
    the lower rate holds."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon": Muon for the blocks' matrices, its updates scaled to AdamW's size; AdamW for the
    rest."""
    beta1: Annotated[float, Range(0, 1, "[)")] = 0.9
    """AdamW's first moment."""
    beta2: Annotated[float, Range(0, 1, "[)")] = 0.95
    """AdamW's second moment."""
    eps: Annotated[float, Range(1e-30, 1e30)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Range(0, INF, "[)")] = 0.01
    """On projections; never on embeddings, norms, biases, sinks and selection
    pressures."""
    clip: Annotated[float, Range(0, INF, "(]")] = 1.0
    """Largest gradient norm; inf for no limit."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 8
    """Seeds initialisation and data order, the same for every variant."""
    device: Device = "auto"
    """"auto" is a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the forward pass; weights stay fp32. "auto": bfloat16 on a GPU and on a CPU that
    multiplies in it (AVX512-BF16, AMX), else float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the training step's model through torch.compile. "auto": on a GPU."""
    activation_checkpointing: bool = False
    """Keep a block's input alone and compute the block again in the backward: less memory, about
    a third more work."""
    fsdp: bool = False
    """With several processes, shard the model over them (FSDP2) instead of a copy on each (DDP)."""
    log_every: Annotated[int, Range(1, LARGEST)] = 10
    """Steps between training records."""
    log: Tracker = "none"
    """Send the records to a tracker too, one that is installed; metrics.jsonl has them always."""
    val_every: Annotated[int, Range(1, LARGEST)] = 250
    """Steps between validations; one always ends a run."""
    val_tokens: Annotated[int, Range(1, LARGEST)] = 262_144
    """At most so many tokens of held-out documents are validated on."""
    save_every: Annotated[int, Range(1, LARGEST)] = 500
    """Steps between checkpoints, from which --resume goes on; an interrupt saves one too."""
    keep_checkpoints: Annotated[int, Range(1, LARGEST)] = 2
    """Checkpoints that a run keeps until it has finished, the latest ones."""
    generate_tokens: Annotated[int, Range(0, LARGEST)] = 128
    """Tokens generated after training, to measure speed and show a sample."""
    contexts: Annotated[tuple[int, ...], Range(1, LARGEST)] = (128, 1024)
    """Prompts of so many tokens measure prefill and decoding, where the model has room."""


@dataclass(frozen=True)
class Config:
    """Train small language models that differ in attention alone, and compare them.

    `train.py study FILE [flags]` takes the flags of a study.toml; `train.py report FOLDER...` joins
    studies that are done; `train.py sample RUN` continues a prompt with a trained run,
    `train.py evaluate RUN` scores it, and `train.py export RUN` writes it for transformers. Each
    has a --help of its own.
    """

    preset: Annotated[Preset, tyro.conf.arg(help_behavior_hint="(default: the machine's)")] = (
        "ablation"
    )
    """Where the other flags' defaults come from: "cpu" (about 2 minutes on 2 cores, the default
    without a GPU), "ablation" (the default with one), "smollm2-135m" (the full model)."""
    variants: tuple[str, ...] = tuple(MECHANISMS)
    """What to train, in this order: mechanisms, several that the layers have in turn, such as
    mha+mga, or names of your own, which --override NAME.layers=mha gives layers to."""
    only_mga: bool = False
    """Short for --variants mga."""
    seeds: Annotated[tuple[int, ...], Range(0, 2**63 - 1)] = ()
    """Train every variant once with each of these seeds; only with --seed by default."""
    grid: tuple[str, ...] = ()
    """Train every variant at all combinations of these fields, each FIELD=VALUE,VALUE..., for
    example lr=1e-3,3e-3 window_size=64,256."""
    override: tuple[str, ...] = ()
    """Fields of one variant alone, each VARIANT.FIELD=VALUE, for example mga.lr=2e-3. Here and in
    --grid the items of a field that has several are joined by "+": mha.window_pattern=64+full."""
    match: Literal["none", "params", "flops"] = "none"
    """Give every variant the feed-forward width with which it comes closest to the parameters, or
    to the FLOPs per token, of the first one."""
    output_dir: Path = Path("ablation_results")
    """Folder of the results; one that holds an earlier study's is refused."""
    overwrite: bool = False
    """Replace an earlier study's files in output_dir; other files there stay."""
    resume: Path | None = None
    """Go on with the study in this folder: finished runs stay, others continue from their newest
    checkpoint. The other flags' defaults are that study's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The variants to train."""
        return ("mga",) if self.only_mga else self.variants

    @property
    def plain(self) -> dict[str, Any]:
        """All fields as JSON has them, the model's flat."""
        fields: dict[str, Any] = asdict(self) | {"model": self.model.flags}
        plain: dict[str, Any] = json.loads(json_text(fields))
        return plain


PRESETS: dict[Preset, Config] = {
    "cpu": Config(
        preset="cpu",
        model=ModelConfig.of(
            embed_dim=144,
            latent_dim=72,
            rope_dim=8,
            genetic_window_size=64,
            ffn_hidden_dim=384,
        ),
        train=TrainConfig(
            seq_len=128,
            batch_size=8,
            steps=160,
            warmup_steps=16,
            log_every=5,
            val_every=40,
            val_tokens=16_384,
            save_every=40,
            generate_tokens=64,
        ),
    ),
    "ablation": Config(preset="ablation"),
    "smollm2-135m": Config(
        preset="smollm2-135m",
        model=ModelConfig.of(num_layers=30, genetic_window_size=256),
        train=TrainConfig(
            seq_len=2048,
            batch_size=8,
            grad_accum=64,
            steps=10_000,
            warmup_steps=2000,
            val_every=500,
            val_tokens=1_048_576,
        ),
    ),
}
