"""Programs that a model writes pass or fail by their tests, and reach nothing of this machine."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from mpt.errors import UserError
from training.evaluation import programs

_BOXED = shutil.which("bwrap") is not None and programs.run(["pass"])[0]
boxed = pytest.mark.skipif(not _BOXED, reason="needs bubblewrap that may make namespaces")


@boxed
def test_the_published_solutions_pass_and_broken_ones_do_not() -> None:
    data = Path(os.environ.get("MPT_TEST_DATA") or Path(__file__).parents[4] / "shared/data") / "icl"
    path = data / "human_eval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in the folder of MPT_TEST_DATA")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()[:8]]
    tests = [f"{row['test']}\ncheck({row['entry_point']})\n" for row in rows]
    solved = [row["prompt"] + row["canonical_solution"] + test for row, test in zip(rows, tests, strict=True)]
    empty = [row["prompt"] + "    pass\n" + test for row, test in zip(rows, tests, strict=True)]
    assert programs.run(solved) == [True] * 8 and programs.run(empty) == [False] * 8


@boxed
def test_a_program_reaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_SECONDS", 2)
    monkeypatch.setenv("MPT_API_KEY", "secret")
    (tmp_path / "mine").write_text("mine")
    harmful = [
        f"open({str(tmp_path / 'mine')!r}).read()",
        f"open({str(tmp_path / 'theirs')!r}, 'w')",
        "open('/etc/passwd')",
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "import os; assert 'MPT_API_KEY' in os.environ",
        "import os; os.kill(1, 9) if os.getpid() != 1 else None; assert len(os.listdir('/proc')) > 1000",
        "while True: pass",
        "open('/tmp/much', 'w').write('a' * (2 << 20))",
        "a = bytearray(3 << 30)",
        "import sys; sys.exit(3)",
    ]
    assert programs.run(harmful) == [False] * len(harmful)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert programs.run(["import os; assert os.listdir('/tmp') == [] and os.getuid() == 65534"]) == [True]


def test_programs_run_only_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--run-programs"):
        programs.check("human_eval", False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt install bubblewrap"):
        programs.check("human_eval", True)
