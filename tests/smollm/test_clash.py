"""Hugging Face's package `kernels`, in the same environment or in this one's place."""

import importlib
import sys

import pytest

from smollm import clash
from smollm.hf.library import load_transformers


def test_its_distribution_is_refused_beside_transformers(tmp_path, monkeypatch):
    about = tmp_path / "kernels-9.9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = "kernels: expected no distribution of that name, got 9.9.9.*pip uninstall kernels"
    with pytest.raises(ImportError, match=text):
        load_transformers()


def test_its_package_is_told_from_ours_without_an_import(tmp_path, monkeypatch):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels")
    with pytest.raises(ImportError, match=r"kernels: expected this project's, got .*__init__.py"):
        importlib.reload(clash)


def test_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers: expected it to be installed \(pip inst"):
        load_transformers()
