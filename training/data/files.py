"""Rows of files: .jsonl, .json, .txt and .parquet, also .gz and .zst, folders of them, and sets of the hub."""

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mpt.errors import UserError

FILES = (".jsonl", ".json", ".txt", ".parquet")
_HUB = "hub:"


def documents(sources: Sequence[str], text_key: str = "text") -> Iterator[dict[str, Any]]:
    """Every document of the sources, each with a text under `text_key`; a .txt file is one. Raises UserError."""
    for source in sources:
        for where, row in rows(source):
            if isinstance(row, str):
                row = {text_key: row}
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{where}: no text under `{text_key}`, it has {has}; name the key with --text-key")
            yield row


def rows(source: str, is_strict: bool = True) -> Iterator[tuple[str, Any]]:
    """The rows of a file, a folder or a hub set, each with where it stands; of a .txt file its whole text.

    A line that is not JSON raises UserError, or comes as its text where is_strict is False.
    """
    if source.startswith(_HUB):
        yield from _hub_rows(source.removeprefix(_HUB))
        return
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if kind(file) in FILES)
        if not inside:
            raise UserError(f"`{path}` holds no file ending in {', '.join(FILES)} (also .gz, .zst)")
        for file in inside:
            yield from rows(str(file), is_strict)
        return
    if not path.is_file():
        raise UserError(f"`{path}` does not exist; give a file, a folder or `hub:owner/name`")
    try:
        yield from _file_rows(path, is_strict)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {error}") from error


def kind(path: Path) -> str:
    """The ending that says what is inside, compression aside."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix


def stem(source: str) -> str:
    """A source's name without its folder and the endings read here: `my.v2` of `sets/my.v2.jsonl.gz`."""
    name = source.rstrip("/").rpartition("/")[2].removesuffix(".gz").removesuffix(".zst")
    for ending in (".mix.json", *FILES):
        if name != ending and name.endswith(ending):
            return name.removesuffix(ending)
    return name


def _file_rows(path: Path, is_strict: bool) -> Iterator[tuple[str, Any]]:
    ending = kind(path)
    if ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(path)
            n = 0
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    n += 1
                    yield f"`{path.name}` row {n}", row
        except pyarrow.ArrowException as error:
            raise UserError(f"`{path}` is no parquet file: {error}") from error
        return
    if ending not in FILES:
        raise UserError(f"`{path}` ends in `{path.suffix}`; supported: {', '.join(FILES)}, also with .gz or .zst")
    with _opened(path) as file:
        if ending == ".txt":
            yield f"`{path.name}`", file.read()
            return
        if ending == ".json":
            whole = file.read()
            if whole.lstrip().startswith("["):
                for n, row in enumerate(_parsed(whole, f"`{path.name}`"), 1):
                    yield f"`{path.name}` row {n}", row
                return
            file = io.StringIO(whole)
        for n, line in enumerate(file, 1):
            if line.strip():
                where = f"`{path.name}` line {n}"
                try:
                    yield where, _parsed(line, where)
                except UserError:
                    if is_strict:
                        raise
                    yield where, line


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        import zstandard

        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb")), encoding="utf-8")
    return path.open(encoding="utf-8")


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("hub sets need `pip install datasets`; or download the files and name them") from error
    try:
        found = load_dataset(name, split="train", streaming=True)
        for n, row in enumerate(found, 1):
            yield f"`{name}` row {n}", dict(row)
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise UserError(f"`{name}` cannot be read from the hub: {str(error).splitlines()[0]}") from error
