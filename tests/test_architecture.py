"""The house: which package may import which, how long functions may be, and where each thing is decided."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
# The command lines, where the stages come together.
MEETS = {
    "mpt/cli.py": {"conversion", "demos", "serving", "training"},
    "mpt/entry.py": {"serving", "training"},
    "serving/server.py": {"demos"},  # `mpt serve --demo`
    "demos/cli.py": {"mpt"},  # `mpt demo`; the Spaces themselves stand alone
}
# Inside `mpt`: a checkpoint is known without what computes it, which is known without what runs requests on it.
LAYERS = ("mpt", "mpt.backends", "mpt.engine")
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


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported_by(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(tree_of(path))}


def test_the_packages_are_looked_at() -> None:
    assert {path.parent.name for path in sources(*MAY_IMPORT)} >= {"mpt", "training", "serving"}
    assert {"torch", "mpt"} <= imported_by(ROOT / "mpt" / "engine" / "engine.py")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_inward(package: str) -> None:
    wrong = {
        relative(path): found
        for path in sources(package)
        if (found := (imported_by(path) & MAY_IMPORT.keys()) - MAY_IMPORT[package] - MEETS.get(relative(path), set()))
    }
    assert not wrong, f"{package} may import {sorted(MAY_IMPORT[package])}"
    with_tests = [relative(path) for path in sources(package) if imported_by(path) & {"tests", "benchmarks", "pytest"}]
    assert not with_tests, "they import what is not installed with them"


def layer_of(module: str) -> int:
    """The place in LAYERS of a module of `mpt`."""
    return max((n for n, layer in enumerate(LAYERS) if f"{module}.".startswith(f"{layer}.")), default=0)


# Where a lower layer reaches up: what is in C for more than backends, and the commands that run a model.
REACHES_UP = {
    ("mpt/sampling.py", "mpt.backends"),
    ("mpt/native_attention.py", "mpt.backends"),
    ("mpt/cli.py", "mpt.engine"),
    ("mpt/chat.py", "mpt.engine"),
}


def test_layers_of_mpt() -> None:
    """No file imports what stands above it."""
    wrong = set()
    for path in sources("mpt"):
        own = layer_of(relative(path).removesuffix(".py").replace("/", "."))
        reached = {layer_of(name) for name in imports(tree_of(path)) if name.startswith("mpt")}
        wrong |= {(relative(path), LAYERS[layer]) for layer in reached if layer > own}
    assert wrong <= REACHES_UP


def test_nothing_is_imported_by_string() -> None:
    """Such an import hides from readers, type checkers and the tests above. Two modules are not ours."""
    by_string = re.compile(r"import_module\(|__import__\(")
    found = {
        relative(path)
        for path in sources(*MAY_IMPORT, "benchmarks")
        if by_string.search(path.read_text(encoding="utf-8"))
    }
    assert found <= BY_STRING


BY_STRING = {
    "mpt/__init__.py",  # its own modules, when first used: importing `mpt` imports no torch
    "conversion/formats/composer.py",  # a private class of numpy, which old Composer files name
}


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_functions_are_short() -> None:
    """At most 90 lines each, docstring included."""
    functions = [(path, node) for path in sources(*MAY_IMPORT) for node in functions_of(path)]
    assert not [f"{relative(path)}: {node.name}" for path, node in functions if lines_of(node) > 90]


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From its `def` to its end."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_nine_functions_of_ten_have_at_most_24_lines() -> None:
    sizes = sorted(lines_of(node) for path in sources(*MAY_IMPORT) for node in functions_of(path))
    assert sizes[int(0.9 * len(sizes))] <= 24


def test_a_file_of_serving_is_about_one_thing() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources("serving")}
    assert not {name: n for name, n in lengths.items() if n > 450}


def test_slopes_are_derived_in_one_place() -> None:
    """`AttentionSpec` makes them; everybody else asks it, or the model that holds it."""
    callers = {
        relative(path)
        for path in sources(*MAY_IMPORT)
        if re.search(r"\balibi_slopes\(.*config", path.read_text(encoding="utf-8"))
    }
    assert callers == set()


def test_no_file_is_named_like_a_package_it_imports() -> None:
    paths = sources(*MAY_IMPORT, "benchmarks")
    assert not [path for path in paths if path.stem in imported_by(path) - {path.relative_to(ROOT).parts[0]}]


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Which of some modules a file imports; `from package import module` is an import of `package.module`."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & modules or {node.module or ""}
    return found & modules


def circles(package: str, root: Path = ROOT) -> set[frozenset[str]]:
    """The groups of a package's modules that import each other in a circle, inside functions and type checks too."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (root / package).rglob("*.py")
    }
    reached = {module: imported_modules(path, set(paths)) for module, path in paths.items()}
    for via in paths:  # Warshall's transitive closure
        for module in paths:
            if via in reached[module]:
                reached[module] |= reached[via]
    return {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in paths
        if module in reached[module]
    }


@pytest.mark.parametrize("package", list(MAY_IMPORT))
def test_no_modules_of_a_package_import_each_other_in_a_circle(package: str) -> None:
    assert not circles(package)


def test_a_circle_through_a_function_is_found(tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bread.py").write_text("from shop import flour\n")
    (package / "flour.py").write_text("import shop.mill\n")
    (package / "mill.py").write_text("def grind():\n    from shop.bread import bake\n")
    (package / "door.py").write_text("from shop import bread\n")
    assert circles("shop", tmp_path) == {frozenset({"shop.bread", "shop.flour", "shop.mill"})}


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
