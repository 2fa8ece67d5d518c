"""What a checkpoint's file, its folder or the catalog says of it beside its config: licence, prompt style, template."""

from conversion import templates
from conversion.source import Source
from mpt.catalog import UNKNOWN_LICENCE, Entry, describe
from mpt.errors import MPTError
from mpt.prompts import PromptStyle


def licence(source: Source) -> str:
    """SPDX identifier as the file, its folder or the catalog tells it, else `unknown`."""
    if source.licence is not None:
        return source.licence
    entry = _entry(source)
    return UNKNOWN_LICENCE if entry is None else entry.licence


def prompt_style(source: Source) -> PromptStyle | None:
    """How its prompts look, where its folder or the catalog tells."""
    entry = _entry(source)
    return None if entry is None else entry.prompt_style


def chat_template(source: Source) -> str | None:
    """The source's own, else the one of its prompt style."""
    entry = _entry(source)
    if source.chat_template is not None or entry is None:
        return source.chat_template
    return templates.jinja(entry.prompt_style, entry.system_prompt)


def _entry(source: Source) -> Entry | None:
    if source.folder is None:
        return None
    try:
        return describe(str(source.folder))
    except MPTError:
        return None
