"""Finetuning sets by name: where each comes from, and the rebuilding of dolly_hhrlhf.

A set is looked for in $MPT_HOME/datasets/<name>/, then on the hub. `owner/name` names any set of the hub, and
`name:test` another split than `train`.
"""

import contextlib
import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mpt import catalog
from mpt.bounded import read_text
from mpt.errors import UserError
from mpt.prompts import PromptStyle
from training.data import files, layout
from training.data.files import RawSet
from training.data.rows import conversation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubSet:
    """A published set. style: what its rows are made for. files: globs of its training rows, where the rules of
    `training/data/layout.py` do not find them."""

    repository: str
    licence: str
    style: PromptStyle
    files: tuple[str, ...] = ()


# Names as the MPT model cards give them; licences of the data as their cards stated them. A new set is a line here.
SETS = {
    "dolly_hhrlhf": HubSet("mosaicml/dolly_hhrlhf", "CC-BY-SA-3.0", "instruct"),
    "dolly": HubSet("databricks/databricks-dolly-15k", "CC-BY-SA-3.0", "instruct"),
    "hh_rlhf": HubSet("Anthropic/hh-rlhf", "MIT", "chatml", ("**/*train.jsonl.gz",)),
    "alpaca": HubSet("tatsu-lab/alpaca", "CC-BY-NC-4.0", "instruct"),
    "hc3": HubSet("Hello-SimpleAI/HC3", "CC-BY-SA-4.0", "instruct", ("all.jsonl",)),
    "sharegpt": HubSet("jeffwan/sharegpt_vicuna", "unknown", "chatml"),
    "evol_instruct": HubSet("victor123/evol_instruct_70k", "unknown", "instruct"),
    "oasst": HubSet("OpenAssistant/oasst1", "Apache-2.0", "chatml", ("**/*ready.trees.jsonl.gz",)),
}


class NotHere(UserError):
    """A set that would have to be downloaded, while nothing is (`mpt.catalog.offline`)."""


def is_known(name: str) -> bool:
    """Whether --data names a set of the hub: one of ours, or `owner/name` that is no path here, nor a file's."""
    name, _ = layout.split_name(name)
    if name in SETS:
        return True
    is_path = Path(name).exists() or files.kind(Path(name)) in files.FILES
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not is_path


def home() -> Path:
    """Where copies of sets lie, each in a folder of its name: $MPT_HOME/datasets, by default ~/.cache/mpt/datasets."""
    return Path(os.environ.get("MPT_HOME", "~/.cache/mpt")).expanduser() / "datasets"


def open_set(name: str) -> RawSet:
    """The rows of a set. Raises UserError when it is nowhere."""
    try:
        return RawSet(locate(name))
    except UserError:
        if name != "dolly_hhrlhf":
            raise
        parts = []
        with contextlib.suppress(UserError):
            parts = [RawSet(locate(part)) for part in ("dolly", "hh_rlhf")]
        if len(parts) < 2:
            raise
        dolly, hh = parts
        log.warning("dolly_hhrlhf cannot be had; it is rebuilt from Dolly and HH-RLHF by its card's rules")

        def rows() -> Iterator[tuple[str, Any]]:
            rebuilt = rebuilt_dolly_hhrlhf((row for _, row in dolly.parsed()), (row for _, row in hh.parsed()))
            yield from ((f"rebuilt row {n}", row) for n, row in enumerate(rebuilt, 1))

        return RawSet([*dolly.files, *hh.files], rows, made_by="dolly_hhrlhf rebuilt")


def locate(name: str) -> list[Path]:
    """The files of a set's split, fetched if need be. name: of a set, or with `:split` or `:config` behind it.

    Raises UserError that says where to put a copy.
    """
    name, parts = layout.split_name(name)
    wanted = SETS.get(name, HubSet(name, "unknown", "none"))
    folder = home() / name.replace("/", "--")
    if any(files.kind(path) in files.FILES for path in folder.rglob("*")):
        return in_folder(folder, parts, wanted.files)
    try:
        return _fetch(wanted, parts)
    except NotHere:
        raise
    except UserError as error:
        raise UserError(
            f"{error}; put a copy of its files ({', '.join(files.FILES)}) into `{folder}`, or name a file with "
            "`--data FILE`"
        ) from None


def in_folder(folder: Path, parts: Sequence[str] = (), patterns: Sequence[str] = ()) -> list[Path]:
    """The files of a split, by default of `train`, in a folder here; which were taken and left out is said."""
    taken = layout.in_folder(folder, parts, patterns)
    _say(taken.in_words(f"`{folder}`"))
    return [folder / name for name in taken.names]


@cache
def _say(story: str) -> None:
    """Once in a process, however often a set is opened."""
    if os.environ.get("RANK", "0") == "0":
        log.info("%s", story)


def _fetch(wanted: HubSet, parts: Sequence[str]) -> list[Path]:
    """A split's files, downloaded into the cache of the hub; without the hub, those that the cache has."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    def get(patterns: Sequence[str], is_online: bool = True) -> Path:
        return Path(
            snapshot_download(
                wanted.repository, repo_type="dataset", allow_patterns=list(patterns), local_files_only=not is_online
            )
        )

    where = f"`{wanted.repository}`"
    names = []
    if not catalog.is_offline.get():
        with contextlib.suppress(HTTPError, OSError):
            names = [file.rfilename for file in HfApi().dataset_info(wanted.repository).siblings or ()]
    try:
        folder = get([layout.README], is_online=bool(names))
        if not names:
            return in_folder(folder, parts, wanted.files)
        readme = folder / layout.README
        text = read_text(readme, errors="replace") if readme.is_file() else ""
        taken = layout.choose(names, text, where, parts, wanted.files)
        _say(taken.in_words(where))
        folder = get([glob.escape(name) for name in taken.names])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if catalog.is_offline.get():
            raise NotHere(f"{where} is not on this machine, and --dry-run downloads nothing") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"`{wanted.repository}` cannot be had from the hub ({reason})") from error
    return [folder / name for name in taken.names]


def rebuilt_dolly_hhrlhf(dolly: Iterable[Any], hh: Iterable[Any]) -> Iterator[dict[str, str]]:
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
