"""Tokens that are kept are those that would be made, on any number of processes, and after damage."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpt.catalog import resolve
from mpt.chat_template import ChatTemplate
from mpt.errors import MachineRefused, UserError
from mpt.prompts import PromptFormat
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data import files, tokenized, workers
from training.data.files import RawSet
from training.data.rows import Sample, sample_of
from training.data.tokenized import Reading

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return Tokenizer.from_folder(resolve("mpt-tiny-chat"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"Add {n}.", "response": "x" * (n % 40)}) for n in range(700)]
    lines[300] = "{not json"
    lines[600] = json.dumps({"prompt": "Add.", "reply": "x"})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def samples(found: tokenized.Tokenized) -> list[Sample]:
    starts = [0, *found.ends[:-1].tolist()]
    return [
        Sample(found.ids[start:end].tolist(), found.learned[start:end].tolist())
        for start, end in zip(starts, found.ends.tolist(), strict=True)
    ]


def kept(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "tokenized").iterdir() if path.is_dir())


def test_samples_are_the_same_made_here_in_processes_and_from_the_cache(
    path: Path, tmp_path: Path, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = []
    for _, row in files.rows(str(path)):
        try:
            by_hand.append(sample_of(row, chatml, "chatml"))
        except UserError:
            continue
    reading = Reading(PromptFormat("chatml"))
    stories = []
    for n_processes in (1, 2):
        monkeypatch.setenv("MPT_CACHE", str(tmp_path / f"{n_processes}"))
        for _ in range(2):  # made, then read
            found = tokenized.open_set(RawSet([path]), chatml, reading, n_processes=n_processes)
            assert samples(found) == by_hand
            stories.append(found.story)
    assert (
        stories[0].n_rows == 700 and stories[0].n_bad == 17 + 2
    )  # every fortieth response is empty: 18, one of them bad
    assert all(story == stories[0] for story in stories)


def test_a_template_is_rendered_in_processes_as_here(path: Path, tmp_path: Path, chatml: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATE, "the test", chatml)
    found = tokenized.open_set(RawSet([path]), chatml, Reading(PromptFormat("template", template)), n_processes=2)
    row = {"prompt": "Add 7.", "response": "x" * 7}
    assert sample_of(row, chatml, "template", template=template) in samples(found)


def test_a_second_start_reads_nothing(path: Path, tmp_path: Path, chatml: Tokenizer) -> None:
    reports: list[int] = []

    def report(n_rows: int, seconds: float) -> None:
        reports.append(n_rows)

    first = tokenized.open_set(RawSet([path]), chatml, Reading(PromptFormat("chatml")), report)
    assert reports[-1] == 700
    reports.clear()
    second = tokenized.open_set(RawSet([path]), chatml, Reading(PromptFormat("chatml")), report)
    assert reports == [] and samples(first) == samples(second)
    assert isinstance(second.ids, np.memmap) and second.ids.dtype == np.uint16


def test_whatever_decides_a_sample_decides_the_name(
    path: Path, tmp_path: Path, chatml: Tokenizer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(TEMPLATE, "the test", chatml)
    plain = Reading(PromptFormat("chatml"))
    other = tmp_path / "other" / "rows.jsonl"
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    names = [
        tokenized._name(RawSet([path]), chatml, plain),
        tokenized._name(RawSet([path]), tokenizer, plain),
        *(
            tokenized._name(RawSet([path]), chatml, reading)
            for reading in (
                Reading(PromptFormat("instruct")), Reading(PromptFormat("template", template)),
                Reading(PromptFormat("chatml"), learn="last"), Reading(PromptFormat("chatml"), learn_prompts="all"),
                Reading(PromptFormat("chatml"), columns="prompt=prompt,response=reply"),
            )
        ),
    ]  # fmt: skip
    assert tokenized._name(RawSet([other]), chatml, plain) == names[0]  # what it says, not where it lies
    other.write_bytes(path.read_bytes() + b"\n{}")
    names.append(tokenized._name(RawSet([other]), chatml, plain))
    monkeypatch.setattr(tokenized, "_code", lambda: ["of tomorrow"])
    names.append(tokenized._name(RawSet([path]), chatml, plain))
    assert len(set(names)) == len(names)


def test_a_damaged_copy_is_made_again(path: Path, tmp_path: Path, chatml: Tokenizer) -> None:
    reading = Reading(PromptFormat("chatml"))
    expected = samples(tokenized.open_set(RawSet([path]), chatml, reading))
    (folder,) = kept(tmp_path)
    ids = (folder / "ids").read_bytes()
    for damage in (lambda: (folder / "ids").write_bytes(ids[:-2]), lambda: (folder / "about.json").write_text("{")):
        damage()
        assert samples(tokenized.open_set(RawSet([path]), chatml, reading)) == expected
    assert (folder / "ids").read_bytes() == ids


def test_where_nothing_can_be_written_the_tokens_stay_in_memory(
    path: Path, tmp_path: Path, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = samples(tokenized.open_set(RawSet([path]), chatml, Reading(PromptFormat("chatml"))))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setenv("MPT_CACHE", str(tmp_path / "full"))
    assert samples(tokenized.open_set(RawSet([path]), chatml, Reading(PromptFormat("chatml")))) == expected
    assert "No space left" in caplog.text
    assert not [left for left in (tmp_path / "full" / "tokenized").iterdir() if left.suffix != ".lock"]


def test_the_oldest_sets_go_when_all_are_over_the_limit(
    tmp_path: Path, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(n: int) -> tokenized.Tokenized:
        file = tmp_path / f"{n}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{n} {'x' * 1000}"}) + "\n" for _ in range(20)))
        return tokenized.open_set(RawSet([file]), chatml, Reading(PromptFormat("none")))

    first = use(1)
    n_bytes = sum(file.stat().st_size for file in kept(tmp_path)[0].iterdir())
    monkeypatch.setenv("MPT_CACHE_GB", str(2.5 * n_bytes / 1e9))
    for n, seconds in ((1, 300), (2, 200)):
        use(n)
        newest = max(kept(tmp_path), key=lambda path: (path / "about.json").stat().st_mtime)
        os.utime(newest / "about.json", (time.time() - seconds,) * 2)
    use(3)
    texts = {chatml.decode(np.fromfile(path / "ids", np.uint16)[:5].tolist())[0] for path in kept(tmp_path)}
    assert texts == {"2", "3"}
    assert chatml.decode(samples(first)[0].ids).startswith("1 x")  # it is mapped, so its reader keeps it


def _open(path: Path, cache: Path, answers: Any) -> None:
    os.environ["MPT_CACHE"] = str(cache)
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny-chat"))
    reports: list[int] = []
    found = tokenized.open_set(
        RawSet([path]), tokenizer, Reading(PromptFormat("chatml")), lambda n, _: reports.append(n), n_processes=1
    )
    answers.put((len(reports), found.ids.tolist()))


def test_of_processes_that_start_together_one_makes_the_tokens(path: Path, tmp_path: Path, chatml: Tokenizer) -> None:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    started = [context.Process(target=_open, args=(path, tmp_path / "shared", answers)) for _ in range(3)]
    for process in started:
        process.start()
    found = [answers.get(timeout=100) for _ in started]
    for process in started:
        process.join(100)
    assert sorted(n > 0 for n, _ in found) == [False, False, True]
    assert all(ids == found[0][1] for _, ids in found)


def _die(_: int) -> None:
    os._exit(1)


def _nothing() -> None:
    pass


def test_a_process_that_dies_is_said() -> None:
    with pytest.raises(MachineRefused, match="is memory short"):
        list(workers.mapped(_die, range(3), 2, _nothing))


_KILLED = """
import os, time
from training.data import workers

