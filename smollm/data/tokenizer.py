"""Tokenizers: where they come from, whether they fit a corpus, and what their tokens spell."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from smollm.data.hub import HUB_NAME, OFFLINE, reach_hub
from smollm.data.shards import MAX_VOCAB
from smollm.files import write_atomically

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(source: str, eos_token: str | None = None) -> tuple[Tokenizer, int]:
    """A tokenizer.json, or the tokenizer of a model on the hub, that fits a corpus.

    Args:
        source: the file, or OWNER/NAME.
        eos_token: what ends a document; by default <|endoftext|> if it is special there, else
            the eos_token of the tokenizer_config.json beside it.

    Returns:
        The tokenizer, and the id that ends a document.

    Raises:
        FileNotFoundError: no such file. ValueError: the file is no tokenizer, or none that fits.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    tokenizer = read_tokenizer(_find(source, TOKENIZER_FILE))
    if eos_token is None and not _is_special(tokenizer, END_OF_TEXT):
        eos_token = _own_end(source)
    return tokenizer, end_of_text(tokenizer, END_OF_TEXT if eos_token is None else eos_token)


def _find(source: str, file: str) -> Path:
    """A file of a tokenizer: itself or beside it, or the hub's."""
    path = Path(source)
    if path.exists():
        return path if file == TOKENIZER_FILE else path.with_name(file)
    beside_files = "/" in source and path.parent.is_dir()
    if beside_files or source.endswith(".json") or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"tokenizer: expected a tokenizer.json or a model on the hub, got {source!r}, "
            "no such file"
        )
    from huggingface_hub import hf_hub_download

    reach_hub()
    try:
        return Path(hf_hub_download(source, file))
    except Exception as error:  # the library passes on whatever the network's layers raise
        raise ConnectionError(
            f"tokenizer: {source!r} could not be loaded from the hub: {error}. {OFFLINE}"
        ) from error


def _own_end(source: str) -> str | None:
    """The eos_token that a model's tokenizer_config.json names."""
    try:
        config = json.loads(_find(source, "tokenizer_config.json").read_text(encoding="utf-8"))
        token = config["eos_token"]
        text = token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def read_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer: expected a tokenizer.json, got {path}: {error}") from error


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer.json, atomically."""
    text = tokenizer.to_str(pretty=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) + 1


def end_of_text(tokenizer: Tokenizer, eos_token: str = END_OF_TEXT) -> int:
    """Check that a tokenizer fits a corpus; the id that ends a document.

    Raises:
        ValueError: it does not.
    """
    size = vocab_size(tokenizer)
    if size > MAX_VOCAB:
        raise ValueError(
            f"tokenizer: expected a vocabulary of at most {MAX_VOCAB} (uint16), got {size}"
        )
    eos_id: int | None = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise ValueError(
            f"tokenizer: expected a token {eos_token}, got none; --eos-token names another of its "
            f"special tokens to end documents with: {_special_tokens(tokenizer)!r:.200}"
        )
    if not _is_special(tokenizer, eos_token):
        raise ValueError(
            f"tokenizer: expected {eos_token} to be a special token, got one that text can spell"
        )
    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        raise ValueError("tokenizer: expected a byte-level BPE, got another decoder")
    return eos_id


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    return [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]


def _is_special(tokenizer: Tokenizer, token: str) -> bool:
    return token in _special_tokens(tokenizer)


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
