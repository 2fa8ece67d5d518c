"""Where the commands `mpt`, `train` and `mpt-haproxy` begin: with a look at whether the packages they need are ours.

`serving`, `training`, `conversion` and `demos` are plain words. Another project's package of such a name that Python
finds first, or that was installed over ours, is told in one line, and not by an ImportError deep inside.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_ROOT = Path(__file__).resolve().parents[1]
_OURS = ("serving", "training", "conversion", "demos")
_APART = "install mpt in an environment of its own, with `uv tool install` or `pipx install`"


def mpt() -> None:
    """The command `mpt`."""
    with _own_packages("mpt"):
        from mpt.cli import main
    main()


def train() -> None:
    """The command `train`."""
    with _own_packages("train"):
        from training.cli import main
    main()


def haproxy() -> None:
    """The command `mpt-haproxy`, which Ray starts."""
    with _own_packages("mpt-haproxy"):
        from serving.cluster.haproxy import main
    main()


@contextmanager
def _own_packages(command: str) -> Iterator[None]:
    """Leave with 2 and one line where what is imported here would be, or turns out to be, another project's."""
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        if spec is None:
            _leave(command, f"`{_ROOT / name}` is missing; install mpt again")
        where = Path(spec.origin or next(iter(spec.submodule_search_locations or ())))
        if where.resolve() != _ROOT / name / "__init__.py":
            _leave(command, f"another project's `{name}` is found first, `{where}`; {_cure(where)}")
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _OURS:
            raise
        _leave(command, f"files of another project lie among mpt's own in `{_ROOT}` ({error}); {_APART}")


def _cure(where: Path) -> str:
    """What helps against a package that is found first: its folder was named to Python, or it is installed here."""
    above = where.resolve().parents[:2]
    named = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if any(Path(each).resolve() in above for each in named):
        return "take its folder out of $PYTHONPATH"
    return "run mpt from another folder" if Path.cwd() in above else _APART


def _leave(command: str, why: str) -> NoReturn:
    print(f"{command}: {why}", file=sys.stderr)
    sys.exit(2)
