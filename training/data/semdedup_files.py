"""SemDeDup over files: documents read, turned into vectors, and those that stay written, in their order."""

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from mpt.errors import UserError
from mpt.files import require_writable, whole_file
from training.data import semdedup
from training.data.files import documents
from training.data.semdedup import Vectors


def run(
    sources: Sequence[str],
    out: Path,
    model: str,
    vectors: Path | None,
    keep: float | None,
    threshold: float | None,
    clusters: int | None,
    text_key: str = "text",
    report: Callable[[int], None] = lambda _: None,
) -> tuple[int, int, float]:
    """Write `out`, .jsonl or .jsonl.gz, and return how many documents there are, how many stay, and how similar the
    most similar of those is to one before it.

    vectors: a file of them, which is made with `model` where it does not exist yet. clusters: None is the root of the
    number of documents. Raises UserError for what does not fit together, and OSError, before the documents are read.
    """
    if out.exists():
        raise UserError(f"`{out}` exists; choose another --out or remove it")
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"`--out` is `{out}`; it ends in .jsonl or .jsonl.gz")
    for file in (out, vectors):
        if file is not None and not file.exists():
            require_writable(file)
    semdedup.kept(np.zeros(1, np.float32), keep, threshold)  # refuses before an hour of work what it would after
    found = _vectors(sources, model, vectors, text_key, report)
    n_documents = sum(1 for _ in documents(sources, text_key))
    if len(found) != n_documents:
        raise UserError(f"{len(found)} vectors for {n_documents} documents; give a file made from these sources")
    similar = semdedup.similarities(found, clusters or max(1, round(math.sqrt(n_documents))))
    staying = semdedup.kept(similar, keep, threshold)
    _write(out, sources, text_key, staying)
    return n_documents, int(staying.sum()), float(similar[staying].max()) if staying.any() else math.nan


def _vectors(
    sources: Sequence[str], model: str, vectors: Path | None, text_key: str, report: Callable[[int], None]
) -> Vectors:
    if vectors is not None and vectors.is_file():
        return semdedup.read_vectors(vectors)
    if not model:
        what = f"`{vectors}` does not exist" if vectors is not None else "there are no vectors"
        raise UserError(f"{what}; give --vectors FILE.npy, or --model with a checkpoint that makes them")
    if vectors is not None and vectors.suffix != ".npy":
        raise UserError(f"`--vectors` is `{vectors}`; it ends in .npy")
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts: Iterator[str] = (row[text_key] for row in documents(sources, text_key))
    found = semdedup.embed(texts, model, device, report=report)
    if vectors is not None:
        with whole_file(vectors) as partial, partial.open("wb") as file:
            np.save(file, found)
    return found


def _write(
    out: Path, sources: Sequence[str], text_key: str, staying: "np.ndarray[tuple[int], np.dtype[np.bool_]]"
) -> None:
    with whole_file(out) as partial, _opened(partial, out.name.endswith(".gz")) as file:
        for stays, row in zip(staying, documents(sources, text_key), strict=True):
            if stays:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _opened(path: Path, is_packed: bool) -> IO[str]:
    return gzip.open(path, "wt", encoding="utf-8") if is_packed else path.open("w", encoding="utf-8")
