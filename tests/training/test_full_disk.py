"""A disk that is full at any write of a run is one line with exit code 5, nothing half-written, and a run that goes on.

The kernel refuses: the largest file a process may write is lowered (RLIMIT_FSIZE) just before the write in question. In
a process of its own, for the limit holds for all of its files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import cli
from training.logbook import Logbook
from training.run import Run

ROOT = Path(__file__).parents[2]
_PROGRAM = """
import contextlib, json, resource, sys
from pathlib import Path
from mpt.errors import MPTError
from training import curves, export, folder, loop
from training.run import Run

def limit(n_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

def before(module, name, n_bytes):
    real = getattr(module, name)
    def limited(*args, **kwargs):
        limit(n_bytes)
        return real(*args, **kwargs)
    return module, name, limited

def after(module, name, n_bytes):
    real = getattr(module, name)
    def limited(*args, **kwargs):
        try:
            return real(*args, **kwargs)
        finally:
            limit(n_bytes)
    return module, name, limited

def at_three(metrics):
    if metrics["step"] == 3:
        limit((Path(run.out) / "metrics.jsonl").stat().st_size + 10)

cases = {
    "run.json": before(folder, "write_whole", 100),
    "logbook at the start": after(folder, "cut_metrics", 10),
    "metrics": None,
    "checkpoint": after(folder, "cut_metrics", 20_000),
    "model": before(export, "write", 20_000),
    "plot": before(curves, "plot", 10_000),
    "logbook at the end": after(curves, "plot", 10),
}
found = {}
for name, patch in cases.items():
    description = Path(sys.argv[1]) / f"{name}.json"
    run = Run.read(description)
    real = None if patch is None else getattr(patch[0], patch[1])
    if patch is not None:
        setattr(*patch)
    try:
        loop.fit(run, at_three if patch is None else lambda _: None)
        said, code = "finished", 0
    except MPTError as error:
        said, code = str(error), error.exit_code
    limit(resource.RLIM_INFINITY)
    if patch is not None:
        setattr(patch[0], patch[1], real)
    left = sorted(path.name for path in Path(run.out).rglob("*")) if Path(run.out).is_dir() else None
    again = str(loop.fit(run))
    found[name] = {"said": said, "code": code, "left": left, "again": again}
print(json.dumps(found))
"""


def test_any_command_says_a_full_disk_in_one_line(tmp_path: Path) -> None:
    """`train plot` of a run, whose picture is larger than a file may be."""
    run = tmp_path / "run"
    run.mkdir()
    line = {"step": 1, "steps": 1, "loss": 1.0, "tokens": 1, "lr": 1.0, "gradient_norm": 1.0, "tokens_per_s": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    program = (
        "import resource, sys; from training import cli, curves; import matplotlib.figure\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        f"sys.argv = ['train', 'plot', {str(run)!r}]; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr


def test_a_path_that_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where a folder should be: of a picture, and of a run that has not begun."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "steps": 1, "loss": 1.0, "tokens": 1}\n')
    place = str(tmp_path / "file" / "inside")
    for command in (
        ["plot", str(tmp_path), "--out", f"{place}.png"],
        ["finetune", "--base", "mpt-tiny", "--data", "yaml_to_json", "--steps", "1", "--out", place],
    ):
        monkeypatch.setattr(sys, "argv", ["train", *command])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and "cannot be used (Not a directory)" in err and place in err, err
    assert (tmp_path / "file").read_text() == "kept"


CASES = ("run.json", "logbook at the start", "metrics", "checkpoint", "model", "plot", "logbook at the end")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, dict[str, object]]:
    from tests.training.conftest import SHAPE

    folder = tmp_path_factory.mktemp("full")
    for name in CASES:
        run = Run(
            name="small", base=None, data="yaml_to_json", out=str(folder / name.replace(" ", "-")),
            tokenizer=str(tokenizer_folder), model=SHAPE, max_seq_len=256, global_batch=2, steps=6, epochs=None,
            lr=1e-3, precision="fp32", prompt_style="instruct", checkpoint_every=4,
        )  # fmt: skip
        (folder / f"{name}.json").write_text(run.to_json())
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_write_that_is_refused_is_one_line_and_the_run_goes_on(
    name: str, ended: dict[str, dict[str, object]]
) -> None:
    case = ended[name]
    assert case["code"] == 5 and "File too large" in str(case["said"]), case
    assert "\n" not in str(case["said"])
    left = case["left"]
    assert left is None or not [path for path in left if path.endswith(".partial")], left  # type: ignore[attr-defined]
    out = Path(str(case["again"])).parent
    assert (out / "model" / "manifest.json").is_file()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all("event" in entry for entry in Logbook(out).entries())
    if name == "run.json":
        assert left is None
