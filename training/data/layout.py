"""Which files of a dataset's folder or repository are the rows of a split, by the rules of Hugging Face `datasets`.

In this order: the `configs:` of its README, shards named `data/train-00000-of-00004.parquet`, folders named after a
split, files named after one, and otherwise every file is of `train`. Of the files found, those of the most common kind
are taken. Source: `datasets/data_files.py` and `datasets/load.py` of version 4.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mpt.bounded import parse_yaml, read_text
from mpt.errors import UserError
from training.data.files import FILES, kind

TRAIN = "train"
README = "README.md"
_WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_END = "[-._ 0-9]"  # what ends a word in a name, as a glob
_IN_FOLDERS = ("**/{word}/**", "**/{word}[{end}]*/**", "**/*[{end}]{word}/**", "**/*[{end}]{word}[{end}]*/**")
_IN_FILES = ("**/{word}[{end}]*", "**/*[{end}]{word}[{end}]*")
_SHARD = re.compile(r"data/(?P<split>[^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
# What lies beside rows and ends like them; `state.json` is of `save_to_disk`.
_NO_ROWS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_PREFERRED = (".txt", ".csv", ".json", ".jsonl", ".parquet")  # the last of two equally common kinds


class Taken(NamedTuple):
    """Of a split: its files' names in order, those that were left out, each with why, and what it was chosen by."""

    names: list[str]
    left_out: dict[str, str]
    split: str

    def in_words(self, where: str) -> str:
        left = "; ".join(f"{name} ({why})" for name, why in self.left_out.items())
        return f"{where}: split `{self.split}` is {_some(self.names)}" + (f"; left out: {left}" if left else "")


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """A set's name without the `:config` or `:split` behind it, and these."""
    found = re.fullmatch(r"(?P<name>.*?[^:/])(?P<parts>(?::[\w.-]+){1,2})", name)
    if found is None or "://" in name or Path(name).expanduser().exists():
        return name, ()
    return found["name"], tuple(found["parts"][1:].split(":"))


def in_folder(folder: Path, parts: Sequence[str] = (), patterns: Sequence[str] = ()) -> Taken:
    """What `choose` takes of a folder here."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    readme = folder / README
    text = read_text(readme, errors="replace") if readme.is_file() else ""
    return choose(names, text, f"`{folder}`", parts, patterns)


def choose(
    names: Iterable[str], readme: str, where: str, parts: Sequence[str] = (), patterns: Sequence[str] = ()
) -> Taken:
    """The files of a split, by default `train`. names: all there are, relative; readme: the text of README.md.

    parts: the split, the configuration of the README, or both. patterns: globs of the training rows, which come before
    all rules where a file matches. Raises UserError where there is no row, no such split, or several configurations.
    """
    known = sorted(name for name in names if _may_hold_rows(name))
    if not known:
        raise UserError(f"{where} holds no file of rows; rows are in {', '.join(FILES)} (also .gz, .zst, .bz2, .xz)")
    splits, wanted = _splits(known, readme, where, list(parts), patterns)
    if wanted not in splits:
        first = next(iter(splits))
        raise UserError(
            f"{where} has no split `{wanted}`; its splits are {', '.join(splits)}; name one, for example `NAME:{first}`"
        )
    found = splits[wanted]
    ending = _most_common_kind(found)
    taken = [name for name in found if kind(Path(name)) == ending]
    left_out = {name: f"{kind(Path(name))} beside more {ending}" for name in found if name not in taken}
    for split, others in splits.items():
        if rest := [name for name in others if name not in taken and name not in left_out]:
            left_out[_some(rest)] = f"split {split}"
    listed = {name for others in splits.values() for name in others}
    if rest := [name for name in known if name not in listed]:
        left_out[_some(rest)] = "of no split"
    return Taken(taken, left_out, wanted)


def _splits(
    names: Sequence[str], readme: str, where: str, parts: list[str], patterns: Sequence[str]
) -> tuple[dict[str, list[str]], str]:
    """Each split's files, and which split is wanted."""
    chosen = matching(names, patterns)
    if chosen and not parts:
        return {TRAIN: chosen}, TRAIN
    configs = _configs(readme, where)
    if configs:
        splits = _of_config(_config(configs, where, parts), names, where)
        if not splits:
            raise UserError(f"{where}: the README's `configs` name no file that is there; name a file with --data FILE")
    else:
        splits = _by_name(names)
    return splits, parts[0] if parts else TRAIN


