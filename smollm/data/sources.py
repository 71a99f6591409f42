"""Where documents and tokenizers come from: this Python, the hub, local files."""

import ast
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

SMOLLM_CORPUS = "HuggingFaceTB/smollm-corpus"
SMOLLM_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
HUB_SHARDS = {"fineweb-edu-dedup": 234, "cosmopedia-v2": 104}
OFFLINE = (
    "Without a network, `python train.py` trains on its built-in corpus, and --data-files with "
    "--tokenizer reads local parquet."
)


def python_documents() -> Iterator[str]:
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


def parquet_texts(name: str, shards: int, data_files: Sequence[Path]) -> Iterator[str]:
    """The `text` column of local parquet files, or of a hub corpus's first `shards` files.

    Raises:
        ValueError: there is no such column. ConnectionError: a file cannot be read.
    """
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


def load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer.json, or the tokenizer of a model on the hub.

    Raises:
        ValueError: the file is no tokenizer. ConnectionError: the hub cannot be reached.
    """
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
