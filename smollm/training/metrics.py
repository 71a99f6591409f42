"""What a run measures: held-out loss, speed, memory, and a log of all of it."""

import ctypes
import gc
import math
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from smollm.attention.rope import token_positions
from smollm.data import Corpus
from smollm.files import json_text
from smollm.model import SmolLM
from smollm.model.generate import evaluation_mode
from smollm.training.config import TrainConfig
from smollm.training.loader import Batch
from smollm.training.parallel import World
from smollm.training.record import Record

# Dense TFLOP/s by the vendor's datasheets: bf16, tf32, fp32. The first name that fits counts.
PEAK_TFLOPS = {
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 418, 60),
    "H100": (989, 495, 67),
    "H200": (989, 495, 67),
    "B200": (2250, 1125, 75),
    "A100": (312, 156, 19.5),
    "A10": (125, 62.5, 31.2),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "A6000": (155, 77, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}


class MetricsLog:
    """A JSON-lines file, one record a line, flushed at once.

    Args:
        path: what stands there is replaced.
        records: the first ones.
    """

    def __init__(self, path: Path, records: Sequence[Record] = ()) -> None:
        self._file: TextIO = path.open("w")
        for record in records:
            self.write(record)

    def write(self, record: Record) -> None:
        """Append one record; every line has the same keys, and null where nothing was measured."""
        self._file.write(json_text(asdict(record)) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class PeakMemory:
    """Peak memory above what was in use at construction.

    It counts a GPU's allocated bytes or the process's resident bytes, the latter on Linux alone and
    without pages of files: the first run touches most of the libraries' code.
    """

    earlier: int | None = None  # the peak of a process before, which this one continues

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _reset_resident_peak()
            self._file_pages = _resident("RssFile")

    def bytes(self) -> int | None:
        """The peak so far; None where it cannot be measured."""
        now = self._now()
        return now if self.earlier is None or now is None else max(self.earlier, now)

    def _now(self) -> int | None:
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)
        peak, file_pages = _resident("VmHWM"), _resident("RssFile")
        if peak is None or file_pages is None or self._file_pages is None:
            return None
        return max(0, peak - self._before - (file_pages - self._file_pages))


def _reset_resident_peak() -> int | None:
    """Let the process's peak start from the bytes resident now, which are returned."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed is not in use
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{name}:")[1].split()[0])
    except (OSError, IndexError):
        return None


class Stopwatch:
    """Seconds of a device's work, validations left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0

    def start(self) -> None:
        """Count from now."""
        synchronize(self._device)
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the start, pauses left out."""
        synchronize(self._device)
        return time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        synchronize(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            self._started += time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that the host's clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def peak_flops(device: torch.device, config: TrainConfig) -> float | None:
    """Datasheet FLOP/s of a GPU in the type of the forward pass, None when unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = next((rates for part, rates in PEAK_TFLOPS.items() if part in name), None)
    if rates is None:
        return None
    exact = torch.get_float32_matmul_precision() == "highest"
    return 1e12 * rates[0 if in_bfloat16(config, device) else 2 if exact else 1]


