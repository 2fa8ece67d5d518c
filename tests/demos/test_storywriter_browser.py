"""The StoryWriter page in a real browser: a book goes in, its continuation comes out, the second from the cache."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")
pytest.importorskip("bs4", reason="the demos' readers are not installed: pip install -e .[demos]")

from tests.demos.conftest import SHORT  # noqa: E402

pytestmark = pytest.mark.browser
DATA = Path(os.environ.get("MPT_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))

CHAPTER = (
    "The harbour was grey that morning, and the boats lay still. Old Marten counted the gulls on the wall, as he had "
    "done every day since the ferry left. “She will come with the tide,” he said, and nobody answered him.\n\n"
)
LAST = (
    "On the last evening of September a light came round the point, low and yellow. Marten stood up. "
    "The gulls rose from the wall all at once, and for a long while there was no other sound.\n\n"
    "“I told you,” he said, to nobody, and went down the steps to take the rope.\n"
)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "The Harbour.txt"
    path.write_text("The Harbour\n\n" + CHAPTER * 55 + LAST, encoding="utf-8")
    return path


def give(page: Any, path: Path) -> None:
    page.locator("input[type=file]").set_input_files(str(path))


def open_settings(page: Any) -> None:
    """Long before a setting is changed: a drawer that has only now opened puts its own value into a box once more."""
    page.get_by_role("button", name="Settings").click()


def set_new_tokens(page: Any, n: int) -> None:
    box = page.get_by_role("spinbutton", name=re.compile("New tokens"))
    box.fill(str(n))
    box.press("Tab")


def done(page: Any) -> str:
    """The quiet line of a finished continuation."""
    line = page.locator(".mpt-quiet", has_text="tokens of context")
    line.wait_for(timeout=30_000)
    return str(line.inner_text())


def test_a_book_is_read_and_written_on(
    real_server: Any, show: Any, open_page: Any, screenshot: Any, book: Path
) -> None:
    page = open_page(show("storywriter", real_server.url))
    page.get_by_text("Model: mpt-tiny-storywriter, licence Apache-2.0.").wait_for()
    open_settings(page)
    give(page, book)
    page.get_by_text(re.compile(r"The Harbour\.txt: [\d,]+ of 65,536 tokens, room for")).wait_for()
    set_new_tokens(page, 64)

    page.get_by_role("button", name="Write on").click()
    page.get_by_role("progressbar", name="Reading").wait_for()
    assert re.search(r"words.* · [\d,]+ tokens read, first word after", done(page))
    written = page.locator("#story .written")
    first = str(written.text_content())
    assert first.startswith("EPILOGUE\n\n")
    assert len(first) > 30

    page.get_by_role("button", name="Continue").click()
    page.locator(".mpt-quiet", has_text="tokens from the cache").wait_for()
    from_cache = int(re.findall(r"([\d,]+) tokens from the cache", done(page))[0].replace(",", ""))
    assert from_cache > 1000
    assert str(written.text_content()).startswith(first)
    screenshot(page, "storywriter")

    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "The Harbour, continued.txt"
    assert Path(download.value.path()).read_text(encoding="utf-8").startswith("EPILOGUE\n\n")

    page.get_by_role("button", name="Undo").click()
    page.get_by_text("Took the last continuation back.").wait_for()
    assert written.text_content() == first


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_great_gatsby_is_read_and_its_epilogue_written(
    real_server: Any, show: Any, open_page: Any, screenshot: Any
) -> None:
    """MosaicML's example. To our small tokenizer the novel is 92,593 tokens, so the page cuts its beginning."""
    novel = DATA / "novels" / "the-great-gatsby.txt"
    if not novel.exists():
        pytest.skip(f"{novel} is not there; set MPT_TEST_DATA")
    page = open_page(show("storywriter", real_server.url))
    page.get_by_text("Model: mpt-tiny-storywriter, licence Apache-2.0.").wait_for()
    give(page, novel)
    page.get_by_text("the-great-gatsby.txt: 92,593 of 65,536 tokens: 27,057 too many.").wait_for()
    page.get_by_role("checkbox", name="Cut the beginning and keep the end").check()
    assert page.get_by_label("Then comes").input_value() == "EPILOGUE"

    began = time.monotonic()
    page.get_by_role("button", name="Write on").click()
    page.get_by_text(re.compile(r"Reading: [\d,]+ of [\d,]+ tokens, [\d,]+ tokens/s, \d+ s left")).wait_for()
    page.wait_for_timeout(5000)
    screenshot(page, "storywriter-reading")
    line = page.locator(".mpt-quiet", has_text="tokens of context")
    line.wait_for(timeout=240_000)
    print(f"{time.monotonic() - began:.1f} s in all: {line.inner_text()}")
    n_read = int(re.findall(r"([\d,]+) tokens read", str(line.inner_text()))[0].replace(",", ""))
    assert n_read > 60_000
    first = str(page.locator("#story .written").text_content())
    assert first.startswith("EPILOGUE\n\n")

    page.get_by_role("button", name="Continue").click()
    page.locator(".mpt-quiet", has_text="tokens from the cache").wait_for(timeout=60_000)
    again = done(page)
    print(again)
    assert int(re.findall(r"([\d,]+) tokens from the cache", again)[0].replace(",", "")) > 60_000
    assert float(re.findall(r"first word after ([\d.]+) s", again)[0]) < 2
    screenshot(page, "storywriter")

    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    exported = Path(download.value.path()).read_text(encoding="utf-8")
    assert exported.startswith(first.rstrip())
    assert len(exported) > len(first)


