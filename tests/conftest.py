import pytest
import torch

from smollm.data import Corpus, prepare_builtin


def pytest_configure() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the built-in corpus prepared in it, once a session."""
    root = tmp_path_factory.mktemp("data")
    prepare_builtin(root)
    return root


@pytest.fixture(scope="session")
def corpus(data_dir):
    return Corpus(data_dir / "builtin")
