"""Where documents come from: this Python, and local files."""

import ast
import codecs
import json
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

CHUNK = 1 << 24  # characters of a txt file at a time


class Source(ABC):
    """Documents, in the same order every time."""

    own_name: str | None = None
    """A corpus name that is reserved for it."""

    @property
    @abstractmethod
    def plain(self) -> dict[str, Any]:
        """What it is, as JSON has it."""

    @abstractmethod
    def check(self) -> int | None:
        """Refuse what cannot be read, before any work; how many documents at most, if known."""

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """The documents, less what is null or empty."""


@dataclass(frozen=True)
class LocalFiles(Source):
    """Files by their names: FILE.jsonl, FILE.txt, and any other as parquet.

    A row of parquet and a line of jsonl is a document. So is a txt file, unless a separator
    divides it. Text is UTF-8; a byte order mark is none of it.

    Args:
        paths: the files, whose names are taken literally.
        text_column: the column of parquet, or the key of jsonl, with the text.
        separator: what stands between the documents of a txt file.
    """

    paths: Sequence[Path]
    text_column: str = "text"
    separator: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """What it is, as JSON has it."""
        paths = [str(path.resolve()) for path in self.paths]
        return {"paths": paths, "text_column": self.text_column, "separator": self.separator}

    def check(self) -> int:
        """Read the headers of parquet and all of the others; how many documents at most.

        Raises:
            FileNotFoundError: no such file. ValueError: what else is wrong with which file.
        """
        if self.separator is not None and not any(_kind(path) == "txt" for path in self.paths):
            raise ValueError(f"separator: expected txt files to divide, got {self.separator!r}")
        if self.separator == "":
            raise ValueError("separator: expected text, got ''")
        documents = 0
        for path in self.paths:
            if not path.is_file():
                found = "something else" if path.exists() else "no such file"
                raise FileNotFoundError(
                    f"data_files: expected a {_kind(path)} file, got {str(path)!r}, {found}"
                )
            if _kind(path) == "parquet":
                documents += _check_parquet(path, self.text_column)
            else:
                documents += sum(1 for text in self._texts(path) if text)
        if documents == 0:
            raise ValueError(
                f"data_files: expected documents, got none in {', '.join(map(str, self.paths))}"
            )
        return documents

    def texts(self) -> Iterator[str]:
        """The documents of all files, less what is null or empty.

        Raises:
            ValueError: a file is corrupt.
        """
        for path in self.paths:
            yield from filter(None, self._texts(path))

    def _texts(self, path: Path) -> Iterator[str | None]:
        if _kind(path) == "jsonl":
            return _jsonl_texts(path, self.text_column)
        if _kind(path) == "txt":
            return _txt_texts(path, self.separator)
        return _parquet_texts(path, self.text_column)


def python_documents() -> Iterator[str]:
    """pydoc's topics, then each standard library module's docstrings, in a fixed order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    yield from _topics()
    for path in _library():
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        nodes = (node for node in _statements(tree) if isinstance(node, documented))
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        if text:
            yield text


def python_sources() -> Iterator[str]:
    """pydoc's topics, then each standard library module whole, in a fixed order."""
    yield from _topics()
    for path in _library():
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (OSError, SyntaxError, ValueError):
            continue
        if text:
            yield text


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Those of ast.walk in its order, but for expressions, which are most and have no docstring."""
    nodes = deque([tree])
    while nodes:
        node = nodes.popleft()
        yield node
        parts = ast.iter_child_nodes(node)
        nodes += [x for x in parts if isinstance(x, ast.stmt | ast.excepthandler | ast.match_case)]


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (text for _, text in sorted(topics.items()))


def _library() -> Iterator[Path]:
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"))
    return (path for path in paths if not skipped & set(path.relative_to(root).parts))


def _kind(path: Path) -> str:
    return {".jsonl": "jsonl", ".txt": "txt"}.get(path.suffix.lower(), "parquet")


def _check_parquet(path: Path, column: str) -> int:
    """Check by its header that a file is parquet with text in a column; how many rows."""
    with _parquet(path) as file:
        schema = file.schema_arrow
        columns = schema.get_all_field_indices(column)
        if len(columns) != 1:
            raise ValueError(
                f"data_files: expected one column {column!r}, got {schema.names} in {path}"
            )
        kind = schema.field(columns[0]).type
        if not _is_text(kind):
            raise ValueError(
                f"data_files: expected strings in column {column!r}, got {kind} in {path}"
            )
        return int(file.metadata.num_rows)


def _parquet_texts(path: Path, column: str) -> Iterator[str | None]:
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from batch.column(column).to_pylist()


def _jsonl_texts(path: Path, column: str) -> Iterator[str | None]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            try:
                text = json.loads(line.decode())[column]
                if text is not None:
                    text.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"data_files: expected an object with text in {column!r}, got "
                    f"{line[:80]!r} in line {number} of {path}: "
                    f"{type(error).__name__}: {error!s:.120}"
                ) from error
            yield text


def _txt_texts(path: Path, separator: str | None) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if separator is None:
                yield file.read()
                return
            rest = ""
            while chunk := file.read(CHUNK):
                *whole, rest = (rest + chunk).split(separator)
                yield from whole
            yield rest
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data_files: expected a txt file in UTF-8, got {path}: {error}"
        ) from error


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
