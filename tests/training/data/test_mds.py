"""Shards are mosaicml-streaming's byte for byte, and what was written comes back; damage is found."""

import bz2
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard

from mpt.catalog import resolve
from mpt.errors import DamagedFile, UserError
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data import mds, streams
from training.data.streams import Source

# Of the files that mosaicml-streaming 0.13.0's MDSWriter made from `samples()` with
# columns={"tokens": "ndarray:int32"}, hashes=["sha256"], size_limit=4096, on 2026-11-21.
STREAMINGS = {
    "index.json": "265c09e3461f7c1f74c3f3e7e6ccaddc9c8381138ad2dcdd8b976405ffd1266c",
    "shard.00000.mds": "b2d708f1ac9595eedb574f67bedadfff8e528a7c93893afc56ef9633c192487e",
    "shard.00001.mds": "aeb360076650bd75c27cbf8a030ffd28a7d79fbc0bf2069c3333f5e5948cdd32",
    "shard.00002.mds": "8c29ffa0739b88a8f246b1969ed3d8f6d188b1a2d2d94f166439e0aec1619fcf",
}


def samples() -> list[mds.Tokens]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50000, n).astype(np.int32) for n in (5, 255, 256, 700, 64, 3, 900, 1, 31)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert mds.write(tmp_path / "shards", samples(), 4096) == 9
    return tmp_path / "shards"


def test_the_files_are_those_streaming_writes(folder: Path) -> None:
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()} == STREAMINGS


def test_samples_come_back_across_shards(folder: Path) -> None:
    source = Source(str(folder))
    assert source.n_samples == 9 and len(source.shards) == 3
    for number, expected in enumerate(samples()):
        assert np.array_equal(source.tokens(number), expected)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstandard.compress,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "br": lambda data: pyarrow.compress(data, "brotli", asbytes=True),
    "snappy": lambda data: pyarrow.compress(data, "snappy", asbytes=True),
}


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_shards_are_read(folder: Path, kind: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        name = shard["raw_data"]["basename"]
        packed = PACKERS[kind]((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / f"{name}.{kind}").write_bytes(packed)
        shard["compression"] = kind if kind == "snappy" else f"{kind}:3"
        hashes = {"sha256": hashlib.sha256(packed).hexdigest()}
        shard["zip_data"] = {"basename": f"{name}.{kind}", "bytes": len(packed), "hashes": hashes}
    (folder / "index.json").write_text(json.dumps(index))
    source = Source(str(folder))
    assert all(np.array_equal(source.tokens(n), expected) for n, expected in enumerate(samples()))


@pytest.mark.parametrize(("kind", "message"), [("gz", "cannot be unpacked"), ("lz4", "supported: zstd, br, gz")])
def test_a_shard_that_cannot_be_unpacked_leaves_nothing(folder: Path, kind: str, message: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    shard = index["shards"][0]
    (folder / f"shard.00000.mds.{kind}").write_bytes(b"no such thing")
    shard["compression"] = f"{kind}:3"
    shard["zip_data"] = {"basename": f"shard.00000.mds.{kind}", "bytes": 13, "hashes": {}}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "shard.00000.mds").unlink()
    with pytest.raises((DamagedFile, UserError), match=message):
        Source(str(folder)).tokens(0)
    assert not (folder / "shard.00000.mds").exists() and not list(folder.glob("*.partial"))


def test_a_flipped_bit_is_found_when_the_shard_is_opened(folder: Path) -> None:
    path = folder / "shard.00001.mds"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    source = Source(str(folder))
    assert np.array_equal(source.tokens(0), samples()[0])
    with pytest.raises(DamagedFile, match=r"shard\.00001\.mds.*sha256"):
        source.tokens(3)  # 700 tokens do not fit beside 5, 255 and 256


def shard_of(tmp_path: Path, columns: list[tuple[str, str, int | None]], values: list[bytes]) -> Source:
    """A shard of one sample by hand, from the format's description."""
    sizes = np.array([len(v) for v, (*_, size) in zip(values, columns, strict=True) if size is None], np.uint32)
    sample = sizes.tobytes() + b"".join(values)
    start = 4 + 8 + 2
    data = np.uint32(1).tobytes() + np.array([start, start + len(sample)], np.uint32).tobytes() + b"{}" + sample
    (tmp_path / "shard.00000.mds").write_bytes(data)
    names, encodings, fixed = zip(*columns, strict=True)
    index = {
        "samples": 1, "format": "mds", "compression": None, "zip_data": None, "column_names": names,
        "column_encodings": encodings, "column_sizes": fixed,
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}},
    }  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [index]}))
    return Source(str(tmp_path))


def test_older_sets_hold_int64_bytes_and_texts(tmp_path: Path) -> None:
    old = shard_of(tmp_path, [("tokens", "bytes", None)], [np.array([7, 50000], np.int64).tobytes()])
    assert old.tokens(0).tolist() == [7, 50000]
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    texts = shard_of(tmp_path, [("id", "int", 8), ("text", "str", None)], [np.int64(3).tobytes(), b"One day"])
    assert texts.tokens(0, tokenizer).tolist() == [*tokenizer.encode("One day"), tokenizer.eos_id]


@pytest.mark.parametrize("encoding", ["str", "bytes"])
def test_prompts_with_responses_are_finetuning_rows(tmp_path: Path, encoding: str) -> None:
    """As LLM Foundry's convert_finetuning_dataset stores them; older versions of it stored bytes."""
    shard_of(tmp_path, [("prompt", encoding, None), ("response", encoding, None)], ["Zwölf?".encode(), b"12"])
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    data = datasets.load(str(tmp_path), tokenizer, "none", 100, 0)
    assert data.sample(0).ids == [*tokenizer.encode("Zwölf?"), *tokenizer.encode("12"), tokenizer.eos_id]
    assert data.sample(0).learned == [False] * len(tokenizer.encode("Zwölf?")) + [True] * len(
        [*tokenizer.encode("12"), tokenizer.eos_id]
    )
    assert datasets.style_of(str(tmp_path))[0] == "instruct"


def test_what_is_no_index_and_a_wrong_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train data prepare"):
        Source(str(tmp_path))
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    with pytest.raises(UserError, match="another tokenizer"):
        streams.load(str(folder), tokenizer, 2048, seed=0).sample(0)
    (folder / "index.json").write_text('{"shards": [{}]}')
    with pytest.raises(DamagedFile, match="no index"):
        Source(str(folder))
