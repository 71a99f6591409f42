"""The one-way arrows between the packages, and what the name `kernels` asks for."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
HUGGING_FACE_SUBMODULES = {
    "layer", "utils", "benchmark", "compat", "deps", "install", "load", "status", "validate",
    "verify", "backends",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every name imported anywhere in a file, as dotted paths."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def from_package(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


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
    import kernels

    public = {f"kernels.{name}" for name in kernels.__all__}
    for path in [*sources("smollm"), ROOT / "train.py"]:
        assert from_package(imports(path), "kernels") <= public, path


def test_the_model_knows_no_training():
    library = ("attention", "cache", "generate", "layers", "model", "padding", "rope")
    for name in library:
        used = from_package(imports(ROOT / "smollm" / f"{name}.py"), "smollm")
        assert {use.split(".")[1] for use in used} <= set(library), name


def test_kernels_can_be_told_from_hugging_faces():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    first = body[1]  # after the docstring
    assert ast.unparse(first) == "__version__ = '0.1.0'"
    names = {path.stem for path in (ROOT / "kernels").iterdir()}
    assert not names & HUGGING_FACE_SUBMODULES
