"""The commit that a copy of the package is of: git's own word for it, or that nobody knows."""

import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpt import build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, str]:
    """A repository with one commit, and what git calls it."""
    as_somebody = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*as_somebody, *command], check=True)
    said = subprocess.run([*as_somebody, "log", "-1", "--format=%H"], check=True, capture_output=True, text=True)
    return tmp_path, said.stdout.strip()


def test_a_checkout_says_its_commit_and_a_folder_inside_it_does_not(checkout: tuple[Path, str]) -> None:
    folder, commit = checkout
    inside = folder / ".venv" / "lib" / "site-packages"
    inside.mkdir(parents=True)
    assert build._of_checkout(folder) == commit and len(commit) == 40
    assert build._of_checkout(inside) is None


def test_a_wheel_has_it_noted_and_without_git_it_is_what_the_build_is_told(
    checkout: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.setattr(hook, "_load", lambda _: SimpleNamespace(find_compiler=lambda: None))
    folder, commit = checkout

    def noted(**environment: str) -> str | None:
        data: dict[str, dict[str, str]] = {"force_include": {}}
        monkeypatch.delenv("MPT_COMMIT", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made = SimpleNamespace(
            root=str(folder), directory=str(tmp_path / "dist"), app=SimpleNamespace(display_warning=print)
        )
        hook.NativeBuildHook.initialize(made, "standard", data)
        places = {place: source for source, place in data["force_include"].items()}
        return Path(places["mpt/commit.txt"]).read_text() if places else None

    assert noted() == f"{commit}\n"
    assert noted(MPT_COMMIT="f" * 40) == "f" * 40 + "\n"
    folder = tmp_path / "no" / "checkout"
    assert noted() is None


def test_what_is_noted_comes_first_and_nothing_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(build, "_of_pip", lambda: None)
    monkeypatch.setattr(build, "_NOTED", tmp_path / "commit.txt")
    assert build.commit.__wrapped__() == "unknown"
    (tmp_path / "commit.txt").write_text("0123\n")
    assert build.commit.__wrapped__() == "0123"
