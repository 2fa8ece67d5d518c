"""What a checkpoint's file, its folder or the catalog says of it beside its config: licence, prompt style, template."""

from conversion.source import Source
from mpt import style_template
from mpt.catalog import UNKNOWN_LICENCE, Entry, descendant, describe
from mpt.errors import MPTError
from mpt.files import read_optional_json
from mpt.prompts import PromptStyle


def licence(source: Source) -> str:
    """SPDX identifier as the file, its folder or the catalog tells it, else `unknown`."""
    if source.licence is not None:
        return source.licence
    entry = _entry(source)
    return UNKNOWN_LICENCE if entry is None else entry.licence


def descends_from(source: Source) -> str | None:
    """Which published descendant of MPT it comes from, whose that is, its licence, and what shows it."""
    config = source.config
    shape = (config.d_model, config.n_layers, config.n_heads, config.vocab_size)
    found = descendant(source.folder or source.path, shape)
    if found is None:
        return None
    known, why = found
    published = "" if known.licence == UNKNOWN_LICENCE else f", published under {known.licence}"
    return f"{known.name} of {known.maker}{published}: {why}"


def made_by(source: Source) -> str | None:
    """The class and the version of transformers that wrote its config.json, where it says so."""
    config = {} if source.folder is None else read_optional_json(source.folder / "config.json")
    classes, version = config.get("architectures"), config.get("transformers_version")
    name = classes[0] if isinstance(classes, list) and classes else None
    own = " (transformers' own)" if name == "MptForCausalLM" else ""
    parts = [f"class {name}{own}" if name else None, f"transformers {version}" if version else None]
    return ", ".join(part for part in parts if part) or None


def prompt_style(source: Source) -> PromptStyle | None:
    """How its prompts look, where its folder or the catalog tells."""
    entry = _entry(source)
    return None if entry is None else entry.prompt_style


def chat_template(source: Source) -> str | None:
    """The source's own, else the one of its prompt style."""
    entry = _entry(source)
    if source.chat_template is not None or entry is None:
        return source.chat_template
    return style_template.jinja(entry.prompt_style, entry.system_prompt)


def _entry(source: Source) -> Entry | None:
    try:
        return describe(str(source.folder or source.path))
    except MPTError:
        return None
