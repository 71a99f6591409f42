"""The one-way arrows between packages and rooms, and what the name `kernels` asks for."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parent.parent
ROOMS = (  # the top floor first
    "studies", "training", "hf", "model", "data", "attention", "files", "lazy", "clash",
)  # fmt: skip
HUGGING_FACE_SUBMODULES = {
    "layer", "utils", "benchmark", "compat", "deps", "install", "load", "status", "validate",
    "verify", "backends",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every name imported anywhere in a file, as dotted paths."""
    return imported(ast.parse(path.read_text()))


def imported(tree: ast.Module) -> set[str]:
    """Every name imported anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def from_package(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def modules(folder: str) -> dict[str, Path]:
    """The files of a package by their dotted names."""
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in sources(folder)}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): path for path, p in parts.items()}


def test_kernels_import_no_model():
    for path in sources("kernels"):
        assert not from_package(imports(path), "smollm"), path


def test_only_the_core_imports_triton():
    for path in [*sources("kernels"), *sources("smollm"), ROOT / "train.py"]:
        if path.parent != ROOT / "kernels" / "core":
            assert not from_package(imports(path), "triton"), path


def test_the_core_stands_without_the_reference():
    for path in sources("kernels/core"):
        assert not from_package(imports(path), "kernels.reference"), path


def test_models_use_the_public_ops_alone():
    public = {f"kernels.{name}" for name in kernels.__all__}
    for path in [*sources("smollm"), ROOT / "train.py"]:
        assert from_package(imports(path), "kernels") <= public, path


def test_a_room_imports_only_rooms_below_it():
    entries = {
        path.stem for path in (ROOT / "smollm").iterdir() if path.suffix or any(path.iterdir())
    }
    assert entries - {"__init__", "__main__", "__pycache__"} == set(ROOMS)
    for name, path in modules("smollm").items():
        room = name.split(".")[1:2]
        if room and room != ["__main__"]:
            below = ROOMS[ROOMS.index(room[0]) :]
            used = from_package(imports(path), "smollm")
            assert {use.split(".")[1] for use in used} <= set(below), name


@pytest.mark.parametrize("name", ["smollm", "smollm.attention", "smollm.data", "smollm.model"])
def test_packages_have_what_they_export(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for exported in package.__all__:
        assert getattr(package, exported) is not None
    with pytest.raises(AttributeError, match=f"^module '{name}' has no attribute 'nothing'$"):
        package.nothing  # noqa: B018


def test_no_circle_of_imports():
    """Not even one that a late import would open."""
    for package in ("kernels", "smollm", "bench"):
        files = modules(package)
        graph = {
            name: {
                used if used in files else used.rpartition(".")[0]
                for used in from_package(imports(path), package)
            }
            for name, path in files.items()
        }
        TopologicalSorter(graph).prepare()


def test_no_file_outgrows_its_room():
    for folder, most in (("smollm", 350), ("kernels", 420)):
        for path in sources(folder):
            assert len(path.read_text().splitlines()) <= most, path


def test_kernels_can_be_told_from_hugging_faces():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    first = body[1]  # after the docstring
    assert ast.unparse(first) == "__version__ = '0.1.0'"
    names = {path.stem for path in (ROOT / "kernels").iterdir()}
    assert not names & HUGGING_FACE_SUBMODULES


def test_transformers_is_imported_where_it_is_needed():
    """By one room, and there by functions, so that neither training nor an import asks for it."""
    for path in [*sources("kernels"), *sources("smollm"), ROOT / "train.py"]:
        tree = ast.parse(path.read_text())
        if path.parent == ROOT / "smollm" / "hf":
            tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        assert not from_package(imported(tree), "transformers"), path
