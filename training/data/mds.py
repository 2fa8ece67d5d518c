"""MDS shards: the on-disk format of mosaicml-streaming, written byte for byte as it writes them.

A folder holds `index.json` and shards. A shard is uint32 n, n + 1 uint32 offsets from its beginning, the writer's
configuration as JSON, then the samples: uint32 sizes of the columns that vary, and the columns' bytes in the order of
their names. An `ndarray:int32` is a byte (dimensions << 2 | log2 of the shape's item size), the shape, the values.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpt.bounded import parse_json
from mpt.errors import DamagedFile, UserError

INDEX = "index.json"
SHARD_BYTES = 1 << 26  # streaming's own limit
_HASH = "sha256"
_SHAPE_TYPES = (np.uint8, np.uint16, np.uint32, np.uint64)
_SCALARS = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"}
Tokens = np.ndarray[Any, np.dtype[np.int32]]


def write(folder: Path, samples: Iterable[Tokens], shard_bytes: int = SHARD_BYTES) -> int:
    """Write int32 arrays as the column `tokens` of a folder; their number. The index is written last."""
    config = {
        "version": 2, "format": "mds", "compression": None, "hashes": [_HASH], "size_limit": shard_bytes,
        "column_names": ["tokens"], "column_encodings": ["ndarray:int32"], "column_sizes": [None],
    }  # fmt: skip
    header = json.dumps(config, sort_keys=True).encode()
    shards: list[dict[str, Any]] = []
    held: list[bytes] = []
    empty = 8 + len(header)  # bytes of a shard without samples
    size = empty
    n = 0

    def flush() -> None:
        offsets = np.cumsum([0, *map(len, held)]).astype(np.uint32) + np.uint32(4 + 4 * (len(held) + 1) + len(header))
        data = np.uint32(len(held)).tobytes() + offsets.tobytes() + header + b"".join(held)
        name = f"shard.{len(shards):05d}.mds"
        (folder / name).write_bytes(data)
        raw = {"basename": name, "bytes": len(data), "hashes": {_HASH: hashlib.sha256(data).hexdigest()}}
        shards.append({"samples": len(held), "raw_data": raw, "zip_data": None, **config})

    folder.mkdir(parents=True, exist_ok=True)
    for tokens in samples:
        sample = encode(tokens)
        if held and size + len(sample) + 4 > shard_bytes:
            flush()
            held, size = [], empty
        held.append(sample)
        size += len(sample) + 4
        n += 1
    if held:
        flush()
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    return n


def encode(tokens: Tokens) -> bytes:
    """One sample of the column `tokens`."""
    width = next(n for n in range(4) if len(tokens) < 1 << (8 << n))
    shape = np.array(tokens.shape, dtype=_SHAPE_TYPES[width])
    array = bytes([1 << 2 | width]) + shape.tobytes() + tokens.astype("<i4", copy=False).tobytes()
    return np.uint32(len(array)).tobytes() + array


@dataclass(frozen=True)
class ShardInfo:
    """What index.json says of one shard."""

    n_samples: int
    file: str  # as stored, compressed or not
    n_bytes: int
    hashes: dict[str, str]
    compression: str | None
    columns: tuple[tuple[str, str, int | None], ...]  # name, encoding, bytes where they do not vary
    n_plain_bytes: int | None = None  # unpacked, where the index says it


def read_index(text: str, where: str) -> list[ShardInfo]:
    """The shards of a folder. Raises DamagedFile for what is no MDS index."""
    try:
        found = []
        for shard in parse_json(text)["shards"]:
            stored = shard["zip_data"] or shard["raw_data"]
            columns = zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True)
            if shard["format"] != "mds" or Path(stored["basename"]).name != stored["basename"]:
                raise ValueError(f"a shard has format {shard['format']} and file {stored['basename']}")
            found.append(
                ShardInfo(
                    shard["samples"], stored["basename"], stored["bytes"], stored["hashes"],
                    shard["compression"] if shard["zip_data"] else None, tuple(columns),
                    (shard.get("raw_data") or {}).get("bytes"),
                )
            )  # fmt: skip
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"`{where}` is no index of MDS shards ({error}); write the folder again") from error


def verify(path: Path, info: ShardInfo) -> None:
    """Compare a shard file with the index. Raises DamagedFile."""
    size = path.stat().st_size
    if size != info.n_bytes:
        raise DamagedFile(f"`{path}` has {size} bytes, the index says {info.n_bytes}; copy it again")
    for name, expected in info.hashes.items():
        if name in hashlib.algorithms_available:
            with path.open("rb") as file:
                if hashlib.file_digest(file, name).hexdigest() != expected:
                    raise DamagedFile(f"`{path}` does not match its {name} in the index; copy it again")


class Shard:
    """The samples of one uncompressed shard file, mapped into memory."""

    def __init__(self, path: Path, info: ShardInfo) -> None:
        self._bytes = np.memmap(path, np.uint8, "r")
        self._info = info
        n = int(self._bytes[:4].view(np.uint32)[0])
        if n != info.n_samples:
            raise DamagedFile(f"`{path}` holds {n} samples, the index says {info.n_samples}; copy it again")
        self._offsets = self._bytes[4 : 4 + 4 * (n + 1)].view(np.uint32)

    def column(self, number: int, name: str) -> Any:
        """One column of one sample: an array, str, bytes, number or JSON value."""
        data = self._bytes[int(self._offsets[number]) : int(self._offsets[number + 1])]
        n_varying = sum(size is None for *_, size in self._info.columns)
        varying = iter(data[: 4 * n_varying].view(np.uint32).tolist())
        at = 4 * n_varying
        for found, encoding, size in self._info.columns:
            size = next(varying) if size is None else size
            if found == name:
                return _decode(encoding, data[at : at + size])
            at += size
        raise UserError(f"the shards have no column `{name}`; they have {', '.join(c[0] for c in self._info.columns)}")

    def row(self, number: int) -> dict[str, Any]:
        """All columns of one sample; bytes are text in UTF-8, as LLM Foundry stored prompts."""
        row = {}
        for name, *_ in self._info.columns:
            value = self.column(number, name)
            row[name] = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        return row


def _decode(encoding: str, data: Any) -> Any:
    kind, _, detail = encoding.partition(":")
    if kind == "ndarray":
        return _decode_array(detail, data)
    raw = data.tobytes()
    if kind == "str":
        return raw.decode("utf-8")
    if kind == "bytes":
        return raw
    if kind == "int":
        return int(np.frombuffer(raw, np.int64)[0])
    if kind == "json":
        return json.loads(raw)
    if kind in _SCALARS:
        return np.frombuffer(raw, kind)[0].item()
    raise UserError(f"a column has the encoding `{encoding}`; known: ndarray, str, bytes, int, json and plain numbers")


def _decode_array(detail: str, data: Any) -> Any:
    name, _, fixed = detail.partition(":")
    if not name:
        raise UserError("an ndarray column names no type; write it as `ndarray:int32`")
    if fixed:
        return data.view(name).reshape([int(n) for n in fixed.split(",")])
    n_dimensions, width = int(data[0]) >> 2, int(data[0]) & 3
    end = 1 + n_dimensions * (1 << width)
    shape = np.frombuffer(data[1:end].tobytes(), _SHAPE_TYPES[width])
    return np.frombuffer(data[end:].tobytes(), name).reshape(shape.tolist())
