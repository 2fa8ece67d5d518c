"""Documents to shards: read, filter and tokenize in parallel, join with end-of-text, cut to one length, write.

The result does not depend on the number of processes. Documents run on from one sample into the next, as llm-foundry's
`concat_tokens` does; what is left at the end, less than a sample, is dropped.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpt.checkpoint_text import open_tokenizer
from mpt.errors import UserError
from mpt.files import whole_folder
from mpt.tokenizer import Tokenizer
from training.data import mds, workers
from training.data.files import documents
from training.data.filters import RULES, Duplicates, Fingerprint, Quality, Rule, fingerprint

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
    duplicates: float | None = None,
    n_processes: int = 1,
    text_key: str = "text",
    report: Callable[[Prepared], None] = lambda _: None,
) -> Prepared:
    """Write `out`, a folder of MDS shards whose samples are max_seq_len tokens each, and say what went into it.

    sources: files, folders of files, or hub sets as `hub:owner/name`. duplicates: None keeps them, 1 drops equal texts,
    less also near ones. Raises UserError for what cannot be read, and when no whole sample comes of it.
    """
    if out.exists():
        raise UserError(f"`{out}` exists; choose another --out or remove it")
    if max_seq_len < 2:
        raise UserError(f"`max_seq_len` is {max_seq_len}; a sample needs at least 2 tokens")
    found = Prepared()
    dropped: Counter[str] = Counter()
    known = None if duplicates is None else Duplicates(duplicates)
    start = _start, (tokenizer_folder, quality, text_key, None if known is None else known.n_permutations)

    def kept() -> Iterator[list[mds.Tokens]]:
        """The tokens of several documents at a time; those that another process makes are judged here, in order."""
        rows = documents(sources, text_key)
        shares = iter(lambda: list(islice(rows, _DOCUMENTS_AT_ONCE)), [])
        for share in workers.mapped(_examine, shares, n_processes, *start):
            found.n_documents += len(share)
            tokens = []
            for one in share:
                reason = one.reason
                if reason is None and known is not None and one.fingerprint is not None:
                    reason = known.judge(one.fingerprint)
                if reason is None:
                    tokens.append(one.tokens)
                else:
                    dropped[reason] += 1
            found.n_kept += len(tokens)
            yield tokens

    def samples() -> Iterator[mds.Tokens]:
        rest = np.empty(0, np.int32)
        for tokens in kept():
            found.n_tokens += sum(map(len, tokens))
            rest = np.concatenate([rest, *tokens])
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
        story = {"sources": list(sources), "quality": quality, "max_seq_len": max_seq_len, **asdict(found)}
        (partial / REPORT).write_text(json.dumps(story, indent=2))
    return found


class _Examined(NamedTuple):
    """What a worker makes of a document: the rule that drops it, or its tokens with end-of-text and its fingerprint."""

    reason: str | None
    tokens: mds.Tokens
    fingerprint: Fingerprint | None


class _Worker(NamedTuple):
    tokenizer: Tokenizer
    rule: Rule | None
    text_key: str
    n_permutations: int | None  # of a fingerprint; None makes none


_worker: _Worker | None = None  # a process's own
_NO_TOKENS = np.empty(0, np.int32)


def _start(folder: Path, quality: Quality, text_key: str, n_permutations: int | None) -> None:
    global _worker
    _worker = _Worker(open_tokenizer(folder), RULES[quality], text_key, n_permutations)


def _examine(rows: list[dict[str, Any]]) -> list[_Examined]:
    """A duplicate is tokenized too: only the process that has seen all documents knows it for one."""
    assert _worker is not None
    tokenizer, rule, text_key, n_permutations = _worker
    examined = []
    for row in rows:
        text = row[text_key]
        reason = "empty" if not text.strip() else None
        reason = reason or (rule(text, row) if rule else None)
        if reason is not None:
            examined.append(_Examined(reason, _NO_TOKENS, None))
            continue
        tokens = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32)
        made = None if n_permutations is None else fingerprint(text, n_permutations)
        examined.append(_Examined(None, tokens, made))
    return examined
