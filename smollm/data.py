"""Corpora: the built-in one, the SmolLM corpus, and the command that prepares them.

A prepared corpus is a folder with token shards (train_000000.bin, ..., val_000000.bin, ...),
tokenizer.json and corpus.json. `python -m smollm.data --help` lists the flags.
"""

import ast
import hashlib
import json
import platform
import shutil
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from smollm.files import write_json
from smollm.shards import MAX_VOCAB, TokenWindows, document_boundaries, open_shard, write_shard

__all__ = ["Corpus", "document_boundaries", "load_corpus", "prepare_builtin", "prepare_corpus"]

BUILTIN = "builtin"
BUILTIN_VOCAB = 4096
END_OF_TEXT = "<|endoftext|>"
SMOLLM_CORPUS = "HuggingFaceTB/smollm-corpus"
SMOLLM_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
HUB_SHARDS = {"fineweb-edu-dedup": 234, "cosmopedia-v2": 104}
OFFLINE = (
    "Without a network, `python train.py` trains on its built-in corpus, and --data-files with "
    "--tokenizer reads local parquet."
)


class Corpus:
    """A prepared corpus.

    Args:
        folder: where it was prepared.

    Raises:
        FileNotFoundError: there is none. ValueError: a shard is corrupt.
    """

    def __init__(self, folder: Path) -> None:
        about_file = folder / "corpus.json"
        if not about_file.is_file():
            raise FileNotFoundError(f"{folder}: expected a prepared corpus, got no corpus.json")
        about = json.loads(about_file.read_text())
        self.folder = folder
        self.name: str = about["name"]
        self.sha256: str = about["sha256"]
        self.vocab_size: int = about["vocab_size"]
        self.eos_id: int = about["eos_id"]
        self.documents: int = about["documents"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.train = self._split("train", about["train_tokens"])
        self.val = self._split("val", about["val_tokens"])

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of text that each token stands for, int64 [vocab_size]; 0 for special tokens."""
        return _token_bytes(self.tokenizer)

    def _split(self, split: str, tokens: int) -> TokenWindows:
        paths = sorted(self.folder.glob(f"{split}_*.bin"))
        shards = [open_shard(path, self.vocab_size) for path in paths]
        windows = TokenWindows(shards, name=f"{self.name}'s {split} split")
        if windows.tokens != tokens:
            raise ValueError(
                f"{self.folder}: corrupt corpus: expected {tokens} {split} tokens, "
                f"got {windows.tokens}"
            )
        return windows


def load_corpus(name: str = "auto", root: Path = Path(".data")) -> Corpus:
    """Open a prepared corpus; the built-in one is prepared when it is not there yet.

    Args:
        name: a corpus under root, "builtin", or "auto" (default): the one prepared last, except
            the built-in one, which it falls back to.
        root: folder of prepared corpora.

    Raises:
        FileNotFoundError: no such corpus. ValueError: it is corrupt.
    """
    if name == "auto":
        prepared = [p.parent for p in root.glob("[!.]*/corpus.json") if p.parent.name != BUILTIN]
        newest = max(prepared, key=lambda p: (p / "corpus.json").stat().st_mtime, default=None)
        name = BUILTIN if newest is None else newest.name
    if name == BUILTIN:
        return Corpus(prepare_builtin(root))
    if not (root / name / "corpus.json").is_file():
        raise FileNotFoundError(
            f"corpus: expected one prepared under {root}/, got {name!r}; prepare it with "
            f"`python -m smollm.data --corpus {name}`, or use --corpus builtin"
        )
    return Corpus(root / name)


def prepare_builtin(root: Path = Path(".data")) -> Path:
    """Tokenise the prose that CPython carries, unless this version's already stands there.

    Documents are pydoc's help topics and the docstrings of each module of the standard library,
    about 1.7 MB; the tokenizer is a byte-level BPE of 4096 entries trained on the training
    documents. The text varies with Python's version, and so does the corpus hash.

    Args:
        root: folder of prepared corpora.

    Returns:
        The corpus's folder.
    """
    folder = root / BUILTIN
    version = platform.python_version()
    about_file = folder / "corpus.json"
    if about_file.is_file() and json.loads(about_file.read_text()).get("python") == version:
        return folder
    documents = list(_python_documents())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d for d in documents if not _held_out(d, 50)), trainer)
    return _prepare(BUILTIN, documents, tokenizer, root, held_out=50, python=version)


def prepare_corpus(
    name: str,
    shards: int,
    root: Path = Path(".data"),
    *,
    data_files: Sequence[Path] = (),
    tokenizer: str = SMOLLM_TOKENIZER,
    shard_tokens: int = 100_000_000,
) -> Path:
    """Tokenise parquet files with a `text` column into shards.

    Args:
        name: "fineweb-edu-dedup" or "cosmopedia-v2" of the SmolLM corpus, streamed from the
            Hugging Face hub; or any name for data_files.
        shards: how many of the hub's files, from the first.
        root: folder of prepared corpora.
        data_files: local parquet files to read instead.
        tokenizer: a tokenizer.json, or a model on the hub; byte-level BPE.
        shard_tokens: tokens in a shard.

    Returns:
        The corpus's folder.

    Raises:
        ValueError: an unknown name, shards out of range, a tokenizer that does not fit, or too
            few documents to hold some out. FileNotFoundError: no such data file.
        ConnectionError: the hub cannot be reached.
    """
    if name == BUILTIN or Path(name).name != name or name.startswith("."):
        raise ValueError(f"corpus: expected the name of a folder but {BUILTIN!r}, got {name!r}")
    if not data_files:
        if name not in HUB_SHARDS:
            raise ValueError(f"corpus: expected one of {[BUILTIN, *HUB_SHARDS]}, got {name!r}")
        if not 1 <= shards <= HUB_SHARDS[name]:
            raise ValueError(f"shards: expected 1 to {HUB_SHARDS[name]} of {name}, got {shards}")
    for path in data_files:
        if not path.is_file():
            raise FileNotFoundError(f"data_files: expected a parquet file, got {path}")
    loaded = _load_tokenizer(tokenizer)
    texts = _parquet_texts(name, shards, data_files)
    return _prepare(name, texts, loaded, root, held_out=5, shard_tokens=shard_tokens)


def _prepare(
    name: str,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    root: Path,
    *,
    held_out: int,
    shard_tokens: int = 100_000_000,
    **about: str,
) -> Path:
    """Write a corpus beside its place and move it there once it is whole."""
    eos_id = _end_of_text(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that spells one out does not end there
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    digest = hashlib.sha256()
    writers = {s: _ShardWriter(building, s, shard_tokens) for s in ("train", "val")}
    count = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(f"tokenising {name}")
            for texts in _batches(documents, 256):
                encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
                for text, encoding in zip(texts, encodings, strict=True):
                    raw = text.encode()
                    digest.update(len(raw).to_bytes(8, "little") + raw)
                    split = "val" if _held_out(text, held_out) else "train"
                    writers[split].add([*encoding.ids, eos_id])
                count += len(texts)
                tokens = sum(writer.tokens for writer in writers.values())
                progress.update(
                    task, description=f"tokenising {name}: {count:,} documents, {tokens:,} tokens"
                )
        for split, writer in writers.items():
            writer.close()
            if writer.tokens == 0:
                raise ValueError(
                    f"{name}: expected enough documents to hold some out, got {count} and an "
                    f"empty {split} split"
                )
        tokenizer.save(str(building / "tokenizer.json"))
        content = {
            "name": name,
            "sha256": digest.hexdigest(),
            "vocab_size": _vocab_size(tokenizer),
            "eos_id": eos_id,
            "documents": count,
            "train_tokens": writers["train"].tokens,
            "val_tokens": writers["val"].tokens,
            **about,
        }
        write_json(building / "corpus.json", content)
        building.chmod(0o755)
        shutil.rmtree(root / name, ignore_errors=True)
        return building.rename(root / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _batches(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    stream = iter(documents)
    while batch := list(islice(stream, size)):
        yield batch


class _ShardWriter:
    """Cuts a stream of documents into shards of shard_tokens tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.tokens = 0
        self._folder = folder
        self._split = split
        self._shards = 0
        self._filled = 0
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)

    def add(self, ids: list[int]) -> None:
        new = np.array(ids, dtype=np.uint16)
        self.tokens += len(new)
        while len(new):
            taken = new[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            new = new[len(taken) :]
            if self._filled == len(self._buffer):
                self.close()

    def close(self) -> None:
        if self._filled:
            path = self._folder / f"{self._split}_{self._shards:06d}.bin"
            write_shard(path, self._buffer[: self._filled])
            self._shards, self._filled = self._shards + 1, 0


def _held_out(text: str, per_mille: int) -> bool:
    """Whether a document is for validation: its own text decides, whatever stands around it."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") % 1000 < per_mille


def _python_documents() -> Iterator[str]:
    """pydoc's topics, then each standard library module's docstrings, in a fixed order."""
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()))
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        if text:
            yield text


def _parquet_texts(name: str, shards: int, data_files: Sequence[Path]) -> Iterator[str]:
    import datasets

    if data_files:
        source, files = "parquet", [str(path) for path in data_files]
    else:
        _reach_hub()
        total = HUB_SHARDS[name]
        source = SMOLLM_CORPUS
        files = [f"{name}/train-{i:05d}-of-{total:05d}.parquet" for i in range(shards)]
    try:
        stream = datasets.load_dataset(
            source, data_files={"train": files}, split="train", streaming=True
        )
        for row in stream:
            if row["text"]:
                yield row["text"]
    except KeyError as error:
        raise ValueError(f"{files[0]}: expected a column 'text', got none") from error
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(f"{source} could not be read: {error}. {OFFLINE}") from error


def _load_tokenizer(source: str) -> Tokenizer:
    if Path(source).is_file():
        try:
            return Tokenizer.from_file(source)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"tokenizer: expected a tokenizer.json, got {source}: {error}"
            ) from error
    from huggingface_hub import hf_hub_download

    _reach_hub()
    try:
        return Tokenizer.from_file(hf_hub_download(source, "tokenizer.json"))
    except OSError as error:
        raise ConnectionError(
            f"tokenizer {source} could not be loaded: {error}. {OFFLINE}"
        ) from error


def _reach_hub() -> None:
    """Without a network, go straight to the hub library's cache instead of a minute of retries."""
    import datasets
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _end_of_text(tokenizer: Tokenizer) -> int:
    """Check that the tokenizer fits the shards; the id that ends a document."""
    size = _vocab_size(tokenizer)
    if size > MAX_VOCAB:
        raise ValueError(
            f"tokenizer: expected a vocabulary of at most {MAX_VOCAB} (uint16), got {size}"
        )
    eos_id: int | None = tokenizer.token_to_id(END_OF_TEXT)
    if eos_id is None:
        raise ValueError(f"tokenizer: expected a token {END_OF_TEXT}, got none")
    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        raise ValueError("tokenizer: expected a byte-level BPE, got another decoder")
    return eos_id


def _vocab_size(tokenizer: Tokenizer) -> int:
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def _token_bytes(tokenizer: Tokenizer) -> Tensor:
    """A byte-level BPE writes each byte of a token as one character of its alphabet."""
    sizes = torch.zeros(_vocab_size(tokenizer), dtype=torch.int64)
    added = tokenizer.get_added_tokens_decoder()
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index not in added:
            sizes[index] = len(token)
        elif not added[index].special:
            sizes[index] = len(token.encode())
    return sizes


@dataclass(frozen=True)
class Arguments:
    """Prepare a corpus for train.py: download, tokenise, write shards."""

    corpus: str = "fineweb-edu-dedup"
    """"fineweb-edu-dedup" or "cosmopedia-v2" of the SmolLM corpus, "builtin", or a name for
    --data-files."""
    shards: int = 2
    """Files of the SmolLM corpus to take, about 2 GB each."""
    root: Path = Path(".data")
    """Folder of prepared corpora."""
    data_files: tuple[Path, ...] = ()
    """Local parquet files with a `text` column, instead of the hub's."""
    tokenizer: str = SMOLLM_TOKENIZER
    """A tokenizer.json, or a model on the Hugging Face hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    arguments = tyro.cli(Arguments, prog="python -m smollm.data", args=argv)
    try:
        if arguments.corpus == BUILTIN:
            folder = prepare_builtin(arguments.root)
        else:
            folder = prepare_corpus(
                arguments.corpus,
                arguments.shards,
                arguments.root,
                data_files=arguments.data_files,
                tokenizer=arguments.tokenizer,
            )
        corpus = Corpus(folder)
    except (ValueError, OSError) as error:
        print(f"smollm.data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("smollm.data: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(
        f"{folder}: {corpus.train.tokens:,} training and {corpus.val.tokens:,} validation tokens "
        f"of {corpus.documents:,} documents, sha256 {corpus.sha256[:12]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
