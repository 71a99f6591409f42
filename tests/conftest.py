import os

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined, so before any is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    if not torch.cuda.is_available():
        _hasten_the_interpreter()
        _let_numbers_be_bounds_of_loops()


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _hasten_the_interpreter() -> None:
    """Spare each of its calls what it does over and over.

    It patches triton.language for each module of jit helpers, not at each of their calls, looks up
    types once, and checks no integer for overflow but under `_overflow_checked`.
    """
    from triton.runtime import interpreter

    patched, types, type_of = set(), {}, interpreter._get_np_dtype

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def known_type_of(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = type_of(dtype)
        return types[name]

    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = known_type_of
    _check_overflow(False)


def _let_numbers_be_bounds_of_loops() -> None:
    """Triton 3.6 keeps them in arrays with a dimension, which NumPy 2.4 makes no integers of."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor


def _check_overflow(on) -> None:
    from triton.runtime import interpreter

    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", on)


@pytest.fixture
def _overflow_checked():
    """The interpreter refuses sums and products of integers that leave 32 bits."""
    if torch.cuda.is_available():
        yield
        return
    _check_overflow(True)
    yield
    _check_overflow(False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the built-in corpus prepared in it, once a session."""
    from smollm.data import prepare_builtin

    root = tmp_path_factory.mktemp("data")
    prepare_builtin(root)
    return root


@pytest.fixture(scope="session")
def corpus(data_dir):
    from smollm.data import Corpus

    return Corpus(data_dir / "builtin")
