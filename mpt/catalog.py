"""The checkpoints with a name, what is known of each, and where a name or path leads on this machine.

A place is a Hugging Face style folder, or a GGUF file. A name is looked up as a place, in the folder `$MPT_HOME`, in
this package (the mpt-tiny family), in the Hugging Face cache, and last on the hub. MosaicML's originals were withdrawn
from the hub in January 2026, so a local copy or a mirror's repository id is the usual way to them. Code that lies
beside a checkpoint is neither downloaded nor run.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from mpt.checkpoint_text import find_template, open_tokenizer
from mpt.config_keys import language_model
from mpt.errors import CheckpointNotFound, DamagedFile, MachineRefused, UserError
from mpt.files import read_json, read_optional_json
from mpt.gguf.file import is_gguf, open_gguf
from mpt.manifest import MANIFEST, read_manifest
from mpt.prompts import MPT_7B_CHAT_SYSTEM, MPT_30B_CHAT_SYSTEM, PROMPT_STYLES, PromptStyle
from mpt.tokenizer import CHATML_START

log = logging.getLogger(__name__)

UNKNOWN_LICENCE = "unknown"
_TINY = Path(__file__).parent / "tiny"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What quantisers add to a checkpoint's name: `.Q4_K_M.gguf`, `-f16.gguf`, `-AWQ`, `-GPTQ-4bit-128g`.
_PACKED_NAME = re.compile(
    r"([.-](gguf|awq|gptq|bnb|nf4|fp4|int[48]|w?[2-8]-?bit|\d+g|i?q\d\w*|b?f(16|32)|fp(16|32)))+$", re.IGNORECASE
)
_SMALL_FILES = ["*.json", "*.model", "merges.txt", "vocab.txt", "chat_template.jinja", "LICENSE*"]
ADAPTER_CONFIG = "adapter_config.json"
GPTQ_FILES = "gptq_model-*.safetensors"  # AutoGPTQ's, such as gptq_model-4bit-128g
_MODEL_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.onnx",
)  # fmt: skip
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the second only where the first is absent


@dataclass(frozen=True)
class Entry:
    """What a user or client should know of a checkpoint before using it."""

    name: str
    repo_id: str | None  # on the Hugging Face hub; None for what never was there
    context_length: int  # what it was trained to; ALiBi reads on beyond it
    prompt_style: PromptStyle
    licence: str  # SPDX identifier, or "unknown"
    system_prompt: str | None = None  # of a conversation that brings none

    @property
    def is_noncommercial(self) -> bool:
        return "-NC-" in self.licence.upper()


def _published(
    name: str, context_length: int, style: PromptStyle, licence: str, system_prompt: str | None = None
) -> Entry:
    return Entry(name, f"mosaicml/{name}", context_length, style, licence, system_prompt)


def _tiny(name: str, context_length: int, style: PromptStyle) -> Entry:
    return Entry(name, None, context_length, style, "Apache-2.0")


# Context lengths and styles: the published configs and cards. Licences: the model cards; mpt-7b-instruct was announced
# as CC-BY-SA-3.0 and its card later changed to Apache-2.0.
_ENTRIES = (
    _tiny("mpt-tiny", 2048, "none"),
    _tiny("mpt-tiny-instruct", 2048, "instruct"),
    _tiny("mpt-tiny-chat", 2048, "chatml"),
    _tiny("mpt-tiny-storywriter", 65536, "none"),
    _published("mpt-7b", 2048, "none", "Apache-2.0"),
    _published("mpt-7b-instruct", 2048, "instruct", "Apache-2.0"),
    _published("mpt-7b-chat", 2048, "chatml", "CC-BY-NC-SA-4.0", MPT_7B_CHAT_SYSTEM),
    _published("mpt-7b-storywriter", 65536, "none", "Apache-2.0"),
    _published("mpt-7b-8k", 8192, "none", "Apache-2.0"),
    _published("mpt-7b-8k-instruct", 8192, "instruct", "CC-BY-SA-3.0"),
    _published("mpt-7b-8k-chat", 8192, "chatml", "CC-BY-NC-SA-4.0", MPT_30B_CHAT_SYSTEM),
    _published("mpt-30b", 8192, "none", "Apache-2.0"),
    _published("mpt-30b-instruct", 8192, "instruct", "CC-BY-SA-3.0"),
    _published("mpt-30b-chat", 8192, "chatml", "CC-BY-NC-SA-4.0", MPT_30B_CHAT_SYSTEM),
    _published("mpt-1b-redpajama-200b", 2048, "none", "Apache-2.0"),
    _published("mpt-1b-redpajama-200b-dolly", 2048, "instruct", "CC-BY-SA-3.0"),
)
CATALOG = {entry.name: entry for entry in _ENTRIES}
_BY_REPO_ID = {entry.repo_id: entry for entry in _ENTRIES if entry.repo_id}


@dataclass(frozen=True)
class Descendant:
    """A published model of MPT's class by others: how its copies are recognised, and under which licence it came."""

    name: str
    maker: str
    licence: str  # of the model card
    called: tuple[str, ...]  # in names of folders, repositories and classes; letters and digits alone
    shape: tuple[int, int, int, int] | None = None  # d_model, n_layers, n_heads, vocab_size


