"""Every checkpoint format in one table: how it is recognised, what it can hold, which module reads and writes it.

The names after `--to`, the refusals, `mpt inspect` and the verification are derived from it. It imports nothing heavy,
so that the command line answers at once; a format's module is imported when it is used. To add a format, write
`conversion/formats/NAME.py` with the functions of `Reader` or `Writer`, and add its row and its import here.

Not here: adapters, which are a change to a checkpoint and no format of one (`formats/adapter.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from conversion.options import Options
from mpt.errors import UserError
from mpt.extras import require

if TYPE_CHECKING:
    from conversion.running import Runner
    from conversion.source import Source


class Reader(Protocol):
    """What the module of every format has."""

    def read(self, path: Path, tokenizer: Path | None = None) -> "Source":
        """The checkpoint at a path. tokenizer: a folder, for a checkpoint that brings none."""


class Writer(Reader, Protocol):
    """What the module of a format that `mpt convert` writes has."""

    def cannot_express(self, source: "Source") -> dict[str, str]:
        """By name of a setting, why the format's runtimes would compute this model differently."""

    def write(
        self, source: "Source", out: Path, dtype: str, options: Options, advance: Callable[[int], None]
    ) -> Mapping[Path, str]:
        """Write into `out`, an empty folder; sha256 of the files that were hashed while they were written, if any.

        dtype: one of the row's. advance: called with bytes of weights written.
        """

    def runners(self, source: "Source", target: "Source", folder: Path) -> "list[Runner]":
        """What computes the written model. target: the folder, opened again."""


@dataclass(frozen=True)
class Format:
    """A format that is read."""

    kind: str  # `Source.kind`
    title: str  # in messages
    module: Callable[[], Reader]  # imports it
    is_at: Callable[[Path], bool]  # whether a path, a file or a folder, holds one
    marker: str = ""  # the file by which a folder is recognised, for messages
    suffix: str = ""  # of a checkpoint that is one file
    is_run: bool = False  # whether `mpt serve` runs it as it is
    is_base: bool = False  # whether `train finetune` takes it as a base as it is

    def reader(self) -> Reader:
        return self.module()


@dataclass(frozen=True, kw_only=True)
class ExportFormat(Format):
    """A format that is written too; its module has the functions of `Writer`."""

    module: Callable[[], Writer]
    help: str  # after `--to`
    dtypes: tuple[str, ...]  # the first is `auto` for a source whose own the format does not have
    options: tuple[str, ...] = ()  # fields of `Options` that only this format has
    file: str = ""  # in the written folder, where that file and not the folder is opened to read it again
    has_card: bool = False  # a README.md for the hub is written
    needs: tuple[str, ...] = ()  # modules of the extra `conversion` that write and verify it

    def writer(self) -> Writer:
        return self.module()


# Each format's module, imported when it is used.


def _huggingface() -> Writer:
    from conversion.formats import huggingface

    return huggingface


def _composer() -> Reader:
    from conversion.formats import composer

    return composer


def _onnx() -> Writer:
    from conversion.formats import onnx_folder

    return onnx_folder


def _fastertransformer() -> Writer:
    from conversion.formats import fastertransformer

    return fastertransformer


def _gguf() -> Writer:
    from conversion.formats import gguf_file

    return gguf_file


def _ggml() -> Reader:
    from conversion.formats import ggml_file

    return ggml_file


def _magic(path: Path) -> bytes:
    """The first four bytes of a file; none of a folder."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(4)


def _is_composer(path: Path) -> bool:
    if path.is_dir():
        return (path / ".metadata").is_file() and any(path.glob("*.distcp"))
    return _magic(path)[:2] == b"PK" or path.suffix in (".pt", ".pth")


_GGML = (b"lmgg", b"fmgg", b"tjgg", b"mmgg")  # ggml, ggmf, ggjt and gpt4all's ggmm, as numbers of four bytes

# Rows are asked from the last to the first: a folder of any format may hold the config.json that marks `hf`.
FORMATS: dict[str, Format] = {
    "hf": ExportFormat(
        kind="huggingface",
        title="Hugging Face",
        module=_huggingface,
        is_at=lambda path: (path / "config.json").is_file(),
        marker="config.json",
        is_run=True,
        is_base=True,
        help="safetensors, for transformers and every tool that reads them",
        dtypes=("float32", "float16", "bfloat16"),
        has_card=True,
    ),
    "composer": Format(
        kind="composer",
        title="Composer",
        module=_composer,
        is_at=_is_composer,
        marker=".metadata",
        suffix=".pt",
    ),
    "onnx": ExportFormat(
        kind="onnx",
        title="ONNX",
        module=_onnx,
        is_at=lambda path: (path / "model.onnx").is_file(),
        marker="model.onnx",
        is_run=True,
        help="for onnxruntime",
        dtypes=("float32", "float16", "int8", "int4"),
        options=("triton",),
        needs=("onnx", "onnxruntime"),
    ),
    "fastertransformer": ExportFormat(
        kind="fastertransformer",
        title="FasterTransformer",
        module=_fastertransformer,
        is_at=lambda path: (path / "config.ini").is_file() or any(path.glob("*-gpu/config.ini")),
        marker="config.ini",
        help="for FasterTransformer",
        dtypes=("float32", "float16", "bfloat16"),
        options=("tensor_parallel",),
    ),
    "gguf": ExportFormat(
        kind="gguf",
        title="GGUF",
        module=_gguf,
        is_at=lambda path: _magic(path) == b"GGUF",
        suffix=".gguf",
        is_run=True,
        is_base=True,
        help="for llama.cpp",
        dtypes=("float32", "float16", "bfloat16", "int8", "int4"),
        file="model.gguf",
        needs=("gguf",),
    ),
    "ggml": Format(
        kind="ggml",
        title="GGML",
        module=_ggml,
        is_at=lambda path: _magic(path) in _GGML,
        suffix=".bin",
    ),
}


def exports() -> dict[str, ExportFormat]:
    """The formats that are written, by the name that `--to` takes."""
    return {name: row for name, row in FORMATS.items() if isinstance(row, ExportFormat)}


def export(name: str) -> ExportFormat:
    """The row of a name after `--to`. Raises UserError for any other."""
    known = exports()
    if name not in known:
        raise UserError(f"`--to {name}` does not exist; take one of {', '.join(known)}")
    return known[name]


def check_options(options: Options) -> None:
    """Raises UserError for a dtype that the target does not have, for an option that only other targets have, and where
    what writes the target is not installed.
    """
    target = export(options.to)
    require(f"--to {options.to}", "conversion", *target.needs)
    if options.dtype not in ("auto", *target.dtypes):
        raise UserError(f"`--dtype {options.dtype}` does not exist for {options.to}; it has {', '.join(target.dtypes)}")
    defaults = {field.name: field.default for field in fields(Options) if field.default is not MISSING}
    for name, row in exports().items():
        for option in set(row.options) - set(target.options):
            if getattr(options, option) != defaults[option]:
                flag = option.replace("_", "-")
                raise UserError(f"`--{flag}` goes with --to {name}, not {options.to}")
