"""Tokenizers: where they come from, whether they fit a corpus, and what their tokens spell."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from smollm.data.hub import HUB_NAME, OFFLINE, reach_hub
from smollm.data.shards import MAX_VOCAB

SMOLLM_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer.json, or the tokenizer of a model on the hub.

    Raises:
        FileNotFoundError: no such file. ValueError: the file is no tokenizer.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    path = Path(source)
    if path.exists():
        return read_tokenizer(path)
    beside_files = "/" in source and path.parent.is_dir()
    if beside_files or source.endswith(".json") or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"tokenizer: expected a tokenizer.json or a model on the hub, got {source!r}, "
            "no such file"
        )
    from huggingface_hub import hf_hub_download

    reach_hub()
    try:
        downloaded = hf_hub_download(source, "tokenizer.json")
    except Exception as error:  # the library passes on whatever the network's layers raise
        raise ConnectionError(
            f"tokenizer: {source!r} could not be loaded from the hub: {error}. {OFFLINE}"
        ) from error
    return read_tokenizer(Path(downloaded))


def read_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer: expected a tokenizer.json, got {path}: {error}") from error


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) + 1


def end_of_text(tokenizer: Tokenizer) -> int:
    """Check that a tokenizer fits a corpus; the id that ends a document.

    Raises:
        ValueError: it does not.
    """
    size = vocab_size(tokenizer)
    if size > MAX_VOCAB:
        raise ValueError(
            f"tokenizer: expected a vocabulary of at most {MAX_VOCAB} (uint16), got {size}"
        )
    eos_id: int | None = tokenizer.token_to_id(END_OF_TEXT)
    if eos_id is None:
        raise ValueError(f"tokenizer: expected a token {END_OF_TEXT}, got none")
    added = tokenizer.get_added_tokens_decoder()
    if eos_id not in added or not added[eos_id].special:
        raise ValueError(
            f"tokenizer: expected {END_OF_TEXT} to be a special token, got one that text can spell"
        )
    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        raise ValueError("tokenizer: expected a byte-level BPE, got another decoder")
    return eos_id


def spellings(tokenizer: Tokenizer) -> list[bytes]:
    """The text that each id stands for, in UTF-8; nothing for special tokens and unused ids.

    A byte-level BPE writes each byte of a token as one character of its alphabet. Added tokens
    are written as they are.
    """
    spelled = [b""] * vocab_size(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    alphabet = _alphabet()
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            spelled[index] = b"" if added[index].special else token.encode()
        elif alphabet.keys() >= set(token):
            spelled[index] = bytes(alphabet[character] for character in token)
        else:
            spelled[index] = token.encode()
    return spelled


def _alphabet() -> dict[str, int]:
    """GPT-2's: a printable byte is its own Latin-1 character, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
