"""Documents to shards: read, filter and tokenize in parallel, join with end-of-text, cut to one length, write.

The result does not depend on the number of processes. Documents run on from one sample into the next, as llm-foundry's
`concat_tokens` does; what is left at the end, less than a sample, is dropped.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mpt.checkpoint_text import open_tokenizer
from mpt.errors import UserError
from mpt.files import whole_folder
from mpt.tokenizer import Tokenizer
from training.data import languages, mds, workers
from training.data.files import documents
from training.data.filters import RULES, Duplicates, Fingerprint, Quality, Rule, fingerprint

Item = TypeVar("Item")
_DOCUMENTS_AT_ONCE = 64  # a worker's share
REPORT = "prepared.json"


@dataclass
class Prepared:
    """What became of the documents."""

    n_documents: int = 0
    n_kept: int = 0
    n_tokens: int = 0  # of the documents kept, end-of-text included
    n_samples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason


def prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer_folder: Path,
    max_seq_len: int,
    *,
    quality: Quality = "none",
    language: str | None = None,
    code: str | None = None,
    duplicates: float | None = None,
    n_processes: int = 1,
    text_key: str = "text",
    report: Callable[[Prepared], None] = lambda _: None,
) -> Prepared:
    """Write `out`, a folder of MDS shards whose samples are max_seq_len tokens each, and say what went into it.

    sources: files, folders of files, or hub sets as `hub:owner/name`. language: ISO 639-1 of what stays, `any`, or None
    for what the quality rules are about, English. code: programming languages that stay, or `mpt`. duplicates: None
    keeps them, 1 drops equal texts, less also near ones. Raises UserError for what cannot be read, and when no whole
    sample comes of it.
    """
    if out.exists():
        raise UserError(f"`{out}` exists; choose another --out or remove it")
    if max_seq_len < 2:
        raise UserError(f"`max_seq_len` is {max_seq_len}; a sample needs at least 2 tokens")
    found = Prepared()
    dropped: Counter[str] = Counter()
    known = None if duplicates is None else Duplicates(duplicates)
    _rules(quality, language, code)  # refused here, before processes are started
    n_permutations = None if known is None else known.n_permutations
    start_with = tokenizer_folder, (quality, language, code), text_key, n_permutations

    def kept(run: workers.Mapped) -> Iterator[str]:
        """The texts that stay. Duplicates are judged here, in order, by fingerprints that other processes made."""
        rows = documents(sources, text_key)
        sent: deque[list[dict[str, Any]]] = deque()
        for judged in run(_judge, _noted(_shares(rows), sent)):
            for row, (reason, print_) in zip(sent.popleft(), judged, strict=True):
                found.n_documents += 1
                if print_ is not None and known is not None:
                    reason = known.judge(print_)
                if reason is None:
                    found.n_kept += 1
                    yield row[text_key]
                else:
                    dropped[reason] += 1

    def samples() -> Iterator[mds.Tokens]:
        rest = np.empty(0, np.int32)
        with workers.opened(n_processes, _start, start_with) as run:
            for tokens in run(_tokenize, _shares(kept(run))):
                found.n_tokens += len(tokens)
                rest = np.concatenate([rest, tokens])
                n_whole = len(rest) // max_seq_len
                yield from rest[: n_whole * max_seq_len].reshape(n_whole, max_seq_len)
                found.n_samples += n_whole
                rest = rest[n_whole * max_seq_len :]
                report(found)

    with whole_folder(out) as partial:
        mds.write(partial, samples())
        found.dropped = dict(dropped)
        if not found.n_samples:
            raise UserError(
                f"{found.n_documents} documents ({found.n_kept} kept) make {found.n_tokens} tokens, not one sample of "
                f"{max_seq_len}; give more text or a lower --max-seq-len"
            )
        story = {"sources": list(sources), "quality": quality, "language": language, "code": code,
                 "max_seq_len": max_seq_len, **asdict(found)}  # fmt: skip
        (partial / REPORT).write_text(json.dumps(story, indent=2))
    return found


def _rules(quality: Quality, language: str | None, code: str | None) -> list[Rule]:
    """In the order of what they cost: identifying a language takes longest."""
    rules: list[Rule] = []
    if code is not None:
        wanted = languages.code_languages(code)
        rules.append(lambda _, row: None if languages.code_language(row) in wanted else "in another code language")
    if (rule := RULES[quality]) is not None:
        rules.append(rule)
        language = "en" if language is None else language
    if language is not None and language != languages.ANY:
        languages.check(language)
        rules.append(lambda text, _: None if languages.identify(text) == language else "in another language")
    return rules


def _shares(items: Iterator[Item]) -> Iterator[list[Item]]:
    return iter(lambda: list(islice(items, _DOCUMENTS_AT_ONCE)), [])


def _noted(items: Iterator[Item], sent: deque[Item]) -> Iterator[Item]:
    for item in items:
        sent.append(item)
        yield item


class _Worker(NamedTuple):
    tokenizer: Tokenizer
    rules: list[Rule]
    text_key: str
    n_permutations: int | None  # of a fingerprint; None makes none


_worker: _Worker | None = None  # a process's own


def _start(
    folder: Path, asked: tuple[Quality, str | None, str | None], text_key: str, n_permutations: int | None
) -> None:
    global _worker
    _worker = _Worker(open_tokenizer(folder), _rules(*asked), text_key, n_permutations)


def _judge(rows: list[dict[str, Any]]) -> list[tuple[str | None, Fingerprint | None]]:
    """Of each document the reason to drop it by itself, or else what tells it from others."""
    assert _worker is not None
    _, rules, text_key, n_permutations = _worker
    judged: list[tuple[str | None, Fingerprint | None]] = []
    for row in rows:
        text = row[text_key]
        reason = "empty" if not text.strip() else next((why for rule in rules if (why := rule(text, row))), None)
        is_compared = reason is None and n_permutations is not None
        judged.append((reason, fingerprint(text, n_permutations or 0) if is_compared else None))
    return judged


def _tokenize(texts: list[str]) -> mds.Tokens:
    assert _worker is not None
    tokenizer = _worker.tokenizer
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
        ids.append(tokenizer.eos_id)
    return np.array(ids, dtype=np.int32)
