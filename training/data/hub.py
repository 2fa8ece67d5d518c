"""Finetuning sets by name: where each comes from, and the rebuilding of dolly_hhrlhf.

A set is looked for in $MPT_HOME/datasets/<name>/, then on the hub. `owner/name` names any set of the hub.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import UserError
from mpt.prompts import PromptStyle
from training.data import files
from training.data.rows import conversation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubSet:
    """A published set. style: what its rows are made for. files: which of the repository's are its training rows."""

    repository: str
    licence: str
    style: PromptStyle
    files: tuple[str, ...] = ("*train*.parquet", "*train*.jsonl*", "*.jsonl*", "*.json*", "*.parquet")


# Names as the MPT model cards give them; licences of the data as their cards stated them. A new set is a line here.
SETS = {
    "dolly_hhrlhf": HubSet("mosaicml/dolly_hhrlhf", "CC-BY-SA-3.0", "instruct"),
    "dolly": HubSet("databricks/databricks-dolly-15k", "CC-BY-SA-3.0", "instruct"),
    "hh_rlhf": HubSet("Anthropic/hh-rlhf", "MIT", "chatml", ("*train.jsonl.gz",)),
    "alpaca": HubSet("tatsu-lab/alpaca", "CC-BY-NC-4.0", "instruct"),
    "hc3": HubSet("Hello-SimpleAI/HC3", "CC-BY-SA-4.0", "instruct", ("all.jsonl",)),
    "sharegpt": HubSet("jeffwan/sharegpt_vicuna", "unknown", "chatml", ("*.json",)),
    "evol_instruct": HubSet("victor123/evol_instruct_70k", "unknown", "instruct", ("*.json",)),
    "oasst": HubSet("OpenAssistant/oasst1", "Apache-2.0", "chatml", ("*ready.trees.jsonl.gz",)),
}


def is_known(name: str) -> bool:
    """Whether --data names a set of the hub: one of ours, or `owner/name` that is no path here, nor a file's."""
    if name in SETS:
        return True
    is_path = Path(name).exists() or files.kind(Path(name)) in files.FILES
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not is_path


def home() -> Path:
    """Where copies of sets lie, each in a folder of its name: $MPT_HOME/datasets, by default ~/.cache/mpt/datasets."""
    return Path(os.environ.get("MPT_HOME", "~/.cache/mpt")).expanduser() / "datasets"


def rows(name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a set, each with where it stands. Raises UserError when it is nowhere."""
    try:
        found = locate(name)
    except UserError:
        if name != "dolly_hhrlhf":
            raise
        parts = []
        with contextlib.suppress(UserError):
            parts = [_rows_of(locate(part)) for part in ("dolly", "hh_rlhf")]
        if len(parts) < 2:
            raise
        dolly, hh = parts
        log.warning("dolly_hhrlhf cannot be had; it is rebuilt from Dolly and HH-RLHF by its card's rules")
        rebuilt = rebuilt_dolly_hhrlhf((row for _, row in dolly), (row for _, row in hh))
        yield from ((f"rebuilt row {n}", row) for n, row in enumerate(rebuilt, 1))
        return
    yield from _rows_of(found)


def locate(name: str) -> list[Path]:
    """The files of a set, fetched if need be. Raises UserError that says where to put a copy."""
    folder = home() / name.replace("/", "--")
    found = sorted(path for path in folder.glob("*") if files.kind(path) in files.FILES)
    if found:
        return found
    try:
        return _fetch(SETS.get(name, HubSet(name, "unknown", "none")))
    except UserError as error:
        raise UserError(
            f"{error}; put a copy of its files ({', '.join(files.FILES)}) into `{folder}`, or name a file with "
            "`--data FILE`"
        ) from None


def _fetch(wanted: HubSet) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(wanted.repository, repo_type="dataset", allow_patterns=list(wanted.files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"`{wanted.repository}` cannot be had from the hub ({reason})") from error
    for pattern in wanted.files:
        if found := sorted(folder.rglob(pattern)):
            return found
    raise UserError(f"`{wanted.repository}` holds no file like {', '.join(wanted.files)}")


def _rows_of(paths: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        yield from files.rows(str(path), is_strict=False)


def rebuilt_dolly_hhrlhf(dolly: Iterable[dict[str, Any]], hh: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """dolly_hhrlhf from its two sources, per its card: Dolly's rows, then HH-RLHF's first exchanges that pass.

    An exchange passes when the assistant neither says "human", "thank" or "sorry", nor asks, nor speaks of itself. Not
    the published set: which 200 rows of Dolly were held out, and what was deduplicated, was never said.
    """
    seen: set[tuple[str, str]] = set()
    for is_dolly, rows_ in ((True, dolly), (False, hh)):
        for row in rows_:
            try:
                question, answer = (message["content"] for message in conversation(row)[:2])
            except UserError:
                continue
            if (is_dolly or not _UNFIT.search(answer)) and (question, answer) not in seen:
                seen.add((question, answer))
                yield {"prompt": question, "response": answer}


_UNFIT = re.compile(r"human|thank|sorry|\?|\b(i|i'm|i've|i'll|i'd|me|my|mine|myself|we|us|our|ours)\b", re.IGNORECASE)
