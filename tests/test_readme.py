"""Every command the README shows exists, with every option it is shown with."""

import re
from pathlib import Path

import click
import pytest
import typer

from mpt.cli import app as mpt_app
from training.cli import app as train_app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].split()
    for block in BLOCKS
    for line in block.splitlines()
    if re.match(r"(make|\.venv/bin/)", line)
]


def test_the_readme_begins_with_its_two_commands():
    assert [line.split("#")[0].split() for line in BLOCKS[0].splitlines()] == [["make", "serve"], ["make", "test"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_exists(words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
        return
    program = {"mpt": mpt_app, "train": train_app}[Path(words[0]).name]
    command: click.Command = typer.main.get_command(program)
    names = iter(words[1:])
    while hasattr(command, "commands"):
        command = command.commands[next(names)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words[2:] if word.startswith("--")} <= known
