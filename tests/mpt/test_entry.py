"""A package of another project that is called as one of ours is one clear line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpt import entry

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"mpt": "entry.mpt", "train": "entry.train", "mpt-haproxy": "entry.haproxy"}


def run(command: str, root: Path = ROOT, *before: Path) -> tuple[int, str]:
    """Exit code and stderr of a console command of the copy in `root`, with these folders before it."""
    code = f"import sys; sys.argv = [{command!r}, '--help']; from mpt import entry; {COMMANDS[command]}()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*before, root])), "PYTHONSAFEPATH": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return ran.returncode, ran.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["serving", "training", "conversion", "demos"])
def test_another_package_that_is_found_first(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemError('this ran')")
    found = tmp_path / name / "__init__.py"
    said = f"{command}: another project's `{name}` is found first, `{found}`; take its folder out of $PYTHONPATH\n"
    assert run(command, ROOT, tmp_path) == (2, said)


def test_another_module_that_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "serving.py").write_text("")
    code, said = run("train", ROOT, tmp_path)
    assert (code, said.count("\n")) == (2, 1) and f"`{tmp_path}/serving.py`" in said


def test_what_lies_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "serving.py").write_text("")
    command = [sys.executable, "-m", "mpt", "--help"]  # puts the folder first
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stderr.endswith("; run mpt from another folder\n"), ran.stderr


def test_what_is_installed_or_lies_in_the_root() -> None:
    assert entry._cure(Path("/usr/lib/serving/__init__.py")) == entry._APART
    assert entry._cure(Path("/serving.py")) == entry._APART


def test_a_package_that_was_installed_over_ours(tmp_path: Path) -> None:
    """pip writes two projects' files of one name into one folder, the last one's over the first one's."""
    for name in ("mpt", "serving", "training", "conversion", "demos"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("tiny", "*.pyc"))
    assert run("mpt", tmp_path)[0] == 0
    (tmp_path / "serving" / "cli.py").write_text("def serve_models(): ...")
    code, said = run("mpt", tmp_path)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("mpt: files of another project lie among mpt's own") and "`uv tool install`" in said


def test_an_error_of_other_packages_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError('no typer', name='typer')")
    code, said = run("mpt", ROOT, tmp_path)
    assert code == 1 and "ImportError: no typer" in said
