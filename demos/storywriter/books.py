"""The text of a book from a file: plain text, Markdown, EPUB or PDF.

Not a converter: pictures, tables, notes and scanned pages are lost. A file is untrusted: its size is bounded before it
is read and while it unpacks, nothing outside it is opened, and whatever is wrong with it becomes a BookError, a
sentence for the reader. EPUB is a zip of XHTML, so the zip module and Beautiful Soup read it (EbookLib is AGPL); its
XML files, too, go through Beautiful Soup's `html.parser`, which expands no entities.
"""

import re
import warnings
import zipfile
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote

MAX_FILE_BYTES = 8 * 1024 * 1024
MAX_TEXT_CHARACTERS = 8_000_000  # War and Peace has 3.2 million
MAX_UNPACKED_BYTES = 64 * 1024 * 1024  # of an EPUB's chapters
MAX_PDF_PAGES = 3000
FORMATS = (".txt", ".md", ".epub", ".pdf")

_BLOCKS = ("p", "div", "li", "tr", "blockquote", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "pre")
_GUTENBERG = re.compile(r"^\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)


class BookError(Exception):
    """A file that cannot be read as a book, and why, in one sentence."""


def read_book(path: str | Path) -> str:
    """The text of a .txt, .md, .epub or .pdf file, paragraphs separated by blank lines. Raises BookError."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise BookError(f"`{path.name}` is of a kind that is not read here; give one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise BookError(f"`{path.name}` is no longer there; upload it again")
    n_bytes = path.stat().st_size
    if n_bytes > MAX_FILE_BYTES:
        limit = MAX_FILE_BYTES // 2**20
        raise BookError(f"`{path.name}` has {n_bytes / 2**20:.1f} MB, over the limit of {limit} MB; give a part of it")
    text = {".epub": _read_epub, ".pdf": _read_pdf}.get(kind, _read_text)(path)
    text = tidy(text)
    if not text:
        hint = "; its pages may be pictures, and need text recognition first" if kind == ".pdf" else ""
        raise BookError(f"`{path.name}` holds no text{hint}")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise BookError(f"`{path.name}` holds {len(text):,} characters, over the limit of {MAX_TEXT_CHARACTERS:,}")
    return text


def tidy(text: str) -> str:
    """A book's text without Project Gutenberg's frame, trailing blanks and runs of blank lines.

    The frame has to go: behind it a model would continue the licence instead of the story.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    marks = {mark[1]: mark for mark in _GUTENBERG.finditer(text)}
    start, end = marks.get("START"), marks.get("END")
    text = text[start.end() if start else 0 : end.start() if end else len(text)]
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\x00" in raw:
        raise BookError(f"`{path.name}` is no text file: it holds null bytes")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise BookError(
            f"`{path.name}` is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}; save it as UTF-8 and "
            "upload it again"
        ) from None


def _read_epub(path: Path) -> str:
    from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning  # here, so that a page opens before it is needed

    warnings.filterwarnings("ignore", category=XMLParsedAsHTMLWarning)  # on purpose: see above

    def parsed(name: str) -> BeautifulSoup:
        return BeautifulSoup(archive.read(name), "html.parser")

    try:
        with zipfile.ZipFile(path) as archive:
            package_name = parsed("META-INF/container.xml").find("rootfile")["full-path"]  # type: ignore[index]
            package = parsed(str(package_name))
            folder = dirname(str(package_name))
            items = {item.get("id"): item for item in package.find_all(re.compile(r"^(\w+:)?item$"))}
            spine = [items.get(ref.get("idref")) for ref in package.find_all(re.compile(r"^(\w+:)?itemref$"))]
            chapters = [
                normpath(join(folder, unquote(str(item.get("href")))))
                for item in spine
                if item is not None and "html" in str(item.get("media-type"))
            ]
            if sum(archive.getinfo(name).file_size for name in chapters) > MAX_UNPACKED_BYTES:
                raise BookError(f"`{path.name}` unpacks to over {MAX_UNPACKED_BYTES // 2**20} MB")
            return "\n\n\n".join(filter(None, (_chapter_text(parsed(name)) for name in chapters)))
    except (zipfile.BadZipFile, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        # KeyError: a file the book names is absent. TypeError: no rootfile. RuntimeError: encrypted (DRM), or nested
        # deeper than Python recurses.
        raise BookError(f"`{path.name}` is damaged, encrypted or no EPUB ({_brief(error)})") from None


def _chapter_text(page: "BeautifulSoup") -> str:  # type: ignore[name-defined]  # noqa: F821
    """The paragraphs of one XHTML page, separated by blank lines."""
    body = page.body or page
    for unread in body.find_all(["script", "style", "head", "nav"]):
        unread.decompose()
    for line_end in body.find_all("br"):
        line_end.replace_with("\x01")
    for block in body.find_all(_BLOCKS):
        block.insert_before("\x02")
        block.insert_after("\x02")
    text = re.sub(r"\s+", " ", body.get_text())
    paragraphs = (re.sub(r" ?\x01 ?", "\n", paragraph).strip() for paragraph in text.split("\x02"))
    return "\n\n".join(filter(None, paragraphs))


def _read_pdf(path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise BookError(f"`{path.name}` is locked with a password; save a copy without one")
        if len(reader.pages) > MAX_PDF_PAGES:
            raise BookError(f"`{path.name}` has {len(reader.pages)} pages, over the limit of {MAX_PDF_PAGES}")
        return _unwrap([page.extract_text() for page in reader.pages])
    except BookError:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        # pypdf raises these, too, from the depths of a damaged file.
        raise BookError(f"`{path.name}` is damaged or no PDF ({_brief(error)})") from None


def _unwrap(pages: list[str]) -> str:
    """The pages' lines joined into paragraphs, also across pages: a PDF knows lines only.

    A paragraph ends at an empty line, and at a line that closes a sentence well before the margin.
    """
    lines = [line.strip() for page in pages for line in page.splitlines()]
    margin = sorted(map(len, lines))[len(lines) * 9 // 10] if lines else 0
    paragraphs, open_paragraph = [], ""
    for line in lines:
        if open_paragraph.endswith("-") and line[:1].islower():
            open_paragraph = open_paragraph[:-1] + line
        else:
            open_paragraph = f"{open_paragraph} {line}".strip()
        is_end = not line or (len(line) < 0.8 * margin and line.endswith((".", "!", "?", "”", '"', "’", ":")))
        is_heading = open_paragraph == line and len(line) < 0.5 * margin
        if open_paragraph and (is_end or is_heading):
            paragraphs.append(open_paragraph)
            open_paragraph = ""
    return "\n\n".join(filter(None, [*paragraphs, open_paragraph]))


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120].strip(" .'\"") or type(error).__name__