# Shapes: the published configs. Licences: the model cards as they last stood. Two had changed: PhoGPT's own community
# licence became Apache-2.0 and, in November 2024, BSD-3-Clause; replit-code-v1_5-3b was CC-BY-SA-4.0 for its first day.
_DESCENDANTS = (
    Descendant("SEA-LION-7B", "AI Singapore", "MIT", ("sealion7b",), (4096, 32, 32, 256000)),
    Descendant("SEA-LION-3B", "AI Singapore", "MIT", ("sealion3b",), (2560, 32, 20, 256000)),
    Descendant("PhoGPT", "VinAI", "BSD-3-Clause", ("phogpt",), (3072, 32, 24, 20480)),
    Descendant("replit-code-v1_5-3b", "Replit", "Apache-2.0", ("replitcodev15",), (3072, 32, 24, 32768)),
    Descendant("replit-code-v1-3b", "Replit", "CC-BY-SA-4.0", ("replitcodev1", "replitlm"), (2560, 32, 32, 32768)),
    Descendant("Krutrim-1", "Krutrim", "Krutrim Community License 1.0", ("krutrim1",), (4608, 32, 48, 70400)),
    Descendant("CSMPT7b", "BUT-FIT", "Apache-2.0", ("csmpt",), (4096, 32, 32, 64002)),
    Descendant("LLaVA-MPT", "the LLaVA project", "CC-BY-NC-SA-4.0", ("llava",), (4096, 32, 32, 50282)),
    Descendant("Extended Mind MPT", "Normal Computing", UNKNOWN_LICENCE, ("extendedmind", "extendedmpt")),
    Descendant("TituLM", "Hishab", UNKNOWN_LICENCE, ("titulm",)),
    Descendant("Otter or OpenFlamingo", "their authors", UNKNOWN_LICENCE, ("otter", "flamingo")),
)


def descendant(path: Path, shape: tuple[int, int, int, int]) -> tuple[Descendant, str] | None:
    """Which published descendant of MPT a checkpoint comes from, and what shows it; None for MPT and for unknown ones.

    shape: d_model, n_layers, n_heads, vocab_size. Names are hints and can be wrong; weights are not compared.
    """
    config = read_optional_json(path / "config.json")
    auto_map = config.get("auto_map")
    classes = list(auto_map.values()) if isinstance(auto_map, dict) else []
    hints = [("_name_or_path", config.get("_name_or_path")), ("model_type", config.get("model_type"))]
    hints += [("architectures", name) for name in config.get("architectures") or [] if isinstance(name, str)]
    hints += [("auto_map", name) for name in classes]
    names = path.absolute().parts
    cached = (name for name in names if name.startswith("models--"))  # of the Hugging Face cache
    hints += [("its path", name) for name in (*names[-1:], *cached)]
    for known in _DESCENDANTS:
        for where, text in hints:
            letters = re.sub(r"[^a-z0-9]", "", str(text).lower())
            if any(name in letters for name in known.called):
                return known, f"{where} has `{text}`"
    by_shape = (known for known in _DESCENDANTS if known.shape == shape)
    return next(((known, "width, layers, heads and vocabulary are the same") for known in by_shape), None)


is_offline: ContextVar[bool] = ContextVar("is_offline", default=False)


@contextmanager
def offline(is_wanted: bool = True) -> Iterator[None]:
    """Download nothing: a checkpoint, or a set of rows, is on this machine or not found."""
    before = is_offline.set(is_wanted)
    try:
        yield
    finally:
        is_offline.reset(before)


def resolve(name_or_path: str | Path) -> Path:
    """The place of a checkpoint, downloaded if need be (gigabytes, into the Hugging Face cache).

    Raises CheckpointNotFound with the next step to take, MachineRefused when the disk is full.
    """
    given = str(name_or_path)
    place = find_local(given)
    if place is not None:
        return place
    repo_id = _repository(given)
    if is_offline.get():
        raise CheckpointNotFound(f"`{given}` is not on this machine, and --dry-run downloads nothing")
    return _download(given, repo_id)


def look_up(name_or_path: str | Path) -> Path | None:
    """The place of a checkpoint on this machine, None for one that `resolve` would download; never does so itself.

    Raises CheckpointNotFound for what `resolve` refuses without asking the hub.
    """
    given = str(name_or_path)
    place = find_local(given)
    if place is None:
        _repository(given)
    return place


