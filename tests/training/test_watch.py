"""A run as a page of text: running, silent, finished, failed and not begun, from its folder alone."""

import dataclasses
import datetime
import json
import sys
from pathlib import Path

import pytest

from mpt.errors import MachineRefused, UserError
from training import cli, loop, watch
from training.run import Run


def write(run: Run, seconds: list[float], events: list[str]) -> float:
    """A folder as a run leaves it; when its last step ended."""
    out = Path(run.out)
    out.mkdir()
    (out / "run.json").write_text(run.to_json())
    steps = [
        {"step": n, "steps": 10, "loss": 10.0 - n, "tokens": 100 * n, "tokens_per_s": 1000.0, "seconds": at}
        for n, at in enumerate(seconds, 1)
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 6, "st')
    told = [{"time": "2026-11-27T10:00:00+00:00", "event": event, "step": 4} for event in events]
    (out / "logbook.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in told))
    return (out / "metrics.jsonl").stat().st_mtime


def test_a_running_run_has_its_numbers_and_what_is_left(small_run: Run) -> None:
    """By hand: 5 of 10 steps, the steps of 2 s but for one of 9, so 10 s are left."""
    ended = write(small_run, [2.0, 4.0, 6.0, 15.0, 17.0], ["start", "spike"])
    view = watch.look(Path(small_run.out), ended + 3)
    assert (view.state, view.left_s, len(view.steps)) == ("running", 10.0, 5)
    text = watch.page(view, width=60)
    assert "running  step 5 of 10 (50%)  taken 17 s  left 10 s" in text
    assert "loss 5  1,000 tokens/s" in text and "2026-11-27 10:00:00  spike     step 4" in text
    assert all(len(line) <= 60 for line in text.splitlines()[1:])
    silent = watch.look(Path(small_run.out), ended + 90)
    assert silent.state == "silent" and "no step for 1 min 30 s" in watch.page(silent)


def test_a_run_whose_rank_failed_may_be_starting_again(small_run: Run) -> None:
    write(small_run, [2.0, 4.0], ["start"])
    entry = {"time": "2026-11-27T10:05:00+00:00", "event": "failed", "rank": 1, "error": "out of memory"}
    with (Path(small_run.out) / "logbook.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    at = datetime.datetime(2026, 11, 27, 10, 5, tzinfo=datetime.UTC).timestamp()
    for later, state in ((30, "restarting"), (300, "failed")):
        view = watch.look(Path(small_run.out), at + later)
        assert (view.state, view.is_over) == (state, state == "failed")


def test_a_chart_rises_and_falls_with_its_values() -> None:
    """By hand: of two lines the highest fills both, the lowest an eighth of the lower one."""
    assert watch.chart([0.0, 1.0], 2, 2) == [" █", "▁█"]
    assert watch.chart([1.0, 1.0], 9, 1) == ["▁▁"]
    assert watch.chart([0.0, 0.0, 8.0, 8.0], 2, 1) == ["▁█"]


def test_the_command_shows_finished_and_failed_runs(
    small_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    loop.fit(small_run)
    assert "finished  step 12 of 12 (100%)" in train("watch", small_run.out)

    def refuse(_: loop.Metrics) -> None:
        raise MachineRefused("the disk is gone")

    failed = dataclasses.replace(small_run, out=small_run.out + "-failed")
    with pytest.raises(MachineRefused):
        loop.fit(failed, refuse)
    page = train("watch", failed.out, "--once")
    assert "failed  step 1 of 12" in page and "error the disk is gone" in page
    with pytest.raises(UserError, match=r"holds no run\.json"):
        watch.look(Path(small_run.out).parent)
