"""The wheel that the package's build makes of what an image is built from: outside a checkout, without a compiler.

Needs the index for the build's own requirements, so `make check` runs it and `make test` does not.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from mpt.backends.native import build, library

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.index, pytest.mark.timeout(600)]

ASK = """
from mpt.backends.native import library
found = library.features()
print(found.compiler, found.variant, library.load()._name, library.load().mpt_variant().decode())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    context, site = folder / "context", folder / "site"
    context.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        name = line.removeprefix("!")
        if name != line and "*" not in name:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, context / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(context)]
    subprocess.run(command, check=True)
    (made,) = folder.glob("*.whl")
    assert made.stem.split("-")[2:4] == ["py3", "none"]
    with zipfile.ZipFile(made) as archive:
        archive.extractall(site)
    return site


def outside(site: Path, tmp_path: Path, code: str) -> str:
    """What Python prints that has the wheel before the checkout, in a folder that is not one, without a compiler."""
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    here = {**os.environ, "PATH": str(empty), "PYTHONPATH": str(site), "HOME": str(empty), "XDG_CACHE_HOME": str(empty)}
    ran = subprocess.run([sys.executable, "-c", code], env=here, cwd=empty, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C compiler")
def test_a_wheel_brings_the_code_for_every_processor_of_its_platform(wheel: Path, tmp_path: Path) -> None:
    built = {path.name.partition("-")[0] for path in (wheel / "mpt/backends/native/built").iterdir()}
    compiler = build.find_compiler()
    assert compiler is not None
    known = {v.name for v in build.of_architecture(build.architecture()) if build.knows(compiler, v)}
    assert built == known

    found, variant, path, said = outside(wheel, tmp_path, ASK).split()
    assert (found, variant, said) == ("None", library.features().variant, library.features().variant)
    assert Path(path).parent == wheel / "mpt/backends/native/built"


def test_every_command_of_a_wheel_begins(wheel: Path, tmp_path: Path) -> None:
    (noted,) = wheel.glob("*.dist-info/entry_points.txt")
    commands = configparser.ConfigParser()
    commands.read(noted)
    assert set(commands["console_scripts"]) == {"mpt", "train", "mpt-haproxy"}
    for name, place in commands["console_scripts"].items():
        module, function = place.split(":")
        if name == "mpt-haproxy":  # is for Ray, which tells it more
            outside(wheel, tmp_path, f"from {module} import {function}")
            continue
        code = f"import sys; from {module} import {function}; sys.argv = [{name!r}, '--help']; {function}()"
        assert f"Usage: {name}" in outside(wheel, tmp_path, code)


def test_a_wheel_serves_its_models_and_its_page(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mpt", "serve", "--port", "0", "--threads", "1", "--drain-seconds", "0"]
    environment = {**os.environ, "PYTHONPATH": str(wheel), "HOME": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"open (http://\S+/) in a browser", line):
                break
        else:
            pytest.fail("".join(said))
        page = httpx.get(found[1], headers={"accept": "text/html"}).text
        listed = httpx.get(f"{found[1]}v1/models").json()["data"]
        body = {"model": "mpt-tiny", "prompt": "Once upon a time", "max_tokens": 4}
        answer = httpx.post(f"{found[1]}v1/completions", json=body, timeout=100).json()
        server.terminate()
    assert "<h1>MPT server</h1>" in page and "function listModels" in page
    assert [card["id"] for card in listed] == ["mpt-tiny", "mpt-tiny-instruct", "mpt-tiny-chat", "mpt-tiny-storywriter"]
    assert answer["usage"]["completion_tokens"] == 4


def test_a_wheel_names_the_packages_that_an_option_needs(wheel: Path, tmp_path: Path) -> None:
    code = "from mpt import extras; print(sorted(extras.packages('cluster')), extras.origin())"
    assert outside(wheel, tmp_path, code) == "['cryptography>=46', 'ray[serve]>=2.60'] None\n"
