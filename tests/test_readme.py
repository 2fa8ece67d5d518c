"""The README begins with its two commands, and every target of make that it shows exists.

Its commands of ours are run in test_commands.py.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_begins_with_its_two_commands() -> None:
    assert [line.split("#")[0].split() for line in BLOCKS[0].splitlines()] == [["make", "serve"], ["make", "test"]]


def test_every_target_that_the_readme_makes_exists() -> None:
    shown = {words[1] for block in BLOCKS for words in map(str.split, block.splitlines()) if words[:1] == ["make"]}
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert shown and shown <= set(targets)