def _repository(given: str) -> str:
    """Where the hub has what is not on this machine. Raises CheckpointNotFound for what is no name of the hub."""
    entry = _known(given)
    if entry is None and _REPO_ID.fullmatch(given):
        return given
    if entry is None:
        raise CheckpointNotFound(_not_found(given))
    if entry.repo_id is None:
        raise CheckpointNotFound(f"`{given}` is not in this installation ({_TINY / given}); make it with `make tiny`")
    return entry.repo_id


def find_local(name_or_path: str | Path) -> Path | None:
    """The place of a checkpoint that is already on this machine, or None; never touches the network.

    Raises CheckpointNotFound for a file that is no GGUF, and for a folder without config.json that no name of the
    catalog explains; DamagedFile for a file that is called .gguf and is none.
    """
    given = str(name_or_path)
    path = Path(given).expanduser()
    entry, has_adapters = _known(given), is_adapter(path)
    if ((path / "config.json").is_file() and not has_adapters) or is_gguf(path):
        return path
    if entry is None and has_adapters:
        merge = f"train export {path} --merge --out FOLDER"
        raise CheckpointNotFound(f"`{path}` holds adapters alone; add them to their base with `{merge}`")
    refuse_ctranslate2(path)
    if entry is None and path.exists():
        if inside := sorted(path.glob("*.gguf")):
            raise CheckpointNotFound(f"`{path}` has no config.json; give one of its GGUF files, such as `{inside[0]}`")
        if path.suffix == ".gguf":
            raise DamagedFile(f"`{path}` does not begin as a GGUF file does; copy it again")
        what = "has no config.json" if path.is_dir() else "is a file and no GGUF"
        raise CheckpointNotFound(
            f"`{path}` {what}; give the folder that holds a checkpoint's config.json and weights, or make one of a "
            f"copy in another format: `mpt convert {path} FOLDER --to hf`"
        )
    name = entry.name if entry else given
    places = [_TINY / name]
    if home := os.environ.get("MPT_HOME"):
        places.insert(0, Path(home).expanduser() / name)
    for place in places:
        if (place / "config.json").is_file():
            return place
    repo_id = entry.repo_id if entry else given
    return _cached(repo_id) if repo_id and _REPO_ID.fullmatch(repo_id) else None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds peft's adapters and no model: adapters merged into one may leave adapter_config.json."""
    return (folder / ADAPTER_CONFIG).is_file() and not has_model(folder)


def has_model(folder: Path) -> bool:
    """Whether a folder holds a model's weights in a form that is served as it is."""
    return any((folder / name).is_file() for name in _MODEL_FILES) or any(folder.glob(GPTQ_FILES))


def refuse_ctranslate2(folder: Path) -> None:
    """Raises UserError for what CTranslate2's converter writes: `model.bin` with a vocabulary, in its own order."""
    if (folder / "model.bin").is_file() and any(folder.glob("*vocabulary.*")):
        raise UserError(
            f"`{folder}` is a CTranslate2 folder (model.bin and its vocabulary), which only CTranslate2 reads, with "
            "`ctranslate2.Generator`; give the Hugging Face folder it was converted from"
        )


def describe(name_or_path: str | Path) -> Entry:
    """What is known of a checkpoint: its catalog entry, corrected by the copy on this machine, if there is one.

    A copy's manifest.json and config.json, or the keys of its GGUF file, come before the catalog. A copy that states no
    prompt style is taken for an instruct model when its name says so. Never downloads.
    """
    given = str(name_or_path)
    place = find_local(given)
    entry = _entry_of(given, place)
    if place is None:
        if entry is None:
            raise CheckpointNotFound(_not_found(given))
        return entry
    manifest, config = read_manifest(place) or {}, read_optional_json(place / "config.json")
    if is_gguf(place):
        file = open_gguf(place)
        context = file.keys.get("mpt.context_length")
        config = {"max_seq_len": context if isinstance(context, int) else None}  # else it is refused with the config
        manifest = {"name": place.stem, "licence": file.text("general.license")} | manifest
    if entry is None:
        name = str(manifest.get("name") or place.resolve().name)
        entry = Entry(name, None, 2048, "instruct" if "instruct" in name.lower() else "none", UNKNOWN_LICENCE)
    stated = stated_style(given)
    config = language_model(config) or config
    context_length = manifest.get("context_length") or config.get("max_seq_len") or entry.context_length
    return replace(
        entry,
        context_length=int(context_length),
        prompt_style=stated[0] if stated else entry.prompt_style,
        licence=str(manifest.get("licence") or entry.licence),
        system_prompt=manifest.get("system_prompt", entry.system_prompt),
    )