def work(n):
    return os.getpid()

def start():
    pass

if __name__ == "__main__":
    found = workers.mapped(work, range(1000), 2, start)
    print(next(found), flush=True)
    time.sleep(60)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 100
    while _is_running(worker):
        assert time.monotonic() < deadline, "the process outlived its parent"
        time.sleep(0.05)


def _is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _slow_first(n: int) -> int:
    time.sleep(0.2 if n == 0 else 0)
    return n * n


def test_results_come_in_order_and_items_are_not_read_far_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            read.append(n)
            yield n

    found = workers.mapped(_slow_first, items(), 2, _nothing)
    assert next(found) == 0 and len(read) <= 8
    assert list(found) == [n * n for n in range(1, 100)]


def test_a_large_set_and_a_small_one_give_the_same(
    path: Path, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = datasets.load(str(path), chatml, "chatml", 200, 3, max_bad_rows=0.1)
    monkeypatch.setattr(tokenized, "_BYTES_A_PROCESS", 1000)
    monkeypatch.setenv("MPT_CACHE", os.environ["MPT_CACHE"] + "-large")
    large = datasets.load(str(path), chatml, "chatml", 200, 3, max_bad_rows=0.1)
    assert large.n_samples == small.n_samples
    assert [large.sample(n) for n in range(700)] == [small.sample(n) for n in range(700)]
