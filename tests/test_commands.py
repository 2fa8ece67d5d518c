"""Every command of ours that README and docs show is understood, and those that need no server and no GPUs are run.

A command is run as it is shown, after those before it on its page, in a folder where the names it uses stand for small
things: `mpt-7b` for mpt-tiny, `books/` for a page of text. What a command prints is compared with its page for the
plans in `PRINTS` and for README's answer. The loss that a run prints depends on the processor, so there it is the loss
that falls and the answer that is right. New weights are not trained: the run that would begin is looked at.
"""

import io
import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from mpt import cli as mpt_cli
from tests.conversion.conftest import make
from training import cli as train_cli
from training import loop
from training.run import Run

ROOT = Path(__file__).parents[1]
TINY = ROOT / "mpt" / "tiny" / "mpt-tiny"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "k8s" / "README.md"]
_OURS = re.compile(r"(?:torchrun .*--no-python )?(?:\.venv/bin/)?(mpt|train) (.*)")


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks that call `mpt` or `train`, with what a line goes on with."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r" +", " ", line) for line in lines if _OURS.match(line)]


def words_of(line: str) -> list[str]:
    """Program and arguments, without the comment and where the output goes."""
    found = _OURS.match(line)
    assert found is not None
    words = shlex.split(found[2], comments=True)
    return [found[1], *(words[: words.index(">")] if ">" in words else words)]


SHOWN = [(page, line) for page in PAGES for line in dict.fromkeys(commands_of(page))]
# A line that shows what may be written, not what is.
_PATTERN = re.compile(r"\|fastertransformer\||SOURCE")


@cache
def _command(program: str) -> Any:
    return typer.main.get_command({"mpt": mpt_cli.app, "train": train_cli.app}[program])


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_a_shown_command_is_understood(page: Path, line: str) -> None:
    """Its name, its options, their types and choices, and that nothing it needs is missing."""
    if _PATTERN.search(line):
        pytest.skip("it shows a pattern")
    program, *arguments = words_of(line)
    command = _command(program)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(command.name, arguments)


def _pages_of(command: Any, name: str) -> list[tuple[str, str]]:
    if hasattr(command, "commands"):
        return [page for each, inner in command.commands.items() for page in _pages_of(inner, f"{name} {each}")]
    return [(name, command.get_help(command.context_class(command, info_name=name)))]


@pytest.mark.parametrize("program", ["mpt", "train"])
def test_help_names_values_in_words(program: str) -> None:
    for name, text in _pages_of(_command(program), program):
        assert not re.search(r"<(int|float|str|path|list)\b|list\[|\{", text), name


# -- run -----------------------------------------------------------------------------------------------------------

# Why a shown command is understood above and not run here.
NOT_RUN = {
    r"mpt (serve|cluster|demo|top|bench|chat)\b": "it runs until it is stopped, or asks a server: tests/serving",
    r"mpt run-batch": "tests/serving/test_batch.py",
    r"mpt inspect SOURCE|mpt convert SOURCE|mpt verify TARGET": "it shows a pattern",
    r"mpt generate --model mpt-tiny ": "tests/mpt/test_cli.py",
    r"torchrun|--gpus [28]\b(?!.*plan)": "it needs several ranks: tests/training/test_distributed.py",
    r"train (evaluate|scale|sweep|check)\b": "tests/training: rows of published tasks, many runs, a server",
    r"train data (prepare .*--processes 8|semdedup)": "tests/training/data; eight processes are for a large machine",
    r"train finetune --from": "tests/training/test_resume.py",
    r"ultrachat_200k|my/folder:test": "tests/training/data/test_layout.py",
    r"train prefer --base my-chat": "tests/training/preferences",
}
# What a command prints, of what its page says in the comment or the block behind it.
PRINTS = {
    "train plan --recipe mpt_7b_released --gpu a100-40 --gpus 440": ["9.1 days", "$191,157"],
    "train plan --recipe instruct --rows 59310 --padded": ["2.4 hours", "$38"],
}


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_not_run_is_shown(pattern: str) -> None:
    assert any(re.search(pattern, line) for _, line in SHOWN)


@pytest.mark.parametrize("command", PRINTS)
def test_what_is_compared_is_shown_and_run(command: str) -> None:
    assert command in {bare(line) for _, line in SHOWN if is_run(line)}


def bare(line: str) -> str:
    """Without the comment, and where the program lies."""
    return line.removeprefix(".venv/bin/").partition(" #")[0]


def is_run(line: str) -> bool:
    return not any(re.search(pattern, line) for pattern in NOT_RUN)


