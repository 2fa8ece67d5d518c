"""How far a run or an evaluation is, on a terminal and in a log."""

import contextlib
import io
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from training import show


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, of: int, loss: float | None = 1.25) -> dict[str, Any]:
    return {"step": number, "steps": of, "tokens_per_s": 500.0} | ({} if loss is None else {"loss": loss})


def test_the_bar_comes_with_the_first_step_and_counts_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on at step 7 of 9; the first of its steps is passed over, so it has no loss."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show.steps() as report:
        assert terminal.getvalue() == ""
        for number in (7, 8, 9):
            report(step(number, 9, None if number == 7 else 1.25))
    counts = re.findall(r"step (\d+)/(\d+)", terminal.getvalue())
    assert counts[0] in (("6", "9"), ("7", "9")) and counts[-1] == ("9", "9")
    assert "nan" not in terminal.getvalue() and "loss 1.250  500 tokens/s" in terminal.getvalue()


def test_a_run_after_another_has_the_bar_and_the_cursor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with contextlib.suppress(KeyboardInterrupt), show.steps() as report:
        for number, of in ((1, 2), (2, 2), (2, 2), (1, 5)):  # the first run goes back once
            report(step(number, of))
        raise KeyboardInterrupt
    shown = terminal.getvalue()
    assert re.findall(r"step (\d+/\d+)", shown)[-1] == "1/5"
    assert shown.count("\x1b[?25l") == 1 and "\x1b[?25h" in shown.rpartition("1/5")[2]  # hidden once, then shown


def test_in_a_log_the_first_steps_of_a_start_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with show.steps() as report:
        for number in range(55, 75):
            report(step(number, 74))
        for number in range(1, 6):  # the next run of a sweep
            report(step(number, 5))
        for number in range(5, 10):  # one that goes on
            report(step(number, 9))
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(line.split()[1] for line in lines) == "55 56 57 60 70 74 1 2 3 5 5 6 7 9"
    assert lines[0] == "step 55 steps 74 loss 1.25 tokens_per_s 500"


def test_in_a_log_a_long_task_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 11.0, 13.0, 30.5])
    monkeypatch.setattr(show, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with show.progress("piqa") as report:
        for done in (10, 20, 30, 40):
            report(done, 40)
    assert capsys.readouterr().err.splitlines() == ["piqa 20 of 40 in 11 s", "piqa 40 of 40 in 30 s"]


def test_what_is_over_at_once_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.5])
    monkeypatch.setattr(show, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with show.progress("piqa") as report:
        report(4, 4)
    with show.progress("another rank", is_shown=False) as report:
        report(4, 4)
    assert capsys.readouterr().err == ""
