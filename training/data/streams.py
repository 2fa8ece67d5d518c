"""Pretraining sets: a folder or URL of MDS shards, or a mixture of several, as samples in a stateless order.

Shards behind a URL are fetched before they are needed, checked, and kept in a cache folder, whose size $MPT_CACHE_GB
limits; shards here are read in place. A mixture is JSON:
{"sources": {"name": {"path": "folder or URL", "weight": 0.3}}}.
"""

import contextlib
import logging
import math
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from mpt.bounded import parse_json, read_text
from mpt.catalog import is_offline
from mpt.errors import DamagedFile, UserError
from mpt.tokenizer import Tokenizer
from training.data import cache, hub, mds
from training.data.files import RawSet
from training.data.order import Order
from training.data.rows import Sample
from training.remote import Remote, partial_name

if TYPE_CHECKING:
    from training.data.mds import Tokens

log = logging.getLogger(__name__)

_ROWS = {"prompt", "messages", "turns"}  # columns that make a sample a row, whatever else it has
_FETCHES = 4  # at a time for a source


def is_stream(name: str) -> bool:
    """Whether --data names MDS shards or a mixture of them."""
    return "://" in name or name.endswith(".mix.json") or (Path(name).expanduser() / mds.INDEX).is_file()


def rows_of(name: str) -> "Source | None":
    """The set of shards whose samples are rows, such as prompts with responses; None where they are tokens or texts."""
    if not is_stream(name) or name.endswith(".mix.json"):
        return None
    source = Source(name)
    columns = {column for column, *_ in source.shards[0].columns}
    if "tokens" in columns or columns & {"text", *_ROWS} == {"text"}:
        source.close()
        return None
    return source


def load(name: str, tokenizer: Tokenizer, max_seq_len: int, seed: int) -> "Stream":
    """The set of a folder, a URL, or a `.mix.json` of several. Raises UserError and DamagedFile."""
    if not name.endswith(".mix.json"):
        return Stream({"data": Source(name)}, {"data": 1.0}, tokenizer, max_seq_len, seed)
    path = Path(name).expanduser()
    try:
        described = parse_json(read_text(path))["sources"]
        weights = {key: float(value["weight"]) for key, value in described.items()}
        sources = {key: Source(value["path"]) for key, value in described.items()}
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        example = '{"sources": {"name": {"path": "folder or URL", "weight": 0.3}}}'
        raise UserError(f"`{path}` is no mixture ({error!r}); it looks like {example}") from error
    if not sources or not all(weight > 0 for weight in weights.values()):
        raise UserError(f"`{path}` needs at least one source, and weights above 0")
    return Stream(sources, weights, tokenizer, max_seq_len, seed)


class Stream:
    """Samples of several sources in the order of `training/data/order.py`; a single one ends after an epoch."""

    def __init__(
        self,
        sources: Mapping[str, "Source"],
        weights: Mapping[str, float],
        tokenizer: Tokenizer,
        max_seq_len: int,
        seed: int,
    ) -> None:
        self.sources, self._tokenizer, self._max_seq_len = dict(sources), tokenizer, max_seq_len
        shards = {name: [shard.n_samples for shard in source.shards] for name, source in sources.items()}
        self.order = Order(shards, weights, seed)
        self._windows: dict[str, tuple[int, int]] = {}  # that were last read from
        self._n_cut = 0
        only = next(iter(sources.values()))
        self.n_samples: int | None = only.n_samples if len(sources) == 1 else None

    def close(self) -> None:
        """Fetch no more."""
        for source in self.sources.values():
            source.close()

    def sample(self, number: int) -> Sample:
        place = self.order.place(number)
        source = self.sources[place.source]
        if self._windows.get(place.source) != (place.epoch, place.window):
            self._windows[place.source] = place.epoch, place.window
            source.prefetch(self.order.shards(place))
        whole = source.tokens(place.number, self._tokenizer)
        tokens = whole[: self._max_seq_len]
        if len(tokens) < len(whole):
            self._n_cut += 1
            if self._n_cut == 1:
                log.warning(
                    "`%s` holds samples of %d tokens, cut at %d and their rest never read; give --max-seq-len %d, or "
                    "prepare the set with sequences of %d",
                    *(place.source, len(whole), self._max_seq_len, len(whole), self._max_seq_len),
                )
        if int(tokens.max()) >= self._tokenizer.vocab_size:
            raise UserError(
                f"`{place.source}` holds token {int(tokens.max())}, the tokenizer has {self._tokenizer.vocab_size}; "
                "the shards were made with another tokenizer"
            )
        return Sample(tokens.tolist(), [True] * len(tokens))


