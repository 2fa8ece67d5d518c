"""The command for a GPU, on a CPU: what it keeps, leaves out and says when a part breaks, hangs or finds a fault."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import report
from benchmarks.gpu_parts.parts import NAMES, PARTS, Part, certain

NUMBERS = {
    "card": {"name": "NVIDIA H200", "device": "NVIDIA H200", "shape": "7b", "copy_gb_s": 4000, "matmul_tflop_s": 700},
    "one_stream": {
        "decode": {"128": {"gb_s": 3160, "tok_s": 210}, "8192": {"gb_s": 3900, "tok_s": 150}},
        "prefill": {"seconds": 0.06, "tflop_s": 455},
        "book": {
            "pages of no weight left out": {"read_s": 4.6, "chunk": 2048, "words_per_minute": 4501},
            "all keys read": {"read_s": 4.4, "chunk": 8192, "words_per_minute": 3000},
        },
    },
    "many_requests": {
        "requests": {"greedy": {"1": {"tok_s": 200}, "64": {"tok_s": 5998, "prompt_tokens_read": 8192}}},
        "transformers": {"64": 2000, "1": 30},
    },
    "quantised": {"speeds": {"bfloat16": {"1": {"seconds": 4.6e-3}}, "int4": {"1": {"seconds": 2e-3}}}},
    "cold_start": {"writing only": [{"seconds": 0.101}, {"seconds": 0.02}], "kernels_after_ready": 3},
    "training_speed": {
        "speeds": {"four blocks of 7B": {"none": {"mfu": 0.49}, "none, compiled": {"mfu": 0.51}, "full": {"mfu": 0.41}}}
    },
    "training_long": {
        "rows": {
            "1 blocks, none": {"peak_gb": 20, "planned_gb": 30},
            "2 blocks, full": {"peak_gb": 31, "planned_gb": 30},
        }
    },
    "training_right": {"resume_difference": 0.0, "resume_same_weights": True, "varies_by": 0.0},
}


def taken(name: str, outcome: str = "done", **found: object) -> dict[str, object]:
    return {"outcome": outcome, "reason": "", "seconds": 1.0, "found": {**NUMBERS.get(name, {}), **found}, "rows": []}


@pytest.fixture
def told(monkeypatch):
    """A list that gets the name of each part that is run; the parts themselves do nothing but find NUMBERS."""
    names: list[str] = []

    def pretend(command, file, limit_s, environment, told):
        names.append(command[3])
        return taken(command[3])

    monkeypatch.setattr(gpu, "run_child", pretend)
    return names


def start(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    return gpu.main()


# -- order, budget, resuming -----------------------------------------------------------------------------------------


def test_parts_run_in_order_and_the_page_says_which_goals_are_met(told, monkeypatch, tmp_path, capsys):
    """The shares are counted by hand: 3,160 of 4,000 GB/s are 79 %, 455 of 700 TFLOP/s 65 %, 5,998 is 2.999 x 2,000."""
    assert start(monkeypatch, "--out", str(tmp_path / "h200.json")) == 0
    assert tuple(told) == NAMES
    page = (tmp_path / "h200.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert page.startswith("# NVIDIA H200, ")
    goals = [line.split(" | ") for line in page.splitlines() if line.count(" | ") == 3 and "wanted" not in line]
    met = {cells[0].removeprefix("| "): (cells[2], cells[3].removesuffix(" |")) for cells in goals}
    assert len(met) == len(report.GOALS)
    assert met["decode, one stream, short context"] == ("79%, 210.0 tok/s at 128 tokens", "**no**")
    assert met["prefill of 2,048 tokens"] == ("65%, 60.0 ms", "yes")
    assert met["The Great Gatsby's 67,835 tokens read"] == ("4.40 s in chunks of 8,192", "yes")
    assert met["written on after them"] == ("4,501 words a minute", "yes")
    assert met["64 requests of 128 + 128 tokens"][1] == "**no**"
    assert met["longest step after ready that reads no prompt"] == (
        "101 ms; 3 kernels were compiled after ready",
        "**no**",
    )
    assert met["training, four blocks of 7B at 2,048, no checkpointing"] == ("51.0% (none, compiled)", "yes")
    assert met["the same, full checkpointing"] == ("41.0% (full)", "**no**")
    assert met["a training row of 65,536 tokens"] == ("31.0 GB of 30.0 planned (2 blocks, full)", "**no**")
    assert met["a resumed run"][1] == "yes"
    assert met["decode in int4"] == ("2.30 x, 2.00 ms a token beside 4.60", "yes")


def test_a_resumed_run_keeps_what_is_done(told, monkeypatch, tmp_path):
    out = tmp_path / "run.json"
    assert start(monkeypatch, "--out", str(out), "--only", "card", "sampling") == 0
    kept = json.loads(out.read_text())
    kept["parts"]["sampling"]["outcome"] = "out of time"
    kept["parts"]["card"]["seconds"] = 123.0
    out.write_text(json.dumps(kept))
    told.clear()
    assert start(monkeypatch, "--out", str(out), "--resume") == 0
    assert told == [name for name in NAMES if name != "card"]
    assert json.loads(out.read_text())["parts"]["card"]["seconds"] == 123.0
    told.clear()
    assert start(monkeypatch, "--out", str(out), "--resume", "--only", "card") == 0  # what is named is run again
    assert told == ["card"] and set(json.loads(out.read_text())["parts"]) == set(NAMES)


def test_another_commits_run_is_not_gone_on_with(told, monkeypatch, tmp_path):
    out = tmp_path / "run.json"
    start(monkeypatch, "--out", str(out), "--only", "card")
    out.write_text(json.dumps(json.loads(out.read_text()) | {"commit": "0123456789ab"}))
    with pytest.raises(SystemExit, match=r"has commit '0123456789ab'.*give another --out"):
        start(monkeypatch, "--out", str(out), "--resume")


def test_a_part_gets_no_more_time_than_is_left(monkeypatch, tmp_path):
    limits: dict[str, float] = {}
    clock = iter(range(0, 100_000, 50))  # each look at the clock finds it 50 s on
    monkeypatch.setattr(gpu.Run, "seconds", property(lambda _: float(next(clock))))

    def pretend(command, file, limit_s, environment, told):
        limits[command[3]] = limit_s
        return taken(command[3])

    monkeypatch.setattr(gpu, "run_child", pretend)
    assert start(monkeypatch, "--out", str(tmp_path / "run.json"), "--budget", "540") == 1
    bounds = {part.name: part.limit_s for part in PARTS}
    assert limits["card"] == bounds["card"] and all(limits[name] <= bounds[name] for name in limits)
    found = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert set(found) == set(NAMES)
    ends = [name for name in NAMES if found[name]["outcome"] == "not started"]
    assert ends == list(NAMES[-len(ends) :]) and not set(ends) & set(limits)


def test_what_stands_on_a_wrong_kernel_is_not_measured(monkeypatch, tmp_path):
    def pretend(command, file, limit_s, environment, told):
        wrong = {"wrong": "decode float32: 0.3 off"} if command[3] == "right" else {}
        return taken(command[3], "failed" if wrong else "done", **wrong)

    monkeypatch.setattr(gpu, "run_child", pretend)
    assert start(monkeypatch, "--out", str(tmp_path / "run.json")) == 1
    found = json.loads((tmp_path / "run.json").read_text())["parts"]
    left_out = {name for name, part in found.items() if part["outcome"] == "not started"}
    assert left_out == {"one_stream", "many_requests", "quantised", "cold_start"}
    assert "wrong: decode float32: 0.3 off" in (tmp_path / "run.md").read_text()


# -- a part's process ------------------------------------------------------------------------------------------------

HANGS = """
import subprocess, sys, time
from pathlib import Path
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1]).write_text('{"found": {"first": 1, "other": %d}, "rows": [["a", "1", ""]]}' % other.pid)
time.sleep(60)
"""


def test_a_part_that_hangs_is_ended_with_all_it_started_and_keeps_what_it_had(tmp_path):
    file = tmp_path / "part.json"
    part = gpu.run_child([sys.executable, "-c", HANGS, str(file)], file, 3.0)
    assert (part["outcome"], part["reason"]) == ("out of time", "ended after 3 s")
    assert part["found"]["first"] == 1 and part["rows"] == [["a", "1", ""]]
    for _ in range(100):
        if has_ended(part["found"]["other"]):
            break
        time.sleep(0.05)
    assert has_ended(part["found"]["other"])


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ("import sys; print('no such option', file=sys.stderr); sys.exit(3)", "failed", "ended with 3: no such option"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "ended with -11: nothing was said"),
        ("import sys; sys.exit(5)", "no GPU", "no CUDA device"),
        ("pass", "done", ""),
    ],
)
def test_how_a_part_ended_is_told(tmp_path, code, outcome, reason):
    part = gpu.run_child([sys.executable, "-c", code], tmp_path / "part.json", 20.0)
    assert part["outcome"] == outcome and reason in part["reason"]


def test_a_part_that_this_machine_cannot_run_is_not_done(monkeypatch, tmp_path):
    why = "onnxruntime did not load CUDA and would compute on the CPU: no libcublasLt.so.13"
    file, out = tmp_path / "part.json", tmp_path / "run.json"
    program = f"open({str(file)!r}, 'w').write({json.dumps({'not_run': why})!r})"
    part = gpu.run_child([sys.executable, "-c", program], file, 20.0)
    assert (part["outcome"], part["reason"]) == ("not run", why)
    told = []

    def pretend(command, file, limit_s, environment, told_before):
        told.append(command[3])
        return part if command[3] == "in_onnxruntime" else taken(command[3])

    monkeypatch.setattr(gpu, "run_child", pretend)
    assert start(monkeypatch, "--out", str(out)) == 1
    assert f"\n\nnot run: {why}, " in out.with_suffix(".md").read_text()
    told.clear()
    assert start(monkeypatch, "--out", str(out), "--resume") == 1
    assert told == ["in_onnxruntime"]


def test_what_a_part_had_when_the_run_was_ended_is_kept(monkeypatch, tmp_path):
    def is_ended(command, file, limit_s, environment, told):
        file.write_text('{"found": {"first": 1}, "rows": []}')
        raise SystemExit(143)

    monkeypatch.setattr(gpu, "run_child", is_ended)
    with pytest.raises(SystemExit):
        start(monkeypatch, "--out", str(tmp_path / "run.json"))
    parts = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert parts["card"]["outcome"] == "stopped" and parts["card"]["found"] == {"first": 1} and len(parts) == 1


def test_a_run_that_is_ended_says_in_which_part(tmp_path):
    """As `timeout 540` ends it, while `right` checks kernels."""
    out = tmp_path / "run.json"
    command = [sys.executable, gpu.__file__, "--rehearse", "--only", "card", "right", "--out", str(out)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    for line in run.stderr:
        if "right:" in line:
            break
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=100)
    assert run.returncode == 128 + signal.SIGTERM
    parts = json.loads(out.read_text())["parts"]
    assert parts["card"]["outcome"] == "done" and parts["card"]["found"]["matmul_tflop_s"] > 0
    assert parts["right"]["outcome"] == "stopped"


def test_without_a_gpu_one_line_says_so(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, gpu.__file__]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 5 and not ran.stdout
    assert ran.stderr.splitlines()[-1] == gpu.NO_GPU


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "decoding"], "invalid choice: 'decoding'"),
        (["--resume"], "--resume needs --out"),
        (["--out", "h200.md"], "must end in .json"),
        (["--budget", "3"], "at least 15 seconds"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert words in capsys.readouterr().err


def test_help_names_every_part_without_torch():
    code = "import sys\nfrom benchmarks import gpu\ntry: gpu.parse(['--help'])\nexcept SystemExit: pass"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nassert 'torch' not in sys.modules"],
        cwd=gpu.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in NAMES)


# -- what a budget holds ---------------------------------------------------------------------------------------------


def test_a_parts_limit_is_sure_where_all_before_it_fit_too():
    """By hand: 10 + 20 + 30 are 60; on a machine four times as slow 40 fit, and the next would end at 120."""
    parts = [Part(name, "", limit_s) for name, limit_s in (("a", 10), ("b", 20), ("c", 30))]
    assert certain(parts, 60) == ["a", "b", "c"] and certain(parts, 59) == ["a", "b"]
    assert certain(parts, 100, slower=4) == ["a"]


def test_correctness_and_serving_are_sure_within_the_budget_and_all_of_it_within_900_seconds():
    assert certain(PARTS, 900) == list(NAMES)
    assert {"card", "right", "gpu_tests", "kernel_choices", "one_stream", "many_requests", "sampling"} <= set(
        certain(PARTS, gpu.BUDGET_S)
    )


def test_parts_that_a_budget_may_drop_are_named_before_the_first_begins_and_on_the_page(monkeypatch, tmp_path, capsys):
    def pretend(command, file, limit_s, environment, told):
        return taken(command[3], "out of time" if command[3] == "training_speed" else "done")

    monkeypatch.setattr(gpu, "run_child", pretend)
    out = tmp_path / "run.json"
    assert start(monkeypatch, "--out", str(out), "--only", "card", "training_speed", "--budget", "60") == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first.endswith("60 s hold the limits of card; what they leave is for training_speed")
    assert "Without the time that they needed, or not started: training_speed;" in out.with_suffix(".md").read_text()
    start(monkeypatch, "--out", str(tmp_path / "other.json"), "--only", "card", "--budget", "60")
    assert "hold the limits" not in capsys.readouterr().err


def test_int4_is_judged_by_what_its_part_found():
    goal = next(goal for goal in report.GOALS if goal.what == "decode in int4")
    assert goal.judge(NUMBERS) == ("2.30 x, 2.00 ms a token beside 4.60", True)
    slower = {"bfloat16": {"1": {"seconds": 4.38e-3}}, "int4": {"1": {"seconds": 2e-3}}}
    assert not goal.judge({"quantised": {"speeds": slower}})[1]  # 2.19 times
