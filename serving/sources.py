"""What a server is to serve: the names and places of `--model`, `--models-dir` and `--adapter`."""

from collections.abc import Collection
from pathlib import Path

from mpt.errors import UserError
from mpt.options import MODEL_NAME, TINY


def all_sources(given: list[str] | None, folder: Path | None) -> dict[str, str]:
    """What to load under each name, of all `--model` and of `--models-dir`. Raises UserError."""
    if folder is None:
        return model_sources(given)
    from serving.models_dir import checkpoints_in  # reads tokenizers too

    named, inside = model_sources(given) if given else {}, checkpoints_in(folder)
    if both := named.keys() & inside.keys():
        raise UserError(f"two of the models have the same name, `{min(both)}`; name one apart: --model NAME=PATH")
    return {**named, **inside}


def model_sources(texts: list[str] | None) -> dict[str, str]:
    """What to load under each name, of all `--model`; the tiny four without any. Raises UserError."""
    sources = dict(_model_source(text) for text in texts or TINY)
    if len(sources) < len(texts or TINY):
        raise UserError("two of the models have the same name; name them apart: --model NAME=PATH")
    return sources


def _model_source(text: str) -> tuple[str, str]:
    """The name to serve under, and the name or path to load, of one `--model`."""
    name, equals, source = text.partition("=")
    if not equals or "/" in name:  # a path may hold "="
        name, source = text.rstrip("/").rpartition("/")[2], text
    if not MODEL_NAME.fullmatch(name) or not source:
        raise UserError(
            f"`--model {text}` gives no usable name (letters, digits, `.`, `_`, `-`, at most 64); "
            "write NAME=PATH, for example chat=/models/mpt-7b-chat"
        )
    return name, source


def adapter_folders(
    texts: list[str] | None, names: Collection[str]
) -> tuple[dict[str, dict[str, Path]], dict[str, Path]]:
    """The single adapters of each model, and its folder of adapters."""
    single: dict[str, dict[str, Path]] = {}
    folders: dict[str, Path] = {}
    for text in texts or ():
        asked, equals, folder = text.partition("=")
        model, colon, name = asked.partition(":")
        if not equals or not folder or model not in names or (colon and not MODEL_NAME.fullmatch(name)):
            raise UserError(
                f"`--adapter {text}` names no model served here; write MODEL:NAME=FOLDER or MODEL=FOLDER, for example "
                f"{min(names)}:mine=runs/lora/adapter"
            )
        if colon:
            single.setdefault(model, {})[name] = Path(folder)
        else:
            folders[model] = Path(folder)
    return single, folders