def _page_ids(value: Any) -> str:
    return value.name if isinstance(value, Path) else ""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPT_CACHE", str(tmp_path / "cache"))
    for name in ("mpt-7b", "mpt-7b-instruct"):
        shutil.copytree(TINY, tmp_path / "home" / name)
        (tmp_path / "home" / name / "manifest.json").unlink()
    rows = [json.dumps({"prompt": f"Say {n}.", "response": str(n)}) for n in range(4)]
    pairs = [json.dumps({"prompt": f"Say {n}.", "chosen": str(n), "rejected": "no"}) for n in range(4)]
    files = {
        "my.jsonl": rows, "home/datasets/dolly_hhrlhf/train.jsonl": rows, "home/datasets/hh_rlhf/train.jsonl": pairs,
        "home/datasets/alpaca/train.jsonl": rows, "novel.txt": ["A day. " * 400],
        "books/a.txt": ["Once upon a time. " * 900], "code.jsonl": [json.dumps({"text": "print(1)"})],
    }  # fmt: skip
    for name, lines in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "my").mkdir()
    shutil.copytree(TINY, tmp_path / "my" / "tokenizer")
    (tmp_path / "mpt" / "tiny").mkdir(parents=True)
    shutil.copytree(TINY, tmp_path / "mpt" / "tiny" / "mpt-tiny")
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What a command prints, and what it says on the other stream."""
    program, *arguments = words_of(line)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        {"mpt": mpt_cli.main, "train": train_cli.main}[program]()
    assert not caught.value.code, (line, out.getvalue(), err.getvalue())
    return out.getvalue(), err.getvalue()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were begun; new weights are not trained, for the smallest recipe has 125 million."""
    runs: list[Run] = []
    fit = loop.fit

    def note(run: Run, *more: Any, **named: Any) -> Path:
        runs.append(run)
        return Path(run.out) if run.base is None else fit(run, *more, **named)

    monkeypatch.setattr(loop, "fit", note)
    return runs


def shown_by(page: Path) -> list[str]:
    return [line for line in dict.fromkeys(commands_of(page)) if is_run(line) and not _PATTERN.search(line)]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "conversion.md" and shown_by(p)], ids=_page_ids)
def test_the_commands_of_a_page_run_and_print_what_it_says(
    page: Path, here: Path, trained: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    for name, rows in re.findall(r"cat > (\S+) <<'END'\n(.*?)END\n", text, re.DOTALL):
        (here / name).write_text(rows)
    if page.name == "data.md":
        for name in ("books-2048", "c4-2048"):
            run(f"train data prepare books/ --tokenizer mpt-tiny --out {name}", monkeypatch)
    for line in shown_by(page):
        is_plan = " plan " in line  # of the published sizes, not of what stands for them here
        monkeypatch.setenv("MPT_HOME", str(here / ("none" if is_plan else "home")))
        out, err = run(line, monkeypatch)
        comment = line.partition(" #")[2]
        said = PRINTS.get(bare(line), [])
        assert all(each in out for each in said), out
        assert not comment or all(each in comment for each in said), line
        if "capitals.jsonl" in line:
            losses = [float(loss) for loss in re.findall(r" loss (\S+)", err)]
            assert losses[-1] < 0.01 < 1 < losses[0], err
        if line.startswith(".venv/bin/mpt generate --model runs/mine"):
            assert out in text and out.strip() == "The capital of Japan is Tokyo."
        if " pretrain " in line:
            begun, words = trained[-1], words_of(line)
            assert begun.base is None and {"--data", begun.data, "--tokenizer", begun.tokenizer} <= {*words}, begun
            # MPT-125M's shape in llm-foundry's yaml.
            assert [begun.model[key] for key in ("d_model", "n_heads", "n_layers")] == [768, 12, 12]
    if page.name == "training.md":
        assert (here / "my-model" / "model.safetensors").is_file()
        assert (here / "runs" / "mpt-7b-dolly_hhrlhf" / "curves.png").is_file()


def test_the_conversions_of_their_page_are_right(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says `ok` of every check; a model of another format comes back."""
    for name, shape in (("storywriter", "storywriter"), ("mpt-7b", "mpt-7b"), ("mpt-tiny-instruct", "mpt-7b")):
        make(here / name, shape)
    page = ROOT / "docs" / "conversion.md"
    for line in shown_by(page):
        out, _ = run(line, monkeypatch)
        assert " ok " in out and (here / words_of(line)[3]).is_dir(), out
