"""SemDeDup: drops documents that mean nearly what another one means (Abbas et al. 2023).

The paper's procedure: each document is a vector, k-means finds clusters of them, and within a cluster documents are put
in order, the one least like the centroid first; one whose cosine similarity to any before it is above a threshold is
dropped. The paper's vectors are the last layer's state of the last token of OPT-125M; here any checkpoint gives them,
or a file does. k-means is scikit-learn's (the extra `data`).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpt.errors import UserError
from mpt.extras import install

if TYPE_CHECKING:
    import torch

Vectors = np.ndarray[Any, np.dtype[np.float32]]
_TOKENS_A_PASS = 8192
_BATCHED_FROM = 20_000  # documents: k-means over all of them at once would take hours
_PAIRS_AT_ONCE = 2048  # rows of a cluster's similarities that are held at a time


def similarities(vectors: Vectors, n_clusters: int, seed: int = 17) -> "np.ndarray[Any, Any]":
    """Of each document, (N,) float32: the cosine similarity to the most like of those before it in its cluster's order.

    vectors: (N, D); -1 for a document with none before it. Raises UserError for vectors that are no such array, for
    clusters out of range, and without scikit-learn.
    """
    if vectors.ndim != 2 or not len(vectors):
        raise UserError(f"the vectors have the shape {vectors.shape}; a row for each document is needed")
    if not 1 <= n_clusters <= len(vectors):
        raise UserError(f"`--clusters` is {n_clusters}; it must be from 1 to the {len(vectors)} documents")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        bad = int(np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))[0])
        raise UserError(f"vector {bad} is zero or not finite; every document needs a direction")
    unit = (vectors / lengths).astype(np.float32)
    labels, centroids = _clusters(unit, n_clusters, seed)
    found = np.full(len(unit), -1.0, np.float32)
    for cluster in range(n_clusters):
        members = np.flatnonzero(labels == cluster)
        if len(members) > 1:
            to_centroid = unit[members] @ centroids[cluster]
            members = members[np.argsort(to_centroid, kind="stable")]
            found[members] = _most_like_before(unit[members])
    return found


def _most_like_before(ordered: Vectors) -> "np.ndarray[Any, Any]":
    """Of each row the largest product with a row before it, -1 for the first."""
    found = np.full(len(ordered), -1.0, np.float32)
    for start in range(0, len(ordered), _PAIRS_AT_ONCE):
        rows = ordered[start : start + _PAIRS_AT_ONCE]
        products = rows @ ordered[: start + len(rows)].T
        later = np.arange(start + len(rows)) >= np.arange(start, start + len(rows))[:, None]
        products[later] = -1.0
        found[start : start + len(rows)] = products.max(axis=1)
    return found


def _clusters(unit: Vectors, n_clusters: int, seed: int) -> tuple[Any, Any]:
    """Each document's cluster, and the clusters' centroids, made unit vectors as in the paper's spherical k-means."""
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
    except ImportError as error:
        raise UserError(f"SemDeDup needs scikit-learn; {install('data')}") from error
    kind = KMeans if len(unit) < _BATCHED_FROM else MiniBatchKMeans
    found = kind(n_clusters, n_init=1, random_state=seed).fit(unit)
    lengths = np.linalg.norm(found.cluster_centers_, axis=1, keepdims=True)
    return found.labels_, found.cluster_centers_ / np.maximum(lengths, 1e-12)


def kept(found: "np.ndarray[Any, Any]", share: float | None, threshold: float | None) -> "np.ndarray[Any, Any]":
    """Which documents stay, (N,) bool: at most as similar as the threshold, or a share of all, least similar first.

    Raises UserError unless one of the two is given, and for values out of range.
    """
    if (share is None) == (threshold is None):
        raise UserError("give --keep or --threshold, one of the two")
    if threshold is not None:
        if not -1 <= threshold <= 1:
            raise UserError(f"`--threshold` is {threshold}; it is a cosine, from -1 to 1")
        return found <= threshold
    assert share is not None
    if not 0 < share <= 1:
        raise UserError(f"`--keep` is {share}; it is a share, above 0 and at most 1")
    staying = np.zeros(len(found), bool)
    staying[np.argsort(found, kind="stable")[: max(1, round(share * len(found)))]] = True
    return staying


def embed(
    texts: Iterator[str], name: str, device: "torch.device", max_tokens: int = 512,
    report: Callable[[int], None] = lambda _: None,
) -> Vectors:  # fmt: skip
    """The last token's last hidden state of each text, (N, C) float32, by a checkpoint; longer texts are cut.

    report: called with how many are done. Raises what loading raises.
    """
    import mpt.checkpoint
    from mpt.catalog import resolve
    from mpt.checkpoint_text import open_tokenizer
    from mpt.packed.layers import as_it_lies

    place = resolve(name)
    model = mpt.checkpoint.load_for_engine(place, device=device, pack=as_it_lies)
    tokenizer = open_tokenizer(place, model.config.vocab_size)
    model.eval()
    found: list[Vectors] = []
    batch: list[list[int]] = []
    n_done = 0
    for text in texts:
        batch.append(tokenizer.encode(text)[:max_tokens] or [tokenizer.eos_id])
        if sum(map(len, batch)) >= _TOKENS_A_PASS:
            found.append(_last_states(model, batch))
            n_done, batch = n_done + len(batch), []
            report(n_done)
    if batch:
        found.append(_last_states(model, batch))
    return np.concatenate(found) if found else np.empty((0, model.config.d_model), np.float32)


def _last_states(model: Any, batch: Sequence[Sequence[int]]) -> Vectors:
    """Of each sequence, packed in one row and hidden from the others."""
    import torch

    ids = torch.tensor([[token for ids in batch for token in ids]], device=model.device)
    number = torch.tensor([[n for n, ids in enumerate(batch) for _ in ids]], device=model.device)
    ends = torch.tensor([len(ids) for ids in batch]).cumsum(0) - 1
    with torch.inference_mode():
        states = model.hidden_states(ids, number)[0, ends.to(model.device)]
    return states.float().cpu().numpy()


def read_vectors(path: Path) -> Vectors:
    """A .npy file of (N, D) numbers. Raises UserError for anything else."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` is no .npy file of vectors: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise UserError(f"`{path}` does not hold one array of numbers with a row for each document")
    return found.astype(np.float32)