class Source:
    """A folder or URL of MDS shards."""

    def __init__(self, path: str) -> None:
        """Raises UserError, and `hub.NotHere` for a URL while nothing is downloaded."""
        self.path = path
        self._remote = Remote(path) if "://" in path else None
        if self._remote is not None and is_offline.get():
            raise hub.NotHere(f"`{path}` has its shards behind a URL, and --dry-run downloads nothing")
        self._limit = cache.limit()
        if self._remote is None:
            self._folder = Path(path).expanduser()
            if not (self._folder / mds.INDEX).is_file():
                raise UserError(f"`{path}` has no {mds.INDEX}; make one with `train data prepare`, or check the path")
        else:
            self._folder = cache.home() / "shards" / fsspec.utils.tokenize(path)[:16]
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remote.get(mds.INDEX, self._folder / mds.INDEX)
        index = self._folder / mds.INDEX
        self.shards = mds.read_index(read_text(index), str(index))
        self._ends = np.cumsum([shard.n_samples for shard in self.shards])
        self.n_samples = int(self._ends[-1]) if self.shards else 0
        if not self.n_samples:
            raise UserError(f"`{path}` holds no samples")
        self._open: dict[int, mds.Shard] = {}
        self._lock = threading.Lock()
        self._fetches: dict[int, Future[Path]] = {}
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="shards") if self._remote is not None else None

    def close(self) -> None:
        """Fetch no more."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch these shards, in this order; those that lie here already cost nothing."""
        if self._pool is not None:
            with self._lock:
                for which in shards:
                    if which not in self._open and which not in self._fetches:
                        self._fetches[which] = self._pool.submit(self._fetch, which)

    def tokens(self, number: int, tokenizer: Tokenizer | None = None) -> "Tokens":
        """One sample's tokens; a set of texts is tokenized as it is read."""
        which = int(np.searchsorted(self._ends, number, side="right"))
        within = number - int(self._ends[which]) + self.shards[which].n_samples
        shard = self._shard(which)
        columns = {name: encoding for name, encoding, _ in self.shards[which].columns}
        if "tokens" in columns:
            found: Any = shard.column(within, "tokens")
            if isinstance(found, bytes):  # llm-foundry wrote int64 this way before streaming had arrays
                found = np.frombuffer(found, np.int64)
            return found.astype(np.int32, copy=False)
        if tokenizer is None:
            raise UserError(f"`{self.path}` holds texts; name a tokenizer")
        ids = [*tokenizer.encode(shard.column(within, "text")), tokenizer.eos_id]
        return np.array(ids, dtype=np.int32)

    def raw_set(self) -> RawSet:
        """The samples as rows. The index decides what they are, and here the shards too."""
        here = [] if self._remote is not None else [self._folder / shard.file for shard in self.shards]
        return RawSet([self._folder / mds.INDEX, *here], self._rows, made_by=f"samples of {self.path}")

    def _rows(self) -> Iterator[tuple[str, Any]]:
        for which, info in enumerate(self.shards):
            self.prefetch(range(which, min(which + _FETCHES, len(self.shards))))
            shard = self._shard(which)
            for number in range(info.n_samples):
                yield f"`{info.file}` sample {number + 1}", shard.row(number)

    def _shard(self, which: int) -> mds.Shard:
        """A shard, fetched, checked and opened when it is first asked for."""
        with self._lock:
            if which in self._open:
                return self._open[which]
            fetch = self._fetches.get(which)
        path = self._fetch(which) if fetch is None else fetch.result()
        with self._lock:
            self._fetches.pop(which, None)
            self._open[which] = mds.Shard(path, self.shards[which])
            if self._remote is not None and self._limit < math.inf:
                path.touch()
                self._make_room(which)
            return self._open[which]

    def _make_room(self, opened: int) -> None:
        """Remove the fetched shards that were opened longest ago until the cache is within its limit.

        What is still to be read of this window stays. Another process that reads a removed one keeps it: it is mapped.
        """
        needed = {opened, *self._fetches}
        found: list[tuple[float, int, Path, int]] = []
        for which, shard in enumerate(self.shards):
            for name in {shard.file, _plain_name(shard)}:
                with contextlib.suppress(FileNotFoundError):
                    status = (self._folder / name).stat()
                    found.append((status.st_mtime, status.st_size, self._folder / name, which))
        used = sum(size for _, size, _, _ in found)
        for _, size, path, which in sorted(found):
            if used <= self._limit:
                return
            if which not in needed:
                path.unlink(missing_ok=True)
                self._open.pop(which, None)
                used -= size

    def _fetch(self, which: int) -> Path:
        info = self.shards[which]
        stored = self._folder / info.file
        plain = self._folder / _plain_name(info)
        if plain.is_file() and (info.compression or self._remote is not None):
            return plain  # checked when it came
        if self._remote is not None and not stored.is_file():
            self._remote.get(info.file, stored, lambda copy: mds.verify(copy, info))
        if not stored.is_file():
            raise DamagedFile(f"`{stored}` is in the index and not there; copy the folder again")
        if self._remote is None:
            mds.verify(stored, info)
        if info.compression:
            _decompress(stored, plain, info)
        return plain


