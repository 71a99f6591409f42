"""Where documents come from: this Python, the hub, local files."""

import ast
import http.client
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow
from pyarrow import parquet

SMOLLM_CORPUS = "HuggingFaceTB/smollm-corpus"
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
        except (OSError, SyntaxError, ValueError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        if text:
            yield text


def check_parquet(paths: Sequence[Path]) -> None:
    """Check by their headers that files are parquet with text in a column `text`.

    Raises:
        FileNotFoundError: no such file. ValueError: what else is wrong with which file.
    """
    rows = 0
    for path in paths:
        if not path.is_file():
            found = "something else" if path.exists() else "no such file"
            raise FileNotFoundError(
                f"data_files: expected a parquet file, got {str(path)!r}, {found}"
            )
        with _parquet(path) as file:
            schema = file.schema_arrow
            columns = schema.get_all_field_indices("text")
            if len(columns) != 1:
                raise ValueError(
                    f"data_files: expected one column 'text', got {schema.names} in {path}"
                )
            kind = schema.field(columns[0]).type
            if not _is_text(kind):
                raise ValueError(
                    f"data_files: expected strings in column 'text', got {kind} in {path}"
                )
            rows += file.metadata.num_rows
    if rows == 0:
        raise ValueError(
            f"data_files: expected documents, got none in {', '.join(map(str, paths))}"
        )


def parquet_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The `text` column of local parquet files, less what is null or empty.

    Raises:
        ValueError: a file is corrupt.
    """
    for path in paths:
        with _parquet(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from filter(None, batch.column("text").to_pylist())


def hub_texts(name: str, shards: int) -> Iterator[str]:
    """The `text` column of a hub corpus's first `shards` files, streamed.

    Raises:
        ConnectionError: a file cannot be read.
    """
    import datasets

    reach_hub()
    total = HUB_SHARDS[name]
    files = [f"{name}/train-{i:05d}-of-{total:05d}.parquet" for i in range(shards)]
    try:
        stream = datasets.load_dataset(
            SMOLLM_CORPUS, data_files={"train": files}, split="train", streaming=True
        )
        for row in stream:
            if row["text"]:
                yield row["text"]
    except Exception as error:  # the library passes on whatever the network's layers raise
        raise ConnectionError(f"{SMOLLM_CORPUS} could not be read: {error}. {OFFLINE}") from error


def reach_hub() -> None:
    """Without a network, go straight to the hub library's cache instead of a minute of retries."""
    import datasets
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return
    except (OSError, http.client.HTTPException):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@contextmanager
def _parquet(path: Path) -> Iterator[parquet.ParquetFile]:
    """Open a file by its very name; whatever is wrong inside becomes a ValueError that names it."""
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data_files: expected a parquet file, got {path}: {error}") from error


def _is_text(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(check(kind) for check in checks)
