"""What a run measures: held-out loss, speed, memory, and a log of all of it."""

import gc
import json
import math
import os
import resource
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from smollm.attention.rope import token_positions
from smollm.data import Corpus, document_boundaries
from smollm.model import SmolLM
from smollm.training.config import TrainConfig

# Dense bf16 FLOP/s by the vendors' datasheets, for MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "4090": 165e12}


class MetricsLog:
    """A JSON-lines file, one record a line, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class PeakMemory:
    """Peak memory since construction: a GPU's allocated bytes, or the process's resident bytes."""

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        except (OSError, IndexError):
            unit = 1 if os.uname().sysname == "Darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_resident_peak() -> None:
    """Linux only; elsewhere the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that the host's clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device) -> float | None:
    """Datasheet bf16 FLOP/s of a GPU, None when unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


def batch_arguments(ids: Tensor, eos_id: int, document_mask: bool) -> tuple[Tensor, Tensor | None]:
    """input_ids and cu_seqlens of a batch [B, T]; with a document mask packed into [1, B * T]."""
    if not document_mask:
        return ids, None
    return ids.view(1, -1), document_boundaries(ids, eos_id)


@torch.no_grad()
def evaluate(model: SmolLM, corpus: Corpus, config: TrainConfig) -> dict[str, float]:
    """Loss on held-out documents, in nats per token, as perplexity and in bits per byte.

    Windows of seq_len tokens, at most val_tokens, come from all over the split. Each predicts all
    its tokens but the first; the bytes are those of the predicted tokens, so bits per byte compare
    across tokenizers.
    """
    device = model.embed_tokens.weight.device
    token_bytes = corpus.token_bytes.to(device)
    nats, targets, size = 0.0, 0, 0
    model.eval()
    most = config.val_tokens // config.seq_len
    for batch in corpus.val.spread(config.batch_size, config.seq_len, most):
        ids, cu_seqlens = batch_arguments(batch.to(device), corpus.eos_id, config.document_mask)
        predicted = ids[token_positions(ids.shape[1], cu_seqlens, device=device).expand_as(ids) > 0]
        with autocast(config, device):
            loss = model(ids, labels=ids, cu_seqlens=cu_seqlens)["loss"]
        nats += float(loss) * len(predicted)
        targets += len(predicted)
        size += int(token_bytes[predicted].sum())
    model.train()
    loss = nats / targets
    return {
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / size,
    }


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The forward pass's type: weights stay fp32, matrix products run in it."""
    on_gpu = device.type == "cuda"
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def generation(model: SmolLM, corpus: Corpus, config: TrainConfig) -> dict[str, Any]:
    """Greedy tokens per second for one sequence, bytes that its cache takes, and the text.

    The prompt is the start of the held-out documents; an unmeasured run warms up.
    """
    device = model.embed_tokens.weight.device
    window = next(corpus.val.sequential(1, config.seq_len)).to(device)
    room = min(config.seq_len // 2, model.max_seq_len - config.generate_tokens)
    prompt = window[:, : max(1, min(32, room))]
    new = min(config.generate_tokens, model.max_seq_len - prompt.shape[1])
    with autocast(config, device), torch.no_grad():
        cache = model.new_cache(1, prompt.shape[1])
        model.encode(prompt, cache=cache)
        model.generate(prompt, min(new, 4))
        synchronize(device)
        start = time.perf_counter()
        ids = model.generate(prompt, new)
        synchronize(device)
        seconds = time.perf_counter() - start
    text = corpus.tokenizer.decode(ids[0].tolist())
    return {
        "generation_tokens_per_second": new / seconds if new else None,
        "cache_bytes_per_token": cache.bytes_per_token,
        "sample": text,
    }