# Each with the ending of its files and the name of pyarrow's codec. `bz2` is the standard library's.
_SNAPPY_MOST = 22  # times as large: a copy of 64 bytes takes 3
_COMPRESSIONS = {"zstd": "zstd", "br": "brotli", "gz": "gzip", "snappy": "snappy", "bz2": "bz2"}


def _plain_name(info: mds.ShardInfo) -> str:
    """A shard's file without the ending of its compression."""
    return info.file.removesuffix(f".{_kind(info)}") if info.compression else info.file


def _kind(info: mds.ShardInfo) -> str:
    return (info.compression or "").partition(":")[0]  # behind the colon is the level


def _decompress(stored: Path, plain: Path, info: mds.ShardInfo) -> None:
    """Raises UserError for a compression that is not read, DamagedFile for a file that is none."""
    kind = _kind(info)
    if kind not in _COMPRESSIONS:
        known = ", ".join(_COMPRESSIONS)
        raise UserError(f"`{stored.name}` is compressed with `{info.compression}`; supported: {known}")
    import pyarrow

    partial = partial_name(plain)
    try:
        if kind == "snappy":  # one block, which a stream cannot read, and which is made whole in memory
            if (info.n_plain_bytes or 0) > _SNAPPY_MOST * stored.stat().st_size:
                raise DamagedFile(f"`{stored}` cannot unpack to the {info.n_plain_bytes} bytes that its index says")
            data = pyarrow.Codec("snappy").decompress(stored.read_bytes(), info.n_plain_bytes, asbytes=True)
            partial.write_bytes(data)
        else:
            with (
                pyarrow.CompressedInputStream(str(stored), _COMPRESSIONS[kind]) as source,
                partial.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        if info.n_plain_bytes is not None and partial.stat().st_size != info.n_plain_bytes:
            raise DamagedFile(
                f"`{stored}` unpacks to {partial.stat().st_size} bytes, the index says {info.n_plain_bytes}"
            )
        partial.replace(plain)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedFile(f"`{stored}` cannot be unpacked ({error}); copy it again") from error
    finally:
        partial.unlink(missing_ok=True)
