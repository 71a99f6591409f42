"""Prepared corpora: folders with token shards, tokenizer.json and corpus.json."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from smollm.data.prepare import BUILTIN, prepare_builtin, vocab_size
from smollm.data.shards import TokenWindows, open_shard


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


def _token_bytes(tokenizer: Tokenizer) -> Tensor:
    """A byte-level BPE writes each byte of a token as one character of its alphabet."""
    sizes = torch.zeros(vocab_size(tokenizer), dtype=torch.int64)
    added = tokenizer.get_added_tokens_decoder()
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index not in added:
            sizes[index] = len(token)
        elif not added[index].special:
            sizes[index] = len(token.encode())
    return sizes
