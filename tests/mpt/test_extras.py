"""The command that installs an extra is one for the way this copy was installed, and names packages that exist."""

import ast
import importlib.util
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mpt import extras
from mpt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
NOTED = [
    "torch<2.14,>=2.12",
    "bitsandbytes>=0.48; extra == 'qlora'",
    "ray[serve]>=2.60; extra == 'cluster'",
    "cryptography>=46; extra == 'cluster'",
    "winonly>=1; sys_platform == 'win32' and extra == 'cluster'",
]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in an environment of its own, `mpt-home`, which has pip."""

    class Installed:
        requires = NOTED

    folder = tmp_path / "mpt-home"
    (folder / "bin").mkdir(parents=True)
    monkeypatch.setattr(extras, "distribution", lambda name: Installed())
    monkeypatch.setattr(extras, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    return folder


def test_a_wheel_in_an_environment_that_the_shell_is_not_in(environment: Path) -> None:
    """Its `pip` would be another one's."""
    assert extras.install("qlora") == f"`{environment}/bin/python -m pip install 'bitsandbytes>=0.48'`"


def test_a_wheel_in_the_environment_of_the_shell(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (environment / "bin" / "pip").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(environment / "bin"))
    assert extras.install("cluster") == "`pip install 'ray[serve]>=2.60' 'cryptography>=46'`"


def test_pipx(environment: Path) -> None:
    (environment / "pipx_metadata.json").write_text("{}")
    assert extras.install("qlora") == "`pipx inject mpt-home 'bitsandbytes>=0.48'`"


def test_uv_tool(environment: Path) -> None:
    (environment / "uv-receipt.toml").write_text("")
    assert extras.install("qlora") == f"`uv pip install --python {environment}/bin/python 'bitsandbytes>=0.48'`"


def test_an_environment_without_pip(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        requires = NOTED

    def installed(name: str) -> Installed:
        if name == "pip":
            raise PackageNotFoundError(name)
        return Installed()

    monkeypatch.setattr(extras, "distribution", installed)
    assert extras.install("qlora") == f"`uv pip install --python {environment}/bin/python 'bitsandbytes>=0.48'`"


def test_a_hint_leaves_setuptools_as_it_was(environment: Path) -> None:
    """Its finder takes who looks for pip for pip itself; compiling with torch then fails in this process."""
    extras.install("qlora")
    assert importlib.util.find_spec("distutils.core").origin.count("_distutils") == 1


def test_a_checkout_says_what_its_pyproject_says_now(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was noted when it was installed may be older."""
    monkeypatch.setattr(extras, "_CHECKOUT", ROOT)
    assert extras.packages("cluster") == EXTRAS["cluster"]


def test_what_is_missing_is_told_with_its_command(environment: Path) -> None:
    with pytest.raises(UserError) as told:
        extras.require("--x", "qlora", "json", "no_such_module")
    assert str(told.value) == f"--x needs `no_such_module`; {extras.install('qlora')}"


def called(path: Path) -> list[str]:
    """The extras that a file names in its calls of `install` and `require`."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    place = {"install": 0, "require": 1}
    named = [(getattr(call.func, "id", ""), call.args) for call in calls]
    return [ast.literal_eval(args[place[name]]) for name, args in named if name in place and len(args) > place[name]]


def test_every_hint_of_every_package_comes_from_here_and_names_an_extra() -> None:
    found: list[str] = []
    packages = ("mpt", "serving", "training", "conversion", "demos")
    for path in (path for name in packages for path in sorted((ROOT / name).rglob("*.py"))):
        text = path.read_text(encoding="utf-8")
        if "from mpt.extras import" in text:
            found += called(path)
        assert path.name == "extras.py" or "pip install" not in text, f"{path}: its command is for one kind of copy"
    assert {"demos", "cluster", "conversion", "qlora", "s3"} <= set(found) <= EXTRAS.keys()


@pytest.mark.parametrize(
    "text", ['[project]\nname = "other"\noptional-dependencies = {qlora = ["stranger"]}', "no = toml ="]
)
def test_another_projects_file_beside_a_wheel_is_not_ours(text: str, environment: Path) -> None:
    (environment.parent / "pyproject.toml").write_text(text)
    assert extras.packages("qlora") == ["bitsandbytes>=0.48"]
