"""The pages name files that exist, and the map in docs/architecture.md leaves no module out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "k8s" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PACKAGES = ("mpt", "serving", "conversion", "training")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to a page's headings: lower case, punctuation gone, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def removed() -> str:
    """The section of the map that names what is gone."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return text.partition("## What was removed")[2].partition("\n## ")[0]


@each_page
def test_files_named_in_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace(removed(), "")
    folders = "mpt|serving|conversion|training|demos|tests|benchmarks|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w/-]+\.(?:py|c|h|md|png))`", text))
    # k8s/training/ has files of its own, which its page calls from k8s/.
    places = (ROOT, page.parent)
    assert not [name for name in named if "NAME" not in name and not any((place / name).is_file() for place in places)]


def test_the_map_leaves_no_module_out() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").replace("\\_", "_")
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\((\.\./[^)]+)\)", text)}
    modules = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"}
    modules |= set((ROOT / "mpt" / "backends" / "native").glob("*.[ch]")) | set((ROOT / "demos").glob("*.py"))
    modules = {path for path in modules if path.name != "__init__.py" and "triton_repository" not in path.parts}
    missing = {str(path.relative_to(ROOT)) for path in modules if not linked & {path, *path.parents}}
    assert not missing


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file() and f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (
            f"{file}::{name}"
        )
