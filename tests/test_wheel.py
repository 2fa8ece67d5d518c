"""The wheel that the package's build makes of what an image is built from, on a machine without a compiler.

Needs the index for the build's own requirements, so `make check` runs it and `make test` does not.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mpt.backends.native import build, library

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.index, pytest.mark.timeout(600)]

ASK = """
from mpt.backends.native import library
found = library.features()
print(found.compiler, found.variant, library.load()._name, library.load().mpt_variant().decode())
"""


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C compiler")
def test_a_wheel_brings_the_code_for_every_processor_of_its_platform(tmp_path: Path) -> None:
    context, site = tmp_path / "context", tmp_path / "site"
    context.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        name = line.removeprefix("!")
        if name != line and "*" not in name:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, context / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(context)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stem.split("-")[2:4] == ["py3", "none"]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    built = {path.name.partition("-")[0] for path in (site / "mpt/backends/native/built").iterdir()}
    compiler = build.find_compiler()
    assert compiler is not None
    known = {v.name for v in build.of_architecture(build.architecture()) if build.knows(compiler, v)}
    assert built == known

    empty = tmp_path / "empty"
    empty.mkdir()
    here = {**os.environ, "PATH": str(empty), "PYTHONPATH": str(site), "HOME": str(empty), "XDG_CACHE_HOME": str(empty)}
    asked = subprocess.run([sys.executable, "-c", ASK], env=here, cwd=empty, capture_output=True, text=True, check=True)
    found, variant, path, said = asked.stdout.split()
    assert (found, variant, said) == ("None", library.features().variant, library.features().variant)
    assert Path(path).parent == site / "mpt/backends/native/built"
