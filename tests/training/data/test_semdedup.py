"""SemDeDup on a planted set, against the paper's procedure written out plainly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpt.catalog import resolve
from mpt.checkpoint import load
from mpt.checkpoint_text import open_tokenizer
from mpt.errors import UserError
from training import cli
from training.data import semdedup

cluster = pytest.importorskip("sklearn.cluster")
Array = np.ndarray[Any, Any]


def planted(n_topics: int = 12, seed: int = 0) -> tuple[Array, Array]:
    """Topics far apart, in each 30 documents and 10 that are nearly one of them; and which are the near copies."""
    rng = np.random.default_rng(seed)
    vectors, is_copy = [], []
    for _ in range(n_topics):
        topic = rng.normal(size=64) * 4
        originals = topic + rng.normal(size=(30, 64))
        copies = originals[:10] + 0.02 * rng.normal(size=(10, 64))
        vectors += [*originals, *copies]
        is_copy += [False] * 30 + [True] * 10
    order = rng.permutation(len(vectors))
    return np.array(vectors, np.float32)[order], np.array(is_copy)[order]


def papers(vectors: Array, labels: Array, centroids: Array, epsilon: float) -> Array:
    """Abbas et al. 2023, appendix A: sorted by similarity to the centroid, upper triangle, largest of each column."""
    unit = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    stays = np.ones(len(vectors), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(unit[members].numpy() @ centroids[label], kind="stable")]
        pairs = unit[members] @ unit[members].T
        most = torch.triu(pairs, diagonal=1).max(dim=0)[0]
        stays[members[most.numpy() > 1 - epsilon]] = False
    return stays


def test_the_papers_procedure_keeps_the_same_documents() -> None:
    vectors, _ = planted()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = cluster.KMeans(12, n_init=1, random_state=17).fit(unit)
    similar = semdedup.similarities(vectors, 12)
    for epsilon in (0.001, 0.02, 0.05):
        expected = papers(vectors, found.labels_, found.cluster_centers_, epsilon)
        assert (semdedup.kept(similar, None, 1 - epsilon) == expected).all()
        assert expected.sum() < len(vectors)


def test_one_of_each_planted_pair_stays() -> None:
    vectors, is_copy = planted()
    similar = semdedup.similarities(vectors, 12)
    stays = semdedup.kept(similar, 0.75, None)
    assert stays.sum() == 360  # of 480
    assert (~stays).sum() == is_copy.sum()
    # Each document that went has its twin among those that stayed.
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert ((unit[~stays] @ unit[stays].T).max(axis=1) > 0.999).all()


def test_large_clusters_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = planted(3)
    whole = semdedup.similarities(vectors, 2)
    monkeypatch.setattr(semdedup, "_PAIRS_AT_ONCE", 7)
    np.testing.assert_allclose(semdedup.similarities(vectors, 2), whole, atol=1e-6)


def test_vectors_are_the_last_states_of_the_last_tokens() -> None:
    texts = ["One day the rain came.", "The sun", "name: Ada"]
    found = semdedup.embed(iter(texts), "mpt-tiny", torch.device("cpu"))
    place = resolve("mpt-tiny")
    model, tokenizer = load(place).eval(), open_tokenizer(place)
    for vector, text in zip(found, texts, strict=True):
        with torch.inference_mode():
            alone = model.transformer(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0, -1]
        assert torch.cosine_similarity(torch.from_numpy(vector), alone.float(), dim=0) > 0.999


def documents(path: Path) -> Path:
    rows = [{"text": text, "n": n} for n, text in enumerate(["rain falls", "rain falls", "sun shines", "wind blows"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_writes_what_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, vectors = documents(tmp_path / "a.jsonl"), tmp_path / "kept.jsonl", tmp_path / "a.npy"
    command = ["data", "semdedup", str(source), "--model", "mpt-tiny", "--vectors", str(vectors), "--clusters", "1"]
    cli.app([*command, "--threshold", "0.9999", "--out", str(out)], standalone_mode=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["rain falls", "sun shines", "wind blows"]
    assert "kept 3" in capsys.readouterr().out
    # The vectors that were kept are enough for another share.
    cli.app(
        ["data", "semdedup", str(source), "--vectors", str(vectors), "--clusters", "1", "--keep", "0.5", "--out",
         str(tmp_path / "half.jsonl.gz")],
        standalone_mode=False,
    )  # fmt: skip
    assert "kept 2" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "kept.txt", "--keep", "0.5"], "ends in .jsonl"),
        (["--out", "kept.jsonl"], "one of the two"),
        (["--out", "kept.jsonl", "--keep", "1.5"], "--keep"),
        (["--out", "kept.jsonl", "--threshold", "2"], "cosine"),
        (["--out", "kept.jsonl", "--keep", "0.5"], "--model"),
        (["--out", "kept.jsonl", "--keep", "0.5", "--vectors", "three.npy"], "3 vectors for 4 documents"),
        (["--out", "kept.jsonl", "--keep", "0.5", "--vectors", "flat.npy"], "a row for each document"),
        (["--out", "kept.jsonl", "--keep", "0.5", "--vectors", "zero.npy"], "vector 1"),
        (["--out", "kept.jsonl", "--keep", "0.5", "--vectors", "four.npy", "--clusters", "5"], "--clusters"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    documents(tmp_path / "a.jsonl")
    np.save("three.npy", np.eye(3))
    np.save("four.npy", np.eye(4))
    np.save("flat.npy", np.ones(4))
    np.save("zero.npy", np.eye(4) * [[1], [0], [1], [1]])
    with pytest.raises(UserError, match=message):
        cli.app(["data", "semdedup", "a.jsonl", *more], standalone_mode=False)
    assert not list(tmp_path.glob("kept*"))