def stated_style(name_or_path: str | Path) -> tuple[PromptStyle, str] | None:
    """A checkpoint's prompt style and what states it, or None where nothing does; a name is never read for hints.

    The copy's manifest.json comes first, then the catalog, the tokenizer's chat template and its ChatML tokens. Never
    downloads.
    """
    given = str(name_or_path)
    place = find_local(given)
    manifest = (read_manifest(place) if place else None) or {}
    if place and "prompt_style" in manifest:
        style = manifest["prompt_style"]
        if style not in PROMPT_STYLES:
            known = ", ".join(PROMPT_STYLES)
            raise UserError(f"the {MANIFEST} of `{place}` has prompt_style `{style}`; known: {known}")
        return style, "its manifest.json"
    entry = _entry_of(given, place)
    if entry is not None:
        return entry.prompt_style, "the catalog"
    if place is None:
        raise CheckpointNotFound(_not_found(given))
    if find_template(place) is not None:
        return "template", "its chat template"
    if _has_chatml(place):
        return "chatml", f"its tokenizer's `{CHATML_START}`"
    return None


def _has_chatml(place: Path) -> bool:
    try:
        return open_tokenizer(place).special_id(CHATML_START) is not None
    except UserError:  # none that is read, which whoever needs it says
        return False


def _entry_of(given: str, place: Path | None) -> Entry | None:
    """The catalog's entry of a name, a folder's name, or a copy whose name says of which checkpoint and how packed."""
    names = [given] if place is None else [given, place.name, _PACKED_NAME.sub("", place.name)]
    return next((entry for entry in map(_known, names) if entry is not None), None)


def _known(name_or_path: str) -> Entry | None:
    return CATALOG.get(name_or_path) or _BY_REPO_ID.get(name_or_path)


def _cached(repo_id: str) -> Path | None:
    """The snapshot of `main` in the Hugging Face cache, if all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):  # None, or the marker of a file known not to exist
        return None
    folder = Path(config).parent
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    for single in _WEIGHTS:
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = set(read_json(index).get("weight_map", {}).values())
            return bool(names) and all((folder / name).is_file() for name in names)
        if (folder / single).is_file():
            return True
    return False


def _download(given: str, repo_id: str) -> Path:
    """Fetch a repository of the hub into the Hugging Face cache: weights and JSON, never code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        XetDownloadError,
    )

    log.info("downloading `%s` from the Hugging Face hub", repo_id)
    try:
        for single in _WEIGHTS:  # safetensors; .bin files only where there are none, they hold the same again
            weights = single.replace(".", "*.", 1)
            path = snapshot_download(repo_id, allow_patterns=[*_SMALL_FILES, weights], ignore_patterns=["*/*"])
            if _has_weights(Path(path)):
                break
    except GatedRepoError as error:
        raise CheckpointNotFound(
            f"`{repo_id}` asks its readers to sign in; accept its terms on the hub and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointNotFound(_gone(given, repo_id, "is not on the Hugging Face hub")) from error
    except (LocalEntryNotFoundError, HTTPError, ConnectionError) as error:
        raise CheckpointNotFound(
            _gone(given, repo_id, "is not on this machine and the hub cannot be reached")
        ) from error
    except (OSError, XetDownloadError) as error:  # after the classes above, which are OSErrors too
        first_line = str(error).partition("\n")[0]
        raise MachineRefused(f"downloading `{repo_id}` failed: {first_line}") from error
    folder = Path(path)
    if not (folder / "config.json").is_file() or not _has_weights(folder):
        raise CheckpointNotFound(
            f"`{repo_id}` has no checkpoint this can load: config.json with model*.safetensors or pytorch_model*.bin"
        )
    return folder


def _gone(given: str, repo_id: str, what: str) -> str:
    """Why a name of the hub led nowhere, and the three ways on."""
    reason = " (MosaicML's originals were withdrawn in January 2026)" if repo_id.startswith("mosaicml/") else ""
    name = given.rpartition("/")[2]
    home = os.environ.get("MPT_HOME")
    place = Path(home).expanduser() / name if home else f"$MPT_HOME/{name}"
    return (
        f"`{repo_id}` {what}{reason}; put a copy of its folder at `{place}`, "
        f"or give a path like `/models/{name}` or a mirror's `organisation/{name}`"
    )


def _not_found(given: str) -> str:
    if given.startswith(("/", ".", "~")):
        return f"`{given}` does not exist; give the folder that holds a checkpoint's config.json and weights"
    if _REPO_ID.fullmatch(given):
        return (
            f"no checkpoint `{given}` on this machine, so what it is is not known; give a folder with a config.json, "
            f"or fetch the hub's with `hf download {given}`"
        )
    close = get_close_matches(given, CATALOG, n=1)
    if close:
        return f"no checkpoint `{given}`; did you mean `{close[0]}`?"
    return f"no checkpoint `{given}`; give a folder with a config.json, or one of: {', '.join(CATALOG)}"
