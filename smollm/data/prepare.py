"""Documents become a prepared corpus: a folder that train.py reads.

It holds token shards (train_000000.bin, ..., val_000000.bin, ...), tokenizer.json and corpus.json.
"""

import hashlib
import platform
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from smollm.data.corpus import Corpus
from smollm.data.folders import build, check_new_name, find_place, settle
from smollm.data.names import BUILTIN, BUILTINS, DEFAULT_ROOT, HELD_OUT, SMOLLM_TOKENIZER
from smollm.data.shards import MAX_TOKENS
from smollm.data.sources import Source, python_documents, python_sources
from smollm.data.tokenise import SHARD_TOKENS, Recipe, is_held_out, write_corpus
from smollm.data.tokenizer import END_OF_TEXT, end_of_text, load_tokenizer

BUILTIN_VOCAB = 4096
BUILTIN_HELD_OUT = 0.05  # of the documents


def prepare_builtin(root: Path = DEFAULT_ROOT, name: str = BUILTIN) -> Path:
    """Tokenise text that CPython carries, unless this version's already stands there.

    Documents are pydoc's help topics and, of each module of the standard library, the docstrings
    ("builtin", about 2 MB of prose) or all of it ("builtin-code", about 12 MB); the tokenizer is a
    byte-level BPE of 4096 entries trained on the training documents. The first is the default,
    since it is there in half the time and the cpu preset sees a quarter of it. The text varies
    with Python's version, and so does the corpus hash. A damaged one is made anew; of two
    processes that make it at once one waits for the other's.

    Args:
        root: folder of prepared corpora.
        name: which of the two.

    Returns:
        The corpus's folder.

    Raises:
        ValueError: what stands there is no corpus of ours, and is left alone.
    """
    return open_builtin(root, name).folder


def open_builtin(root: Path = DEFAULT_ROOT, name: str = BUILTIN) -> Corpus:
    """A built-in corpus, prepared when need be; see `prepare_builtin`."""
    if name not in BUILTINS:
        raise ValueError(f"corpus: expected one of {BUILTINS}, got {name!r}")
    folder = root / name
    if (whole := _whole_builtin(folder)) is not None:
        return whole
    place = find_place(root, name, replace=True)
    with build(place, wait=True) as new:
        if (whole := _whole_builtin(folder)) is not None:
            return whole
        documents = list(python_documents() if name == BUILTIN else python_sources())
        tokenizer = _train_tokenizer([d for d in documents if not is_held_out(d, BUILTIN_HELD_OUT)])
        recipe = Recipe(
            name,
            tokenizer,
            end_of_text(tokenizer),
            BUILTIN_HELD_OUT,
            python=platform.python_version(),
        )
        write_corpus(new, recipe, lambda: documents, len(documents))
        find_place(root, name, replace=True)
        settle(new, place)
    return Corpus(folder)


def prepare_corpus(
    name: str,
    source: Source,
    root: Path = DEFAULT_ROOT,
    *,
    max_documents: int | None = None,
    tokenizer: str = SMOLLM_TOKENIZER,
    eos_token: str | None = None,
    held_out: float = HELD_OUT,
    shard_tokens: int = SHARD_TOKENS,
    replace: bool = False,
) -> Path:
    """Tokenise documents into shards.

    A preparation that ended early, killed or not, leaves its whole shards; the same request then
    goes on from them, and another one of that name begins anew.

    Args:
        name: the corpus's.
        source: where its documents come from.
        root: folder of prepared corpora.
        max_documents: read no more of them; all by default.
        tokenizer: a tokenizer.json, or a model on the hub; byte-level BPE, whose tokens spell
            every document byte for byte.
        eos_token: what ends a document; see `load_tokenizer` for the default.
        held_out: share of the documents that are for validation: those whose text's sha256 is
            below it, so that a larger share holds out the same ones and more.
        shard_tokens: tokens in a shard.
        replace: a corpus of that name goes once this one is whole.

    Returns:
        The corpus's folder.

    Raises:
        ValueError: an odd or taken name, a number out of range, a source that is not what it
            should be, a tokenizer that does not fit, or too few documents to hold some out.
        FileNotFoundError: no such data file or tokenizer. BlockingIOError: another process
            prepares a corpus of that name. ConnectionError: the hub cannot be reached.
    """
    check_new_name(name, source.own_name)
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents: expected >= 1, got {max_documents}")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ValueError(f"shard_tokens: expected 1 to {MAX_TOKENS}, got {shard_tokens}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    place = find_place(root, name, replace=replace)
    total = min(filter(None, (source.check(), max_documents)), default=None)
    loaded, eos_id = load_tokenizer(tokenizer, eos_token)
    request = {
        "source": source.plain,
        "max_documents": max_documents,
        "tokenizer": hashlib.sha256(loaded.to_str().encode()).hexdigest(),
        "eos_id": eos_id,
        "held_out": held_out,
        "shard_tokens": shard_tokens,
    }
    recipe = Recipe(name, loaded, eos_id, held_out, shard_tokens, request=request)
    with build(place) as new:
        find_place(root, name, replace=replace)  # another process may just have finished
        write_corpus(new, recipe, lambda: islice(source.texts(), max_documents), total)
        find_place(root, name, replace=replace)
        settle(new, place)
    return root / name


def _whole_builtin(folder: Path) -> Corpus | None:
    """A built-in corpus if it stands there undamaged and is of this Python's text."""
    try:
        corpus = Corpus(folder)
    except (ValueError, FileNotFoundError):
        return None
    return corpus if corpus.python == platform.python_version() else None


def _train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
