"""Rows of files: JSON, CSV, Parquet, Arrow and plain text, compressed or not; of folders, and sets of the hub.

A row that cannot be read is an `Unreadable` in its place, so that one bad byte costs its own line and no other.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from mpt.errors import MachineRefused, UserError
from mpt.extras import install
from mpt.memory import memory

FILES = (".jsonl", ".json", ".txt", ".parquet", ".csv", ".tsv", ".arrow")
PACKED = (".gz", ".zst", ".bz2", ".xz")
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what `datasets` puts beside
_LINE_BYTES = 64_000_000  # of a row; a book has 1 MB
_HUB = "hub:"
# Of a file's first bytes; UTF-32's begins as UTF-16's does, so it is asked first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_NOT_UTF_8 = re.compile("[\udc80-\udcff]")  # how Python's `surrogateescape` keeps a byte that is no UTF-8
_LISTS = ("data", "rows", "train", "examples")  # the key of an object that a .json file's rows stand under
_BATCH = 1024  # rows of a table that are made Python's at a time


class Document(NamedTuple):
    """A whole .txt file."""

    text: str


class Unreadable(NamedTuple):
    """What stands where a row should, and why it is none."""

    reason: str


@dataclass(frozen=True)
class RawSet:
    """A set's files, whose content decides what its rows are, and its rows as `raw_rows` gives them."""

    files: Sequence[Path]
    make: Callable[[], Iterator[tuple[str, Any]]] | None = None  # where they are made of the files' rows
    made_by: str = ""  # what `make` is, and what it depends on beside the files

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Raises UserError for a file that cannot be read."""
        if self.make is not None:
            return self.make()
        return (row for path in self.files for row in raw_rows(path))

    def parsed(self) -> Iterator[tuple[str, Any]]:
        return (parsed(where, raw) for where, raw in self.rows())


def documents(sources: Sequence[str], text_key: str = "text") -> Iterator[dict[str, Any]]:
    """Every document of the sources, each with a text under `text_key`; a .txt file is one. Raises UserError."""
    for source in sources:
        for where, row in rows(source):
            if isinstance(row, Unreadable):
                raise UserError(f"{where}: {row.reason}")
            if isinstance(row, Document | str):
                row = {text_key: row.text if isinstance(row, Document) else row}
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{where}: no text under `{text_key}`, it has {has}; name the key with --text-key")
            yield row


def rows(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, a folder or a hub set, each with where it stands; a .txt file is one `Document`.

    What is no row comes as `Unreadable`. Raises UserError for a file that cannot be read.
    """
    if source.startswith(_HUB):
        yield from _hub_rows(source.removeprefix(_HUB))
        return
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if kind(file) in FILES and file.name not in _NO_ROWS)
        if not inside:
            raise UserError(f"`{path}` holds no file ending in {', '.join(FILES)} (also {', '.join(PACKED)})")
        for file in inside:
            yield from rows(str(file))
        return
    if not path.is_file():
        raise UserError(f"`{path}` does not exist; give a file, a folder or `hub:owner/name`")
    yield from (parsed(where, raw) for where, raw in raw_rows(path))


def raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, where a line of JSON is still its bytes: `parsed` reads it, in another process if need be.

    Raises UserError for a file that cannot be read.
    """
    ending = kind(path)
    try:
        if ending in (".parquet", ".arrow"):
            yield from _table_rows(path, ending)
            return
        if ending not in FILES:
            raise UserError(
                f"`{path}` ends in `{path.suffix}`; supported: {', '.join(FILES)}, also with {', '.join(PACKED)}"
            )
        with closing(_opened(path)) as file:
            yield from _text_rows(path, ending, _lines(file, path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
        raise UserError(f"`{path}` cannot be read: {error}") from error


def parsed(where: str, raw: Any) -> tuple[str, Any]:
    """A row of `raw_rows`, read."""
    if not isinstance(raw, bytes):
        return where, raw
    try:
        return where, json.loads(raw)
    except UnicodeDecodeError as error:
        return where, Unreadable(f"byte 0x{raw[error.start]:02x} at {error.start + 1} is not UTF-8")
    except ValueError as error:
        return where, Unreadable(f"it is not JSON ({error})")
    except RecursionError:
        return where, Unreadable("its JSON is nested too deeply")


def kind(path: Path) -> str:
    """The ending that says what is inside, compression aside."""
    return Path(_unpacked(path.name)).suffix


def stem(source: str) -> str:
    """A source's name without its folder and the endings read here: `my.v2` of `sets/my.v2.jsonl.gz`."""
    name = _unpacked(source.rstrip("/").rpartition("/")[2]).replace(":", "-")  # a colon names a split
    for ending in (".mix.json", *FILES):
        if name != ending and name.endswith(ending):
            return name.removesuffix(ending)
    return name


def _unpacked(name: str) -> str:
    return next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name)


