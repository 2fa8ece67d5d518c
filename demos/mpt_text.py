"""What a model wrote, as HTML that is safe by construction: Markdown and formulas, but no HTML of the text becomes HTML.

So nothing has to be filtered out: `list<int>` shows as it is. Markdown's own rules leave out its marks, a link's title, and
what stands in a table's row beyond its columns. A link by reference (`[a]: b`) is text, or its definition would vanish. An
image becomes a link, so a browser fetches nothing before a click. The file is copied beside each Space's `app.py`.
"""

import html
from functools import cache
from typing import Any
from xml.etree.ElementTree import Element, tostring

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

_MAX_FORMULA = 2000  # characters; the converter recurses


def html_of(text: str) -> str:
    """Markdown (CommonMark with tables) with formulas between $ or $$, as HTML."""
    return str(_markdown().render(text))


@cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    # An image is then an exclamation mark and a link.
    markdown.disable(["image", "reference"])
    # As in Pandoc: `$5 and $10` are prices.
    markdown.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True, renderer=_formula)
    markdown.add_render_rule("link_open", _link_open)
    return markdown


def _link_open(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """A link that opens a tab of its own, which learns nothing of this one; its address is its tooltip."""
    address = html.escape(str(tokens[index].attrs["href"]))
    return f'<a href="{address}" title="{address}" target="_blank" rel="noopener noreferrer nofollow">'


def _formula(source: str, options: dict[str, Any]) -> str:
    """A formula as MathML; one that is not understood, or that would be more than a formula, stays as it was written."""
    is_block = options["display_mode"]
    try:
        if len(source) > _MAX_FORMULA:
            raise ValueError("too long")
        element = convert_to_element(source, display="block" if is_block else "inline")
        _read_entities(element)
        return tostring(element, encoding="unicode")
    except Exception:  # the converter lets through what its parser meets, also IndexError and StopIteration
        marks = "$$" if is_block else "$"
        return f"<code>{html.escape(marks + source + marks)}</code>"


def _read_entities(element: Element) -> None:
    """The characters that the converter writes as entities: it would unescape the XML, and what was text with it.

    Raises ValueError for \\href and for \\style, which could fetch a picture.
    """
    for each in element.iter():
        if not each.attrib.keys().isdisjoint(("href", "style", "class", "id")):
            raise ValueError("more than a formula")
        each.text = html.unescape(each.text) if each.text else each.text
