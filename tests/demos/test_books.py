"""A book becomes its text whatever it comes in, and a file that is none becomes a sentence."""

import io
import zipfile
from pathlib import Path

import pypdf
import pytest

from demos.storywriter import books
from demos.storywriter.books import BookError, read_book

CONTAINER = '<?xml version="1.0"?><container><rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf"><manifest>
<item id="two" href="text/chapter%202.xhtml" media-type="application/xhtml+xml"/>
<item id="one" href="text/one.xhtml" media-type="application/xhtml+xml"/>
<item id="look" href="look.css" media-type="text/css"/>
</manifest><spine><itemref idref="one"/><itemref idref="two"/></spine></package>"""
ONE = """<html><head><title>Not this</title><style>p {color: red}</style></head><body><h1>Chapter
 I</h1><p>She said: <i>“No&nbsp;&amp; no”</i>,<br/>and left.</p><div><p>Then it rained.</p></div></body></html>"""
TWO = "<html><head><title/></head><body><p>The end.</p><script>alert(1)</script></body></html>"


def write_epub(path: Path, files: dict[str, str] | None = None) -> Path:
    files = files or {
        "META-INF/container.xml": CONTAINER,
        "OEBPS/book.opf": PACKAGE,
        "OEBPS/text/one.xhtml": ONE,
        "OEBPS/text/chapter 2.xhtml": TWO,
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def pdf_of(pages: list[list[str]]) -> bytes:
    """A PDF written by hand, page by page and line by line: no library checks itself here."""
    fonts = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", fonts]
    kids = []
    for lines in pages:
        drawn = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
        stream = f"BT /F1 12 Tf 72 720 Td {drawn} ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    out, offsets = io.BytesIO(), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    out.write(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start))
    return out.getvalue()


@pytest.mark.parametrize("name", ["book.txt", "book.md", "BOOK.TXT"])
def test_text_is_read_without_trailing_blanks_and_windows_line_ends(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("\ufeffOne “day”.  \r\n\r\n\r\n\r\n\r\n\r\nTwo.\r\n\r\n".encode())
    assert read_book(path) == "One “day”.\n\n\nTwo."


def test_utf_16_with_its_mark_is_read(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Über alles", encoding="utf-16")
    assert read_book(path) == "Über alles"


def test_project_gutenbergs_frame_is_left_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(
        "Licence\n*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nEmma was clever.\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\nMore licence"
    )
    assert read_book(path) == "Emma was clever."


def test_epub_is_read_in_the_order_of_its_spine(tmp_path):
    text = read_book(write_epub(tmp_path / "book.epub"))
    assert text == "Chapter I\n\nShe said: “No & no”,\nand left.\n\nThen it rained.\n\n\nThe end."


def test_pdf_lines_become_paragraphs_across_pages(tmp_path):
    path = tmp_path / "book.pdf"
    first = [
        "It was a dark and stormy night, and the rain fell in tor-",
        "rents, except at occasional intervals, when it",
    ]
    path.write_bytes(
        pdf_of([first, ["was checked by a violent gust of wind.", "The lamps went out one after another in the"]])
    )
    assert read_book(path) == (
        "It was a dark and stormy night, and the rain fell in torrents, except at occasional intervals, when it was "
        "checked by a violent gust of wind.\n\nThe lamps went out one after another in the"
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("book.txt", "naïve".encode("latin-1"), "not UTF-8: byte 3 is 0xef"),
        ("book.txt", b"\x7fELF\x00\x00", "no text file"),
        ("book.txt", b"  \n\n ", "holds no text"),
        ("book.doc", b"hello", "a kind that is not read here"),
        ("book.epub", b"not a zip", "damaged, encrypted or no EPUB"),
        ("book.pdf", b"not a pdf", "damaged or no PDF"),
        ("book.pdf", pdf_of([["Hello"]])[:200], "damaged or no PDF"),
        ("book.pdf", pdf_of([[]]), "may be pictures"),
    ],
)
def test_what_is_no_book_is_refused_in_a_sentence(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BookError, match=says) as refused:
        read_book(path)
    assert f"`{name}`" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    "files",
    [
        {"META-INF/container.xml": "<container/>"},
        {"META-INF/container.xml": CONTAINER},
        {"META-INF/container.xml": CONTAINER, "OEBPS/book.opf": PACKAGE},
        {"META-INF/container.xml": CONTAINER.replace("full-path", "path")},
    ],
)
def test_an_epub_without_its_parts_is_refused_in_a_sentence(tmp_path, files):
    with pytest.raises(BookError, match="damaged, encrypted or no EPUB"):
        read_book(write_epub(tmp_path / "book.epub", files))


def test_an_epub_cannot_unpack_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(books, "MAX_UNPACKED_BYTES", 10)
    with pytest.raises(BookError, match="unpacks to over"):
        read_book(write_epub(tmp_path / "book.epub"))


def test_entities_of_an_epub_are_not_expanded(tmp_path):
    bomb = '<!DOCTYPE html [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;">]><html><body><p>x&b;y</p></body></html>'
    path = write_epub(
        tmp_path / "book.epub",
        {
            "META-INF/container.xml": CONTAINER,
            "OEBPS/book.opf": PACKAGE,
            "OEBPS/text/one.xhtml": bomb,
            "OEBPS/text/chapter 2.xhtml": TWO,
        },
    )
    assert "lol" not in read_book(path).replace('"lol"', "")


def test_a_file_over_the_limit_is_not_opened(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"a" * (books.MAX_FILE_BYTES + 1))
    with pytest.raises(BookError, match=r"8\.0 MB, over the limit of 8 MB"):
        read_book(path)


def test_a_locked_pdf_is_refused_in_a_sentence(tmp_path):
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_of([["Secret"]])))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(tmp_path / "book.pdf")
    with pytest.raises(BookError, match=r"locked with a password|damaged or no PDF"):
        read_book(tmp_path / "book.pdf")
