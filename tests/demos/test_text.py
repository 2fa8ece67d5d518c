"""What a model wrote as HTML: every angle bracket is text, nothing is fetched, formulas are formulas."""

import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("latex2mathml", reason="the demos are not installed: pip install -e .[demos]")
pytest.importorskip("mdit_py_plugins", reason="the demos are not installed: pip install -e .[demos]")

from demos.mpt_text import html_of


class _Seen(HTMLParser):
    """What a browser would see: the elements with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "text",
    [
        "Rename <old> to <new>",
        "list<int> swallows nothing of the rest",
        "<title> <b> </b> <form> <made-up> <!-- a remark --> <?php ?> <![CDATA[x]]>",
        '<img src=x onerror="alert(1)"><script>alert(1)</script><style>*{}</style>',
        "<div>\n<table>\nand on",
        "a < b > c && d",
        "[a]: b",  # to CommonMark a definition, which is not shown
        "![a][b]\n\n[b]: http://x.invalid/b.png",
        "[Note]: this\n[see]: that",
    ],
)
def test_angle_brackets_and_references_are_text_and_nothing_is_deleted(text: str) -> None:
    seen = _Seen(html_of(text))
    assert "".join(seen.text.split()) == "".join(text.split())
    assert {tag for tag, _ in seen.elements} <= {"p", "br"}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("![a](http://x.invalid/a.png)", "http://x.invalid/a.png"),
        ("[a](http://x.invalid/a)", "http://x.invalid/a"),
        ("<http://x.invalid/c>", "http://x.invalid/c"),
    ],
)
def test_an_image_is_a_link_and_a_link_waits_for_a_click(text: str, address: str) -> None:
    [(_, attributes)] = [(tag, attributes) for tag, attributes in _Seen(html_of(text)).elements if tag != "p"]
    assert attributes == {
        "href": address, "title": address, "target": "_blank", "rel": "noopener noreferrer nofollow"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[a](javascript:alert(1))", "[a](data:text/html,x)", "[a](vbscript:x)"])
def test_an_address_that_is_a_program_is_no_link(text: str) -> None:
    assert "<a" not in html_of(text)


@pytest.mark.parametrize("text", ["$x^2$", "so $\\frac{a}{b} < 3$ here", "$$\n\\sum_i i\n$$", "inline $$y$$"])
def test_formulas_are_mathml(text: str) -> None:
    assert "math" in {tag for tag, _ in _Seen(html_of(text)).elements}


@pytest.mark.parametrize(
    "text",
    [
        "$5 and $10",
        "`$HOME` is $PATH",
        "$\\frac{$",  # no formula
        "$\\style{background:url(http://x.invalid/)}{x}$",  # a formula that would fetch a picture
        "$\\href{javascript:alert(1)}{x}$",
        "$\\class{a}{x}$",
    ],
)
def test_what_is_no_formula_stays_as_it_is(text: str) -> None:
    seen = _Seen(html_of(text))
    assert seen.text.strip() == text.replace("`", "")
    assert {tag for tag, _ in seen.elements} <= {"p", "code", "span"}


def test_text_in_a_formula_stays_text() -> None:
    """The converter's own `convert` unescapes what it made, and a tag with it."""
    page = html_of("$\\text{<img src=x onerror=1>} \\& <b>$")
    assert not re.search("<(img|b)[ >]", page)
    assert "<img src=x onerror=1>" in _Seen(page).text.replace("\xa0", " ")


def test_markdown_is_markdown() -> None:
    page = html_of("# one\n\n- **two**\n- `three`\n\n| a | b |\n|---|---|\n| 1 | <2> |\n\n```html\n<b>\n```")
    tags = [tag for tag, _ in _Seen(page).elements]
    assert {"h1", "ul", "li", "strong", "code", "table", "pre"} <= set(tags)
    assert "&lt;2&gt;" in page and "&lt;b&gt;" in page
