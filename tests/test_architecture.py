"""Imports point inward: every stage may import `mpt`, no stage another, `mpt` none of them, `demos` nothing of ours."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package, and which of ours its files may import.
MAY_IMPORT = {
    "mpt": {"mpt"},
    "training": {"mpt", "training"},
    "conversion": {"mpt", "conversion"},
    "serving": {"mpt", "serving"},
    "demos": {"demos"},  # they talk HTTP, like any client
}
HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "fastapi",
    "ray",
    "gradio",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "tokenizers",
}


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything a file imports, inside functions and `if TYPE_CHECKING` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a module comes from"
            yield node.module or ""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_by(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}


def test_the_packages_are_looked_at() -> None:
    assert {path.parent.name for path in sources(*MAY_IMPORT)} >= {"mpt", "training", "serving"}
    assert {"torch", "mpt"} <= imported_by(ROOT / "serving" / "engine.py")


@pytest.mark.parametrize("path", sources(*MAY_IMPORT), ids=relative)
def test_imports_point_inward(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = (imported_by(path) & MAY_IMPORT.keys()) - MAY_IMPORT[package]
    assert not wrong, f"{relative(path)} imports {sorted(wrong)}; {package} may import {sorted(MAY_IMPORT[package])}"
    outside = imported_by(path) & {"tests", "benchmarks", "pytest"}
    assert not outside, f"{relative(path)} imports {sorted(outside)}, which is not installed with it"


@pytest.mark.parametrize("path", sources(*MAY_IMPORT, "benchmarks"), ids=relative)
def test_no_file_is_named_like_a_package_it_imports(path: Path) -> None:
    assert path.stem not in imported_by(path) - {path.relative_to(ROOT).parts[0]}


def test_tests_are_no_package() -> None:
    """Else `import serving` inside a test would find the tests of serving."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("module", ["mpt", "mpt.errors", "mpt.cli", "training.cli"])
def test_importing_is_light(module: str) -> None:
    assert heavy_after(f"import {module}") == set()


@pytest.mark.parametrize("module", ["mpt.cli", "training.cli"])
def test_help_answers_without_torch(module: str) -> None:
    code = f"import sys; sys.argv = ['x', '--help']; from {module} import main\ntry: main()\nexcept SystemExit: pass"
    assert heavy_after(code) == set()


def heavy_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has imported after some code."""
    report = "; print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys{report}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.rpartition("MODULES")[2].split()) & HEAVY
