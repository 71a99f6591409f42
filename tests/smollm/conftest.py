import os
import signal
from types import SimpleNamespace

import datasets
import pytest
from study_cases import blank_plots

from smollm.training import metrics


@pytest.fixture(autouse=True)
def _blank_plots(request, monkeypatch):
    """But where it is them that are tested."""
    if request.module.__name__ != "test_report":
        blank_plots(monkeypatch)


@pytest.fixture(autouse=True)
def _uncollected(monkeypatch):
    """No run collects garbage before it is measured, which takes longer than a tiny one."""
    monkeypatch.setattr(metrics, "gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """Two parquet files of 600 short documents each."""
    root = tmp_path_factory.mktemp("parquet")
    paths = []
    for part in range(2):
        texts = [f"document {part}-{i}: " + "some words here " * (i % 7) for i in range(600)]
        paths.append(root / f"part-{part}.parquet")
        datasets.Dataset.from_dict({"text": texts, "id": list(range(600))}).to_parquet(paths[-1])
    return paths


@pytest.fixture(scope="session")
def tokenizer_file(corpus):
    return str(corpus.folder / "tokenizer.json")


@pytest.fixture(scope="session")
def prepare_mine(parquet, tokenizer_file):
    """Prepare a corpus of files, by default the parquet ones, under a root.

    Further keywords are those of LocalFiles and of prepare_corpus.
    """
    from smollm.data import LocalFiles, prepare_corpus

    def prepare(root, name="mine", data_files=parquet, **keywords):
        of_files = {k: keywords.pop(k) for k in ("text_column", "separator") if k in keywords}
        source = LocalFiles(data_files, **of_files)
        return prepare_corpus(name, source, root, **{"tokenizer": tokenizer_file, **keywords})

    return prepare


@pytest.fixture
def ctrl_c():
    """Sends this process a signal, by default Ctrl-C's, also where it was started to ignore it.

    It takes any arguments, so that it can stand in for a function.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_, number=signal.SIGINT, **__: os.kill(os.getpid(), number)
    signal.signal(signal.SIGINT, previous)
