"""From documents to training samples: joined, filtered, the same whatever the number of processes."""

import datetime
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mpt.catalog import resolve
from mpt.errors import DamagedFile, MachineRefused, UserError
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data import mds, streams
from training.data.filters import Duplicates, mc4, s2orc
from training.data.prepare import prepare
from training.data.streams import Source

TEXTS = ["One day the rain came.", "", "A second document, longer than the first.", "Zwölf Böller", "One day"] * 3


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve("mpt-tiny")


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_samples_are_the_documents_joined_by_end_of_text(tmp_path: Path, tiny: Path, tokenizer: Tokenizer) -> None:
    source = jsonl(tmp_path / "texts.jsonl", TEXTS)
    found = prepare([str(source)], tmp_path / "out", tiny, 16)
    joined = [token for text in TEXTS if text for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    shards = Source(str(tmp_path / "out"))
    read = [token for n in range(shards.n_samples) for token in shards.tokens(n).tolist()]
    assert read == joined[: len(joined) // 16 * 16]
    assert (found.n_documents, found.n_kept, found.dropped) == (15, 12, {"empty": 3})
    assert (found.n_tokens, found.n_samples) == (len(joined), len(joined) // 16)


def test_the_number_of_processes_changes_nothing(tmp_path: Path, tiny: Path) -> None:
    words = [f"word{n}x" for n in range(400)]
    near = [" ".join(words[n : n + 300]) for n in (0, 0, 1, 90, 91, 2)]  # the second is the first, others nearly
    texts = [*near, *(f"{text} {n}" for n, text in enumerate(TEXTS * 20)), *(" ".join(words[:n]) for n in (250, 299))]
    source = jsonl(tmp_path / "texts.jsonl", texts)
    for n in (1, 2):
        found = prepare(
            [str(source)], tmp_path / str(n), tiny, 32, n_processes=n, quality="mc4", language="any", duplicates=0.7
        )
        # By hand: 295 of the 297 runs of five words are shared by the first and the third, 206 of 386 by the first and
        # the fourth. All short ones go by the rules.
        duplicates = (found.dropped.pop("duplicate"), found.dropped.pop("near duplicate"))
        assert (found.n_kept, *duplicates) == (2, 1, 5) and sum(found.dropped.values()) == 300
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("1", "2"))
    assert one == two


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, tiny: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.jsonl").write_text(lines)
    made = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "folder"):
        prepare([str(tmp_path / name)], tmp_path / f"out-{name}", tiny, 16)
        made.append((tmp_path / f"out-{name}" / "shard.00000.mds").read_bytes())
    assert all(data == made[0] for data in made)


def test_a_set_behind_a_url_is_fetched_a_shard_at_a_time(
    tmp_path: Path, tiny: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPT_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "made"
    prepare([str(jsonl(tmp_path / "texts.jsonl", TEXTS))], made, tiny, 16)
    store = fsspec.filesystem("memory")
    store.put(str(made), "/sets/here", recursive=True)
    here = Source(str(made))
    there = datasets.load("memory://sets/here", tokenizer, "none", 2048, seed=5)
    assert there.n_samples == here.n_samples
    found = sorted(tuple(there.sample(n).ids) for n in range(here.n_samples))
    assert found == sorted(tuple(here.tokens(n).tolist()) for n in range(here.n_samples))
    store.pipe("/sets/bad/shard.00000.mds", b"x" + store.cat("/sets/here/shard.00000.mds")[1:])
    store.pipe("/sets/bad/index.json", store.cat("/sets/here/index.json"))
    with pytest.raises(DamagedFile, match="sha256"):
        datasets.load("memory://sets/bad", tokenizer, "none", 2048, seed=5).sample(0)
    assert len(list((tmp_path / "cache").rglob("*.mds"))) == 1  # the good one: a bad copy is never under its name
    assert not list((tmp_path / "cache").rglob("*.partial"))
    with pytest.raises(UserError, match=r"index\.json"):
        datasets.load("memory://sets/nowhere", tokenizer, "none", 2048, seed=5)


def test_a_mixture_reads_its_sources_by_weight(tmp_path: Path, tiny: Path, tokenizer: Tokenizer) -> None:
    for name, text in (("rain", "rain " * 400), ("sun", "sun " * 400)):
        prepare([str(jsonl(tmp_path / f"{name}.jsonl", [text]))], tmp_path / name, tiny, 16)
    mixture = tmp_path / "two.mix.json"
    described = {n: {"path": str(tmp_path / n), "weight": w} for n, w in (("rain", 3), ("sun", 1))}
    mixture.write_text(json.dumps({"sources": described}))
    data = datasets.load(str(mixture), tokenizer, "none", 2048, seed=0)
    assert data.n_samples is None
    n_rain = sum("rain" in tokenizer.decode(data.sample(n).ids) for n in range(400))
    assert abs(n_rain / 400 - 0.75) < 0.07
    mixture.write_text('{"sources": {"a": {"path": "x"}}}')
    with pytest.raises(UserError, match="looks like"):
        streams.load(str(mixture), tokenizer, 2048, 0)


def test_nothing_half_written_stays(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "texts.jsonl", TEXTS)
    with pytest.raises(UserError, match="not one sample of 4096"):
        prepare([str(source)], tmp_path / "out", tiny, 4096)
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(UserError, match="line 2: no text under `text`"):
        prepare([str(tmp_path / "bad.jsonl")], tmp_path / "out", tiny, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.data.mds.write", full)
    with pytest.raises(MachineRefused, match="No space"):
        prepare([str(source)], tmp_path / "out", tiny, 16)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


WORDS = [f"word{n}x" for n in range(1000)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" ".join(WORDS), None),
        (" ".join(WORDS[:150]), "under 200 or over 50,000 words"),
        (" ".join("w!!!!" for _ in range(300)), "most common character is no letter"),
        (" ".join(f"aaa{n}!" for n in range(300)), "under 92 % letters and digits"),
        (" ".join(WORDS + ["word"] * 100), "one word too common"),  # 100 of 1,100
        (" ".join(WORDS[:300] + ["word"] * 100), None),  # a quarter, in a text of up to 500 words
        ("", "empty"),
    ],
)
def test_the_rules_for_mc4(text: str, reason: str | None) -> None:
    assert mc4(text, {}) == reason


def test_the_rules_for_s2orc() -> None:
    letters = ["".join("abcdefghij"[int(d)] for d in str(n)) for n in range(600)]
    paragraphs = [
        " ".join(["the" if w % 20 == 0 else letters[w] for w in range(n, n + 120)]) for n in range(0, 600, 120)
    ]
    paper = "\n\n".join(paragraphs)
    assert s2orc(paper, {"year": 2001}) is None
    assert s2orc("\n \t\n\n".join(paragraphs), {}) is None
    # One paragraph, hard-wrapped: five lines are no five paragraphs.
    assert s2orc("\n".join(paragraphs), {}) == "under 5 paragraphs"
    assert s2orc(paper[:900], {}) == "under 500 words"


@pytest.mark.parametrize(
    ("fields", "stays"),
    [
        ({"year": 1970}, False),
        ({"year": "1971"}, True),
        ({"year": 2022}, True),  # its month is not known
        ({"year": 2023}, False),
        ({"date": "2022-11-30"}, True),
        ({"date": "2022-12-01", "year": 2022}, False),
        ({"created": "2022-12-31T00:00:00.000Z"}, False),
        ({"published": "2022-11"}, True),
        ({"published": datetime.datetime(2022, 12, 24)}, False),
        ({"date": "2022-13-01", "year": 2021}, True),
        ({"year": None}, True),
    ],
)
def test_s2orc_ends_before_december_2022(fields: dict[str, object], stays: bool) -> None:
    paper = "\n\n".join(" ".join(f"w{chr(97 + n % 26)}" for n in range(120)) for _ in range(5))
    assert s2orc(paper, fields) == (None if stays else "from before 1971 or after November 2022")


def test_duplicates_near_and_equal() -> None:
    exact = Duplicates()
    assert [exact.seen(text) for text in ("One  day", "one day", "one night")] == [None, "duplicate", None]
    near = Duplicates(0.7)
    assert near.seen(" ".join(WORDS)) is None
    assert near.seen(" ".join([*WORDS[:990], "other"])) == "near duplicate"
    assert near.seen(" ".join(reversed(WORDS))) is None  # the same words in another order


def test_real_text_is_prepared(
    tmp_path: Path, tiny: Path, tokenizer: Tokenizer, data_file: Callable[[str], Path]
) -> None:
    source = data_file("pretrain/c4_demo_300.jsonl.gz")
    found = prepare([str(source)], tmp_path / "c4", tiny, 256, quality="mc4", language="any", duplicates=0.8)
    assert found.n_documents == 300
    assert found.n_kept + sum(found.dropped.values()) == 300
    assert 50 < found.n_kept < 300
    shards = Source(str(tmp_path / "c4"))
    assert int(np.max(shards.tokens(0))) < tokenizer.vocab_size


_READ = """
import sys
from training.data.streams import Source
print(Source(sys.argv[1]).tokens(0).tolist())
"""


def test_far_shards_come_a_window_ahead_and_the_cache_keeps_its_limit(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.order._WINDOW", 20)
    made = tmp_path / "made"
    mds.write(made, (np.full(100, n, np.int32) for n in range(200)), shard_bytes=5000)  # 10 or 11 samples a shard
    store = fsspec.filesystem("memory")
    store.put(str(made), "/sets/far", recursive=True)
    shard_bytes = max(path.stat().st_size for path in made.glob("*.mds"))
    monkeypatch.setenv("MPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPT_CACHE_GB", str(8 * shard_bytes / 1e9))
    there = streams.load("memory://sets/far", tokenizer, 2048, seed=5)
    first = there.sample(0).ids[0]
    there.close()
    # By hand: a window of 20 samples is two shards of 10 or more, and one more window comes ahead.
    assert len(list((tmp_path / "cache").rglob("*.mds"))) <= 4
    again = streams.load("memory://sets/far", tokenizer, 2048, seed=5)
    seen, most = [], 0.0
    for n in range(200):
        seen.append(again.sample(n).ids[0])
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.mds")))
    again.close()
    assert seen[0] == first and sorted(seen) == list(range(200))
    # A window and the one ahead may lie beside what the limit counts when a shard is opened.
    assert 4 * shard_bytes < most <= 12 * shard_bytes
    monkeypatch.setenv("MPT_CACHE_GB", "lots")
    with pytest.raises(UserError, match="MPT_CACHE_GB is `lots`"):
        streams.load("memory://sets/far", tokenizer, 2048, seed=5)


def test_samples_longer_than_the_run_are_cut_and_said(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    mds.write(tmp_path / "long", (np.arange(10, dtype=np.int32) for _ in range(3)))
    set_ = streams.load(str(tmp_path / "long"), tokenizer, 8, seed=0)
    assert [set_.sample(n).ids for n in range(3)] == [list(range(8))] * 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert "samples of 10 tokens, cut at 8" in message


def test_processes_share_a_cache(tmp_path: Path, tiny: Path) -> None:
    made = tmp_path / "made"
    prepare([str(jsonl(tmp_path / "texts.jsonl", TEXTS))], made, tiny, 16)
    env = {**os.environ, "MPT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", _READ, made.as_uri()]
    readers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [reader.communicate(timeout=100)[0] for reader in readers]
    assert answers == [f"{Source(str(made)).tokens(0).tolist()}\n"] * 3
