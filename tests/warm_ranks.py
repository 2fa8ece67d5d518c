"""Ranks of torchrun in one second instead of eight: forked from a process that has imported what they need.

`Ranks.run` does what `python -m torch.distributed.run --standalone` does, by the same elastic agent: a store, one
process a rank, a restart if one dies. `python -m tests.warm_ranks` is the process, which reads a request of
JSON a line and answers each with the exit code.
"""

import json
import os
import runpy
import subprocess
import sys
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Ranks:
    """The process that ranks are forked from; `close` ends it."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_ranks"],
            env=env, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, program: Path, *arguments: str, n_ranks: int = 2, **environment: str) -> None:
        """The program on so many ranks, each with one thread, restarted once if a rank dies."""
        errors = program.with_suffix(".stderr")
        request = {
            "program": str(program), "arguments": arguments, "n_ranks": n_ranks, "errors": str(errors),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
        }  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "0\n", errors.read_text()[-3000:]

    def close(self) -> None:
        self._process.communicate()


def _rank(program: str, arguments: list[str]) -> None:
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def _launch(program: str, arguments: list[str], n_ranks: int, environment: dict[str, str], errors: str) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    said = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.clear()
    os.environ.update(environment)  # the test's own, not that of the first test
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=n_ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=1, start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, _rank)(program, arguments)


def _serve() -> None:
    import torch.distributed.launcher.api  # noqa: F401 - what ranks are to find imported

    from tests.training import one_step  # noqa: F401
    from training import loop, step  # noqa: F401

    for line in sys.stdin:
        launcher = os.fork()
        if launcher == 0:
            code = 1
            try:
                _launch(**json.loads(line))
                code = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
