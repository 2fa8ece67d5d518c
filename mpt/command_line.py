"""What the command lines share: their make, how they end, and the options of several of them.

Light to import, so that `--help` answers at once.

`Style` is the same as in `mpt.prompts`, which is slow to import; the type checker compares them.
"""

import gc
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
import typer.core

from mpt.errors import DeviceLost, MPTError
from mpt.files import disk_refusals, misplaced_paths

_LONGEST_ERROR = 10_000  # characters: a damaged file's names may be longer
BEGAN = time.monotonic()  # of a command: this is among the first modules that one imports

Style = Literal["none", "instruct", "chatml", "template"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
KVCache = Literal["auto", "int8"]

DeviceOption = Annotated[Device, typer.Option(help="Where to compute; `auto` is CUDA where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the weights; `auto` keeps the checkpoint's.")]
QuantizeOption = Annotated[
    Quantization | None,
    typer.Option(
        help="Round the weights as they are read, in one process; the rest stays bfloat16. int8: half the memory of "
        "bfloat16, nearly the same answers. int4: about a third, for a model that would not fit.",
        show_default="no",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="On CPU.", show_default="the physical cores, at most the container's quota"),
]
KVCacheOption = Annotated[
    KVCache,
    typer.Option(help="Precision of the KV cache; `auto` is the weights', `int8` holds nearly twice the tokens."),
]
KeyOption = Annotated[str | None, typer.Option(envvar="MPT_API_KEY", help="Key for the server.", show_default=False)]


# How help pages call what typer names by its Python type.
_WORDS = {
    "int": "N", "int range": "N", "float": "NUMBER", "float range": "NUMBER", "str": "TEXT", "path": "PATH",
    "Path": "PATH", "list[str]": "TEXT", "list[Path]": "PATH", "list[path]": "PATH",
}  # fmt: skip


class Command(typer.core.TyperCommand):
    """A command whose help page has words for a reader in place of Python's types."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`SOURCE`, where typer writes `{SOURCE}`, and `[URL]` for an argument that may be left out."""
        return [_plain_usage(piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """An option with the word for its value, an argument by its name alone."""
        write = formatter.write_dl

        def write_plain(rows: Sequence[tuple[str, str]], *more: Any, **named: Any) -> None:
            write([(_plain(name), text) for name, text in rows], *more, **named)

        formatter.write_dl = write_plain
        super().format_options(ctx, formatter)


def _plain_usage(piece: str) -> str:
    found = re.fullmatch(r"([{\[])\[?(.+?)\]?[}\]](\.\.\.)?", piece)
    if found is None:
        return piece
    bracket, name, many = found.groups()
    name = name if many is None or name.endswith("...") else f"{name}..."
    return name if bracket == "{" else f"[{name}]"


def _plain(name: str) -> str:
    """The first column of a row: `--port N` of `--port <int range>`, `SOURCE` of `SOURCE <str>`."""
    before, found, kind = name.removesuffix(">").partition(" <")
    if not found or not name.endswith(">"):
        return name
    return f"{before} {_WORDS.get(kind, kind)}" if name.startswith("-") else before


class App(typer.Typer):
    """A command line whose commands are of the class above."""

    def command(self, name: str | None = None, *, cls: type[typer.core.TyperCommand] | None = None, **more: Any) -> Any:
        return super().command(name, cls=cls or Command, **more)


def new_app(help: str) -> typer.Typer:
    return App(
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=help,
    )


def hold_standard_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    Else the next file or socket gets its number, and what a library writes to stderr goes there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)  # the lowest number that is free, which is this one
            stream = open(number, mode, encoding="utf-8")  # noqa: SIM115  (as long as the process)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@contextmanager
def _all_written() -> Iterator[None]:
    """Write what was printed before the command ends. Raises OSError; a reader that has gone ends the command with 1.

    What is refused is let go of, for the exit would fail on it again.
    """
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                sys.exit(1)
            raise


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command line; a user's mistake is one line on stderr and an exit code."""
    hold_standard_streams()
    for library in ("matplotlib", "bitsandbytes"):  # which say where they keep fonts, and which kernels they do without
        logging.getLogger(library).setLevel(logging.ERROR)
    gc.set_threshold(50_000, 10, 10)  # by default looking for cycles is a sixth of the time that importing torch takes
    try:
        with disk_refusals(), misplaced_paths(), _all_written():
            app(prog_name=name)
    except MPTError as error:
        print(f"{name}: {str(error)[:_LONGEST_ERROR]}", file=sys.stderr)
        if isinstance(error, DeviceLost):  # what a dead CUDA context holds, let go of, may abort with another code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    finally:
        gc.freeze()  # else the interpreter, as it ends, looks a second long for cycles among the objects of torch