def _by_name(names: Sequence[str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name in names:
        if found := _SHARD.fullmatch(name):
            shards.setdefault(found["split"], []).append(name)
    if shards:
        first = [split for split in _WORDS if split in shards]
        return {split: shards[split] for split in [*first, *sorted(shards.keys() - _WORDS.keys())]}
    for forms in (_IN_FOLDERS, _IN_FILES):
        splits = {
            split: matching(names, [form.format(word=word, end=_END[1:-1]) for word in words for form in forms])
            for split, words in _WORDS.items()
        }
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return {TRAIN: list(names)}


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that one of the globs finds, in order. `**` is any number of folders, `*` stays inside one."""
    from fsspec.utils import glob_translate

    compiled = [re.compile(glob_translate(pattern)) for pattern in patterns]
    return sorted(name for name in names if any(glob.match(name) for glob in compiled))


def _may_hold_rows(name: str) -> bool:
    path = PurePosixPath(name)
    is_hidden = any(part.startswith(".") for part in path.parts) or any(
        part.startswith("__") for part in path.parent.parts
    )
    return kind(Path(name)) in FILES and path.name not in _NO_ROWS and not is_hidden


def _most_common_kind(names: Iterable[str]) -> str:
    counts = Counter(kind(Path(name)) for name in names)
    return max(counts, key=lambda ending: (counts[ending], _PREFERRED.index(ending) if ending in _PREFERRED else -1))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


# -- the README's metadata -----------------------------------------------------------------------------------------


def _configs(readme: str, where: str) -> list[dict[str, Any]]:
    """The `configs` in the YAML on top of a dataset card. Raises UserError for what is not YAML."""
    import yaml

    top = re.match(r"\s*---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    if top is None:
        return []
    try:
        metadata = parse_yaml(top[1])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the YAML on top of its {README} cannot be read ({reason}); mend it") from error
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    found = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    return [config for config in found if "data_files" in config or "data_dir" in config]


def _config(configs: Sequence[dict[str, Any]], where: str, parts: list[str]) -> dict[str, Any]:
    """The configuration that is asked for, which leaves `parts`, or else the default one. Raises UserError."""
    names = {str(config.get("config_name", "default")): config for config in configs}
    for part in parts:
        if part in names:
            parts.remove(part)
            return names[part]
    default = next((config for config in configs if config.get("default") is True), names.get("default"))
    if default is None and len(configs) == 1:
        default = configs[0]
    if default is None:
        first = next(iter(names))
        raise UserError(
            f"{where} has the configurations {', '.join(names)} and none is the default; name one, for example "
            f"`NAME:{first}`"
        )
    return default


def _of_config(config: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, list[str]]:
    """A configuration's files by split, without the splits that have none."""
    folder = str(config.get("data_dir", "")).strip("./")
    before = f"{folder}/" if folder else ""
    if "data_files" not in config:
        inside = [name.removeprefix(before) for name in names if name.startswith(before)]
        return {split: [before + name for name in found] for split, found in _by_name(inside).items() if found}
    found = {split: matching(names, globs) for split, globs in _globs(config["data_files"], before, where).items()}
    return {split: files for split, files in found.items() if files}


def _globs(declared: Any, before: str, where: str) -> dict[str, list[str]]:
    """The globs that `data_files` gives each split."""
    if isinstance(declared, str | list) and not any(isinstance(part, dict) for part in declared):
        declared = [{"split": TRAIN, "path": declared}]
    elif isinstance(declared, dict):
        declared = [{"split": split, "path": path} for split, path in declared.items()]
    try:
        return {
            str(part["split"]): [
                before + glob.removeprefix("./")
                for glob in ([part["path"]] if isinstance(part["path"], str) else part["path"])
            ]
            for part in declared
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: `data_files` of its {README} are `{declared}`; needed is a list of `split` and `path`"
        ) from error
