"""`pytest -m gpu`, dealt to several processes: most of its time goes into compilations, which one core does each.

    python -m benchmarks.gpu_parts.gpu_tests SHARE SHARES FILE SECONDS PYTEST-ARGUMENT...  # a share; the part starts it

Each process counts into a file as it goes, so tests that no time is left for are told from tests that never were. No
test collected is a failure: then something is wrong with the machine or with the command, and nothing was proved.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # a share that tests nothing of torch's should not wait for it
    from benchmarks.gpu_parts.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
TEST_S = 100  # of one test
KINDS = ("passed", "failed", "skipped")


def run(bench: "Bench") -> None:
    bench.measure("pytest -m gpu", lambda: count(bench, *arguments(bench)))


def arguments(bench: "Bench") -> tuple[int, list[str]]:
    """How many processes, and what they are told."""
    if not bench.is_cuda:  # a rehearsal; these six take no time
        return 2, ["-m", "not gpu", "tests/benchmarks/test_machine.py"]
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return max(1, min(8, (os.cpu_count() or 2) // 2)), ["-m", "gpu", *files]


def count(bench: "Bench", n: int, told: list[str]) -> None:
    """Run the shares beside each other and add up what they count. Raises AssertionError unless every test passed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{share}.json" for share in range(n)]
        seconds = str(bench.left_s - 5)
        name = "benchmarks.gpu_parts.gpu_tests"
        shares = [
            subprocess.Popen(
                [sys.executable, "-m", name, str(share), str(n), str(file), seconds, *told],
                cwd=ROOT, stdout=subprocess.DEVNULL,
            )
            for share, file in enumerate(files)
        ]  # fmt: skip
        while any(share.poll() is None for share in shares):
            time.sleep(0.5)
            bench.note(**summed(files))
        codes = [share.returncode for share in shares]
        total = summed(files)
    bench.note(**total, exit_codes=codes)
    words = ", ".join(f"{total[kind]} {kind}" for kind in (*KINDS, "errors", "not_run")).replace("_", " ")
    bench.row(f"pytest {' '.join(told[:2])}, {n} processes", words, f"{total['collected']} collected")
    for failure in total["failures"]:
        bench.row(f"`{failure['test']}`", "failed", failure["why"])
    assert total["collected"], f"no test was collected; the processes ended with {codes}"
    assert not total["failed"] and not total["errors"], f"{total['failed']} tests failed, {total['errors']} errors"
    assert not set(codes) - {0, 5} or total["not_run"], f"pytest ended with {codes}"  # 5: nothing in this share
    assert not total["not_run"], f"no time was left for {total['not_run']} tests"


def summed(files: list[Path]) -> dict[str, Any]:
    """What the shares have counted so far."""
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    total: dict[str, Any] = {key: sum(each[key] for each in found) for key in ("collected", *KINDS)}
    total["not_run"] = total["collected"] - sum(total[kind] for kind in KINDS)
    total["errors"] = max((each["errors"] for each in found), default=0)  # every share meets a file that cannot load
    failures = {failure["test"]: failure for each in found for failure in each["failures"]}
    return total | {"failures": list(failures.values())}


class Share:
    """A pytest plugin: runs every n-th test until the time is up, and counts."""

    def __init__(self, number: int, n: int, file: Path, seconds: float) -> None:
        self._number, self._n, self._file = number, n, file
        self._end = time.monotonic() + seconds
        self._counts: dict[str, Any] = dict.fromkeys(("collected", *KINDS, "errors"), 0) | {"failures": []}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._number :: self._n]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._counts["collected"] = len(session.items)
        self._keep()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._counts["errors"] += 1
            self._counts["failures"].append({"test": report.nodeid, "why": _last_line(report.longreprtext)})
            self._keep()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts once: as failed if any of its three stages failed, as skipped where that was said first."""
        if report.failed and not (report.when == "teardown" and self._failed_already(report.nodeid)):
            if report.when == "teardown":  # its call had counted as passed
                self._counts["passed"] -= 1
            self._counts["failed"] += 1
            self._counts["failures"].append({"test": report.nodeid, "why": _last_line(report.longreprtext)})
        elif report.skipped:
            self._counts["skipped"] += 1
        elif report.passed and report.when == "call":
            self._counts["passed"] += 1
        self._keep()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        yield
        if time.monotonic() > self._end:
            item.session.shouldstop = "no time is left"

    def _failed_already(self, test: str) -> bool:
        return any(failure["test"] == test for failure in self._counts["failures"])

    def _keep(self) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._counts))
        partial.replace(self._file)


def _last_line(text: str) -> str:
    """Of a traceback: what went wrong."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = errors or [line for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def main() -> int:
    number, n, file, seconds, *told = sys.argv[1:]
    options = ["-q", f"--timeout={TEST_S}", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return int(pytest.main([*options, *told], plugins=[Share(int(number), int(n), Path(file), float(seconds))]))


if __name__ == "__main__":
    sys.exit(main())