def compile_seconds() -> float:
    """Seconds that this process has spent in torch.compile."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("entire_frame_compile", 0.0))


def check_targets(corpus: Corpus, config: TrainConfig) -> None:
    """Refuse a corpus whose windows have nothing to predict.

    Raises:
        ValueError: naming the split.
    """
    size = corpus.token_bytes
    if not any(bool(size[predicted].any()) for _, predicted in _held_out(corpus, config)):
        raise ValueError(_no_targets(corpus, config))
    windows = corpus.train.sequential(config.batch_size, config.seq_len)
    batches = (Batch.of(ids, corpus.eos_id, config.document_mask) for ids in windows)
    if not any(batch.num_targets for batch in batches):
        raise ValueError(
            f"document_mask: expected documents of 2 tokens or more in {corpus.name}'s train "
            "split, got none"
        )


@torch.no_grad()
def evaluate(model: SmolLM, corpus: Corpus, config: TrainConfig, world: World) -> dict[str, float]:
    """Loss on held-out documents, in nats per token, as perplexity and in bits per byte.

    Windows of seq_len tokens, at most val_tokens, come from all over the split. Each predicts all
    its tokens but the first; the bytes are those of the predicted tokens, so bits per byte compare
    across tokenizers. Several processes share the windows out among them.

    Raises:
        ValueError: no token that stands for text is predicted.
    """
    device, token_bytes = world.device, corpus.token_bytes
    batches = list(_held_out(corpus, config))
    nats, targets, size = 0.0, 0.0, 0.0
    with evaluation_mode(model):
        for first in range(0, len(batches), world.size):
            index = first + world.rank
            batch, predicted = batches[min(index, len(batches) - 1)]  # shards need all processes
            ids, cu_seqlens = batch.to(device)
            with autocast(config, device):
                loss = model(ids, labels=ids, cu_seqlens=cu_seqlens, with_logits=False)["loss"]
            if index < len(batches):
                nats += float(loss) * len(predicted)
                targets += len(predicted)
                size += int(token_bytes[predicted].sum())
    nats, targets, size = world.sum((nats, targets, size))
    if size == 0:
        raise ValueError(_no_targets(corpus, config))
    loss = nats / targets
    return {
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / size,
    }


def _held_out(corpus: Corpus, config: TrainConfig) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch that is validated on, and the predicted ids [N] of it."""
    most = config.val_tokens // config.seq_len
    for windows in corpus.val.spread(config.batch_size, config.seq_len, most):
        ids, cu_seqlens = batch = Batch.of(windows, corpus.eos_id, config.document_mask)
        yield batch, ids[token_positions(ids.shape[1], cu_seqlens).expand_as(ids) > 0]


def _no_targets(corpus: Corpus, config: TrainConfig) -> str:
    return (
        f"val_tokens: expected tokens of text to predict among {config.val_tokens} held-out ones "
        f"of {corpus.name}, got none"
    )


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The forward pass's type: weights stay fp32, matrix products run in it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16(config, device))


def in_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Whether the forward pass, and so the cache, is in bfloat16 and not in float32."""
    if config.dtype == "auto":
        return device.type == "cuda" or multiplies_bfloat16()
    return config.dtype == "bfloat16"


def dtype_name(config: TrainConfig, device: torch.device) -> str:
    """The forward pass's type as `--dtype` names it, which "auto" leaves to the device."""
    return "bfloat16" if in_bfloat16(config, device) else "float32"


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def generation(model: SmolLM, corpus: Corpus, config: TrainConfig) -> dict[str, Any]:
    """Greedy tokens per second for one sequence, bytes that its cache takes, and texts.

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
    read = corpus.tokenizer.decode
    return {
        "generation_tokens_per_second": new / seconds if new else None,
        "inference": _inference(model, corpus, config),
        "cache_bytes_per_token": cache.bytes_per_token,
        "cache_dtype": "bf16" if in_bfloat16(config, device) else "fp32",
        "prompt": read(ids[0, : prompt.shape[1]].tolist()),
        "sample": read(ids[0, prompt.shape[1] :].tolist()),
    }


def _inference(model: SmolLM, corpus: Corpus, config: TrainConfig) -> list[dict[str, float]]:
    """Tokens per second of one sequence at each context: of the prompt, then of each new token."""
    device, new = model.embed_tokens.weight.device, config.generate_tokens
    found: list[dict[str, float]] = []
    for context in config.contexts:
        if context + new > model.max_seq_len or context > corpus.val.tokens or new < 2:
            continue
        prompt = next(corpus.val.sequential(1, context)).to(device)

        with autocast(config, device), torch.no_grad():
            _seconds(model, prompt, 2)
            prefills, rests = zip(*(_seconds(model, prompt, n) for n in (1, 1, new)), strict=True)
        found.append({
            "context": context,
            "prefill_tokens_per_second": context / sorted(prefills)[1],
            "decode_tokens_per_second": (new - 1) / rests[-1],
        })  # fmt: skip
    return found


def _seconds(model: SmolLM, prompt: Tensor, new: int) -> tuple[float, float]:
    """How long the first new token takes, and all others."""
    device = prompt.device
    first: list[float] = []

    def note(_: Tensor) -> None:
        if not first:
            synchronize(device)
            first.append(time.perf_counter())

    synchronize(device)
    start = time.perf_counter()
    model.generate(prompt, new, on_token=note)
    synchronize(device)
    return first[0] - start, time.perf_counter() - first[0]
