"""What the folders of several formats have in common: safetensors, config, tokenizer, generation config, template.

Not here: what makes such a folder one of a format (`formats/`).
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from conversion import metadata, tensors
from conversion.source import Source, complete
from conversion.tensors import Lazy, SafetensorsFile
from mpt.bounded import parse_json, read_text
from mpt.chat_template import write_template
from mpt.checkpoint import stored_tensors, weight_files
from mpt.checkpoint_text import find_template, token_names
from mpt.config import MPTConfig
from mpt.errors import DamagedFile, UserError
from mpt.sentencepiece_model import FILES as SENTENCEPIECE_FILES
from mpt.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000
_SINGLE = "model.safetensors"
# What makes up a tokenizer that is not read here; a copy takes all of it along. Nothing of it is executed.
_TOKENIZER_FILES = (
    "tokenizer.json", *SENTENCEPIECE_FILES, "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "tokeniz*.py",
)  # fmt: skip


def stored_weights(folder: Path) -> dict[str, Lazy]:
    """Every tensor of a folder under the model's name: safetensors or .bin, one file or many."""
    return {name: tensors.stored(tensor) for name, tensor in stored_tensors(folder).items()}


def opened(
    folder: Path,
    kind: str,
    config: MPTConfig,
    found: dict[str, Lazy],
    tokenizer: Path | None,
    notes: tuple[str, ...] = (),
) -> Source:
    """The folder as a Source. found: its tensors. tokenizer: another folder, whose tokenizer is taken.

    A tokenizer that is missing or of a kind that is not read does not matter here: the weights are right without it.
    """
    read, why_not = find_tokenizer(folder, tokenizer)
    if "lm_head.weight" in found and config.tie_word_embeddings:
        notes = (*notes, "the head is stored beside the embedding it is tied to")
    return Source(
        kind=kind,
        path=folder,
        config=config,
        tensors=complete(config, found, folder),
        tokenizer=read,
        why_no_tokenizer=why_not,
        tokenizer_files=_carried(tokenizer or folder, is_read=read is not None),
        files=(folder / "config.json", *weight_files(folder)),
        manifests=(folder,),
        chat_template=_chat_template(folder),
        generation=_object(folder / "generation_config.json"),
        notes=notes,
        folder=folder,
    )


def find_tokenizer(folder: Path, given: Path | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or why there is none. Raises DamagedFile, and UserError for a given one that is not read."""
    if given is not None:
        return Tokenizer.from_folder(given), ""
    try:
        return Tokenizer.from_folder(folder), ""
    except UserError as error:
        return None, f"none is read ({error}); to give one: --tokenizer FOLDER"


def _carried(folder: Path, is_read: bool) -> tuple[Path, ...]:
    """The tokenizer's files that a copy takes as they are: SentencePiece's model, and all where it is not read."""
    names = SENTENCEPIECE_FILES if is_read else _TOKENIZER_FILES
    return tuple(path for name in names for path in sorted(folder.glob(name)) if path.is_file())


def write_weights(found: Mapping[str, Lazy], out: Path, advance: Callable[[int], None]) -> dict[Path, str]:
    """Stream tensors into model.safetensors, or into shards with an index; the files' sha256.

    advance: called with bytes of weights written. Raises DamagedFile for NaN and infinity.
    """
    groups = tensors.shards({name: tensor.n_bytes for name, tensor in found.items()}, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    digests: dict[Path, str] = {}
    for number, names in enumerate(groups, 1):
        file = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        digests[out / file] = _write_file(out / file, {name: found[name] for name in names}, advance)
    if len(groups) > 1:
        total = sum(tensor.n_bytes for tensor in found.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (out / f"{_SINGLE}.index.json").write_text(text, encoding="utf-8")
    return digests


def _write_file(path: Path, found: Mapping[str, Lazy], advance: Callable[[int], None]) -> str:
    with SafetensorsFile(path, {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}) as target:
        for name, tensor in found.items():
            values = tensor.read()
            tensors.check_finite(name, values, tensor.where)
            advance(target.add(name, values))
            del values  # before the next one is read
    return target.sha256


def write_beside(source: Source, dtype: torch.dtype, out: Path) -> None:
    """config.json, and the tokenizer's and generation's files; those of a tokenizer that is not read as they are.

    dtype: of the weights, as the config says it.
    """
    config, tokenizer = MPTConfig.from_dict(source.config.to_dict()), source.tokenizer
    config.dtype = dtype
    if tokenizer is not None:
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_id
    config.save_pretrained(out)
    for path in source.tokenizer_files:
        shutil.copyfile(path, out / path.name)
    if tokenizer is None:
        return
    tokenizer.save(out)
    template = metadata.chat_template(source)
    if template is not None:  # with the names that the source's own template calls tokens by
        folder = None if source.chat_template is None else source.folder
        names = {} if folder is None else token_names(folder)
        write_template(out, template, {key: t for key, t in names.items() if tokenizer.special_id(t) is not None})
    generation = GenerationConfig(
        bos_token_id=tokenizer.eos_id,
        eos_token_id=list(tokenizer.end_ids),
        pad_token_id=tokenizer.eos_id,
        use_cache=True,
    )
    generation.save_pretrained(out)


def _chat_template(folder: Path) -> str | None:
    found = find_template(folder)
    return None if found is None else found[0]


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise DamagedFile(f"`{path}` is not readable JSON: {error}") from error
    return value if isinstance(value, dict) else {}