def test_a_book_too_long_is_told_in_numbers_and_can_be_cut(
    real_server: Any, show: Any, open_page: Any, book: Path
) -> None:
    page = open_page(show("storywriter", real_server.url))
    open_settings(page)
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=SHORT).click()
    page.get_by_text(f"Model: {SHORT}, licence Apache-2.0.").wait_for()
    give(page, book)
    page.get_by_text(re.compile(r"[\d,]+ of 1,024 tokens: [\d,]+ too many\. The beginning can be cut")).wait_for()
    set_new_tokens(page, 32)
    page.get_by_role("button", name="Write on").click()
    page.get_by_role("alert").get_by_text(
        re.compile(r"and 32 are to be written: [\d,]+ more than the 1,024")
    ).wait_for()

    page.get_by_role("checkbox", name="Cut the beginning and keep the end").check()
    page.get_by_role("button", name="Write on").click()
    assert "of the book is left out" in done(page)
    page.get_by_role("button", name="Continue").click()
    page.locator(".mpt-quiet", has_text="tokens from the cache").wait_for()


def test_on_a_phone_a_pasted_text_is_written_on_and_stopped(scripted: Any, show: Any, open_page: Any) -> None:
    scripted.context = 1000
    page = open_page(show("storywriter", scripted.url), width=390, height=844)
    page.get_by_label("Or paste one").fill("slow was the day, " + "and" * 200)
    page.get_by_label("Then comes").fill("")
    page.get_by_text("of 1,000 tokens, room for").wait_for()
    page.get_by_role("button", name="Write on").click()
    page.locator("#story", has_text="word3").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text(re.compile(r"Stopped( after \d+ words)?\.")).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Continue").wait_for()
    assert scripted.closed == 1


def test_a_file_that_is_no_book_is_refused_and_the_next_is_read(
    scripted: Any, show: Any, open_page: Any, tmp_path: Path
) -> None:
    page = open_page(show("storywriter", scripted.url))
    page.get_by_role("button", name="Write on").click()
    page.get_by_role("alert").get_by_text("Upload a book first, paste one, or take the sample.").wait_for()
    bad, good = tmp_path / "bad.txt", tmp_path / "good.md"
    bad.write_bytes("naïve".encode("latin-1"))
    give(page, bad)
    page.get_by_role("alert").get_by_text("bad.txt is not UTF-8: byte 3 is 0xef").wait_for()
    good.write_text("# Title\n\nbusy <script>alert(1)</script>")
    give(page, good)
    page.get_by_text("good.md: 4 of 100 tokens").wait_for()
    page.locator("#story", has_text="<script>").wait_for()
