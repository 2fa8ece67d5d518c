"""The base dependencies are enough for every module but those of an option, for which `pyproject.toml` has an extra.

Here everything is installed; a folder of links has what an installation without extras would have.
"""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Modules that are imported only with what an extra brings, and what they miss without it.
OF_AN_EXTRA = {
    "conversion.onnx_graph": "onnx",
    "serving.cluster.deployment": "ray",
    "serving.cluster.fleet": "ray",
    "serving.cluster.own_address": "ray",
    "serving.cluster.running": "ray",
    "serving.cluster.settings": "ray",
    "serving.cluster.versions": "ray",
}
IMPORT = """
import importlib, json, sys

failed = {}
for module in json.loads(sys.argv[1]):
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        failed[module] = error.name.partition(".")[0]
print(json.dumps(failed))
"""


def base() -> set[str]:
    """The distributions that an installation without extras has here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(each) for each in project["dependencies"]]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            name = canonicalize_name(requirement.name)
            if (name, extra) in seen:
                continue
            try:
                needed = [Requirement(each) for each in distribution(name).requires or []]
            except PackageNotFoundError:  # of a torch for other machines
                continue
            seen.add((name, extra))
            waiting += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with the base alone."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in base():
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return folder


def test_the_base_is_enough_for_all_but_the_options(site: Path) -> None:
    names = {path.name for path in site.iterdir()}
    assert {"torch", "transformers", "fastapi"} <= names and not {"ray", "gradio", "onnx", "pytest"} & names
    paths = [
        path for package in ("mpt", "serving", "training", "conversion") for path in (ROOT / package).rglob("*.py")
    ]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    kernels = ("mpt.backends.paged_kernels", "mpt.backends.quantized_kernels")  # torch for CUDA brings Triton
    left_out = ("triton_repository", "__main__", *kernels)
    asked = json.dumps([module for module in modules if not any(part in module for part in left_out)])
    environment = {"PYTHONPATH": f"{site}:{ROOT}", "HOME": str(site.parent), "PATH": ""}
    command = [sys.executable, "-S", "-c", IMPORT, asked]
    ran = subprocess.run(command, env=environment, cwd=site.parent, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == OF_AN_EXTRA
