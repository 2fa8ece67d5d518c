"""Every set of packages that pyproject.toml and the Dockerfile offer can be installed, as on a machine that has none.

`uv` resolves each for the Pythons we support out of the package index's metadata, so no wheel is downloaded and nothing
is installed. Only wheels count, but for some packages of pure Python: nobody needs a compiler. What this machine has of
its own (folders of wheels, further constraints) is left out, since others have none of it; its index, if it names one,
is taken.

Not a test of the packages themselves, nor of PyTorch's own index, whence the cpu image takes its torch: that build
depends on a part of what the CUDA build depends on, which is resolved here.

Needs the index, so `make check` runs it and `make test` does not.
"""

import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FIRST, AFTER_LAST = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
PYTHONS = [f"3.{minor}" for minor in range(FIRST, AFTER_LAST)]  # to uv, 3.11 is 3.11.0: the oldest of its line
IMAGES = re.findall(r"^ARG (\w+)_EXTRAS=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
SETS = {
    "base": [],
    **{extra: [extra] for extra in EXTRAS},
    **{f"{image.lower()} image": extras.split(",") for image, extras in IMAGES},
}
# Pure Python of which no wheels are published: what lm-evaluation-harness asks for beside others.
SOURCES = ("rouge-score", "sqlitedict", "word2number")
LINUX = "x86_64-manylinux_2_31"  # glibc 2.31 (Debian 11, Ubuntu 20.04): the newest that any pinned wheel asks for

pytestmark = [pytest.mark.index, pytest.mark.timeout(600)]


def pin(line: str) -> tuple[str, str]:
    """(name, version) of a line `name==version  # comment`, the name as the index spells it."""
    name, version = line.split("#")[0].strip().split("==")
    return canonicalize_name(name), version


def pins(text: str) -> set[tuple[str, str]]:
    return {pin(line) for line in text.splitlines() if not line.startswith("#")}


PINNED = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


@cache
def pip_setting(name: str) -> str | None:
    """What pip here is told by its files or variables: `index-url`, `cert`."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = re.search(rf"^\S+\.{name}='(.+)'$", listing.stdout, re.MULTILINE)  # variables come before files
    return found and found[1]


def uv(*arguments: str, standard_input: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `uv pip compile` over the index alone, without this machine's settings of pip and uv."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    if certificates := pip_setting("cert"):
        kept.setdefault("SSL_CERT_FILE", certificates)
    command = [sys.executable, "-m", "uv", "--quiet", "--no-config", "--no-python-downloads", "pip", "compile"]
    command += ["--python", sys.executable, "--only-binary", ":all:", "--no-header", "--no-annotate", *arguments]
    command += [f"--no-binary={name}" for name in SOURCES]
    if index := pip_setting("index-url"):
        command += ["--default-index", index]
    return subprocess.run(command, input=standard_input, capture_output=True, text=True, env=kept | variables, cwd=ROOT)


def resolve(
    extras: list[str], python: str, *, platform: str = LINUX, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """Resolve `mpt-home[extras]` under constraints.txt. offline: out of the metadata that uv has seen."""
    arguments = ["pyproject.toml", "--constraints", "constraints.txt", "--python-version", python]
    arguments += ["--python-platform", platform, *(f"--extra={extra}" for extra in extras)]
    arguments += ["--offline"] if offline else []
    return uv(*arguments, MACOSX_DEPLOYMENT_TARGET="14.0")  # of Macs alone: torch's wheels ask for macOS 14


@cache
def everything(python: str) -> subprocess.CompletedProcess[str]:
    """All extras at once, which also brings the metadata of every pin, so that the sets need no network."""
    return resolve(list(EXTRAS), python)


@pytest.fixture(scope="module", autouse=True)
def _index() -> None:
    answer = uv("-", standard_input="packaging", UV_HTTP_TIMEOUT="10")
    if answer.returncode:
        pytest.skip(f"no package index can be reached: {' '.join(answer.stderr.split())}")


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extras", SETS.values(), ids=SETS.keys())
def test_a_set_installs_in_the_versions_pinned(extras: list[str], python: str) -> None:
    answer = resolve(extras, python, offline=everything(python).returncode == 0)
    assert answer.returncode == 0, answer.stderr
    missing = pins(answer.stdout) - PINNED
    assert not missing, "constraints.txt has no pin for:\n" + "\n".join(sorted("==".join(pair) for pair in missing))


def test_nothing_is_pinned_that_nothing_takes() -> None:
    answers = [everything(python) for python in PYTHONS]
    if any(answer.returncode for answer in answers):
        pytest.skip("what is taken is not known: the extras do not install together")
    assert PINNED - set().union(*(pins(answer.stdout) for answer in answers)) == set()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", ["aarch64-manylinux_2_31", "aarch64-apple-darwin"])
def test_the_base_installs_on_arm(platform: str, python: str) -> None:
    answer = resolve([], python, platform=platform)
    assert answer.returncode == 0, answer.stderr
