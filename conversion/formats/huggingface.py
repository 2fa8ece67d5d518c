"""Hugging Face folders: what every other tool reads, and the form our own checkpoints have.

Written: sharded safetensors with an index, a config that stock transformers loads, the tokenizer, generation config,
chat template, and a model card.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from conversion import card, tensors
from conversion.source import Source, complete
from conversion.tensors import Lazy, SafetensorsFile
from mpt.checkpoint import read_config, stored_tensors, weight_files
from mpt.config import MPTConfig
from mpt.errors import DamagedFile
from mpt.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000
_SINGLE = "model.safetensors"
_TEMPLATE = "chat_template.jinja"


def read(folder: Path, kind: str = "huggingface", tokenizer: Path | None = None) -> Source:
    """Hub, in-tree, remote-code and `mosaic_gpt` names; safetensors or .bin, one file or many."""
    config = read_config(folder)
    found = {name: tensors.stored(tensor) for name, tensor in stored_tensors(folder).items()}
    notes = []
    if kind == "onnx" and any(name.endswith(".quantised") for name in found):
        from conversion.formats import onnx_folder

        found = onnx_folder.read_quantised(found)
        notes.append("matrices were dequantised")
    if "lm_head.weight" in found and config.tie_word_embeddings:
        notes.append("the head is stored beside the embedding it is tied to")
    return Source(
        kind=kind,
        path=folder,
        config=config,
        tensors=complete(config, found, folder),
        tokenizer=_tokenizer(tokenizer or folder),
        files=(folder / "config.json", *weight_files(folder)),
        manifests=(folder,),
        chat_template=_chat_template(folder),
        generation=_object(folder / "generation_config.json"),
        notes=tuple(notes),
        folder=folder,
    )


def write(source: Source, out: Path, dtype: torch.dtype, advance: Callable[[int], None]) -> dict[Path, str]:
    """Write the folder's files into `out`, which exists and is empty, but for the card; the weights' sha256.

    advance: called with bytes of weights written.
    """
    config = MPTConfig.from_dict(source.config.to_dict())
    config.dtype = dtype
    written = {name: tensor.cast(dtype, name) for name, tensor in source.tensors.items()}
    digests = write_weights(written, out, advance)
    write_beside(source, config, out)
    return digests


def write_weights(found: Mapping[str, Lazy], out: Path, advance: Callable[[int], None]) -> dict[Path, str]:
    """Stream tensors into model.safetensors, or into shards with an index; the files' sha256.

    Raises DamagedFile for NaN and infinity.
    """
    groups = tensors.shards({name: tensor.n_bytes for name, tensor in found.items()}, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    digests: dict[Path, str] = {}
    for number, names in enumerate(groups, 1):
        file = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        described = {name: (found[name].dtype, found[name].shape) for name in names}
        with SafetensorsFile(out / file, described) as target:
            for name in names:
                values = found[name].read()
                tensors.check_finite(name, values, found[name].where)
                advance(target.add(name, values))
                del values  # before the next one is read
        digests[out / file] = target.sha256
    if len(groups) > 1:
        total = sum(tensor.n_bytes for tensor in found.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(out / f"{_SINGLE}.index.json", index)
    return digests


def write_beside(source: Source, config: MPTConfig, out: Path) -> None:
    """config.json, and the tokenizer's and generation's files where the source has a tokenizer."""
    tokenizer = source.tokenizer
    if tokenizer is not None:
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_id
    config.save_pretrained(out)
    if tokenizer is None:
        return
    tokenizer.save(out)
    template = card.chat_template(source)
    if template is not None:
        (out / _TEMPLATE).write_text(template, encoding="utf-8")
    generation = GenerationConfig(
        bos_token_id=tokenizer.eos_id,
        eos_token_id=list(tokenizer.end_ids),
        pad_token_id=tokenizer.eos_id,
        use_cache=True,
    )
    generation.save_pretrained(out)


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None


def _chat_template(folder: Path) -> str | None:
    """Its own file since transformers 4.52, an entry of tokenizer_config.json before."""
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    template = _object(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"`{path}` is not readable JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