def _text_rows(path: Path, ending: str, lines: Iterator[bytes]) -> Iterator[tuple[str, Any]]:
    if ending == ".txt":
        yield f"`{path.name}`", _document(_joined(lines, path))
    elif ending in (".csv", ".tsv"):
        yield from _csv_rows(path.name, lines, "\t" if ending == ".tsv" else ",")
    elif ending == ".json":
        yield from _json_rows(path.name, _joined(lines, path))
    else:
        yield from _json_lines(path.name, lines)


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines in UTF-8, without a byte order mark; a file that begins with UTF-16's or UTF-32's is read as that."""
    lines = _bounded(file, path)
    first = next(lines, b"")
    if encoding := next((name for mark, name in _MARKS.items() if first.startswith(mark)), None):
        rest = io.BytesIO(first + _joined(lines, path))
        yield from (line.encode() for line in io.TextIOWrapper(rest, encoding, newline=""))
        return
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from lines


def _bounded(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines as they are. Raises UserError for one that no row has: a packed file of 10 MB may hold one of 10 GB."""
    n = 0
    while line := file.readline(_LINE_BYTES + 1):
        n += 1
        if len(line) > _LINE_BYTES:
            raise UserError(f"`{path}` line {n} is longer than the {_LINE_BYTES} bytes that a row may have; cut it up")
        yield line


def _joined(lines: Iterable[bytes], path: Path) -> bytes:
    """All of a file that is read whole. Raises MachineRefused where a third of the free memory does not hold it."""
    found = bytearray()
    free = memory()
    for line in lines:
        found += line
        if len(found) > free.free / 3:
            raise MachineRefused(
                f"`{path}` is read whole, and is more than a third of the {free}; give it as .jsonl, a row a line"
            )
    return bytes(found)


def _json_lines(name: str, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    yield from ((f"`{name}` line {n}", line) for n, line in enumerate(lines, 1) if line.strip())


def _json_rows(name: str, data: bytes) -> Iterator[tuple[str, Any]]:
    """A list of rows, also under a key of an object; a row; or lines of JSON."""
    _, found = parsed(name, data)
    if isinstance(found, Unreadable) and not data.lstrip().startswith(b"["):
        yield from _json_lines(name, data.splitlines(keepends=True))
        return
    if isinstance(found, Unreadable):
        raise UserError(f"`{name}`: {found.reason}")
    if isinstance(found, dict):
        found = next((found[key] for key in _LISTS if isinstance(found.get(key), list)), [found])
    if not isinstance(found, list):
        raise UserError(f"`{name}` holds a {type(found).__name__}; a list of rows, or a row a line, is needed")
    yield from ((f"`{name}` row {n}", row) for n, row in enumerate(found, 1))


def _csv_rows(name: str, lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table with the names of its columns on top."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 131,072 characters by itself; an answer may be longer
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for line in lines), delimiter=delimiter)
    names: list[str] | None = None
    while True:
        where = f"`{name}` line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield where, Unreadable(f"it is no CSV ({error})")
            continue
        if fields is None:
            return
        if not any(fields):
            continue
        if names is None:
            names = [field.strip() for field in fields]
        elif len(fields) != len(names):
            yield where, Unreadable(f"it has {len(fields)} fields, the header has {len(names)}")
        elif bad := _NOT_UTF_8.search("".join(fields)):
            yield where, Unreadable(f"byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8")
        else:
            yield where, dict(zip(names, fields, strict=True))


def _document(data: bytes) -> Document | Unreadable:
    try:
        return Document(data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Unreadable(f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8")


def _table_rows(path: Path, ending: str) -> Iterator[tuple[str, Any]]:
    import pyarrow

    try:
        n = 0
        for batch in _table_batches(path, ending):
            for row in batch.to_pylist():
                n += 1
                yield f"`{path.name}` row {n}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"`{path}` is no {ending.removeprefix('.')} file: {error}") from error


def _table_batches(path: Path, ending: str) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if ending == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH)
        return
    with pyarrow.memory_map(str(path)) as file:
        try:
            batches = iter(pyarrow.ipc.open_stream(file))  # as `save_to_disk` of `datasets` writes
        except pyarrow.ArrowInvalid:
            whole = pyarrow.ipc.open_file(file)
            batches = (whole.get_batch(n) for n in range(whole.num_record_batches))
        for batch in batches:
            yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]  # which reads bytes like the others
    if path.suffix == ".bz2":
        return bz2.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        import zstandard

        # Across frames, since `zstd` writes several where it works on several cores.
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return io.BufferedReader(stream)
    return path.open("rb")


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"hub sets need datasets; {install('data')}, or download the files and name them") from error
    try:
        found = load_dataset(name, split="train", streaming=True)
        for n, row in enumerate(found, 1):
            yield f"`{name}` row {n}", dict(row)
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise UserError(f"`{name}` cannot be read from the hub: {str(error).splitlines()[0]}") from error
