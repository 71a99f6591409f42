import gc
import os
from itertools import islice

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined, so before any is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    if not torch.cuda.is_available():
        from tests import interpreter

        interpreter.hasten()
        interpreter.run_programs_at_once()


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    gc.freeze()  # each run that is measured collects garbage, of a process that has half a million


@pytest.fixture
def _overflow_checked():
    """The interpreter refuses sums and products of integers that leave 32 bits."""
    if torch.cuda.is_available():
        yield
        return
    from tests import interpreter

    interpreter.check_overflow(True)
    yield
    interpreter.check_overflow(False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which notes for each absent accelerator where it was called from
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with half of the built-in corpus prepared in it, once for all workers."""
    from smollm.data import prepare, prepare_builtin, sources

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            prepare, "python_documents", lambda: islice(sources.python_documents(), 400)
        )
        prepare_builtin(root)
    return root


@pytest.fixture(scope="session")
def corpus(data_dir):
    from smollm.data import Corpus

    return Corpus(data_dir / "builtin")
