"""The StoryWriter page without a browser: what goes to the server, and what the page becomes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")
pytest.importorskip("bs4", reason="the demos' readers are not installed: pip install -e .[demos]")

from demos.mpt_space import Server  # noqa: E402
from demos.storywriter.layout import Layout  # noqa: E402
from demos.storywriter.presenter import StoryWriterPresenter  # noqa: E402
from demos.storywriter.story import Book, Story  # noqa: E402
from tests.demos.presenting import all_of, leave_after, page_after, until  # noqa: E402

SETTINGS = (False, None, 0.8, 1, 20)  # cut the beginning, model, temperature, top-p, tokens


@pytest.fixture
def presenter(scripted: Any) -> StoryWriterPresenter:
    with gr.Blocks():
        return StoryWriterPresenter(Server(scripted.url), Layout())


def buttons(page: dict[Any, Any], layout: Layout) -> list[Any]:
    """Whether Write on, Stop, Undo and Export can be pressed; of the first two one is there."""
    shown = [page[button]["visible"] for button in (layout.write, layout.stop)]
    return shown + [page[button]["interactive"] for button in (layout.undo, layout.export)]


async def test_a_file_is_measured_and_deleted(presenter: Any, tmp_path: Path) -> None:
    path = tmp_path / "Tale.txt"
    path.write_text("one two three")
    page = page_after(await all_of(presenter.take_file(str(path), None, False)))
    assert not path.exists()
    assert page[presenter.layout.book]["value"] == Book("Tale.txt", "one two three")
    assert "3 of 100 tokens, room for 97 more." in page[presenter.layout.measure]["value"]
    assert not page[presenter.layout.keep_end]["visible"]
    assert buttons(page, presenter.layout) == [True, False, False, False]


async def test_a_file_that_is_no_book_is_deleted_too(presenter: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes("naïve".encode("latin-1"))
    page = page_after(await all_of(presenter.take_file(str(path), None, False)))
    assert not path.exists()
    assert "<code>bad.txt</code> is not UTF-8: byte 3 is 0xef" in page[presenter.layout.measure]["value"]
    assert presenter.layout.book not in page


async def test_the_sample_is_a_book_that_stays_where_it_is(presenter: Any) -> None:
    for _ in range(2):
        page = page_after(await all_of(presenter.take_sample(None, False)))
        book = page[presenter.layout.book]["value"]
        assert book.text.startswith("Alice’s Adventures in Wonderland")
        assert book.text.endswith("the happy summer days.")


async def test_no_book_is_taken_while_another_is_continued(presenter: Any, tmp_path: Path) -> None:
    path = tmp_path / "Tale.txt"
    path.write_text("one")
    taken = await all_of(presenter.take_file(str(path), None, True)) + await all_of(presenter.take_sample(None, True))
    assert not path.exists()
    for update in taken:
        assert "Stop the writing first" in update[presenter.layout.measure]
        assert presenter.layout.book not in update and presenter.layout.story not in update
    assert await all_of(presenter.take_paste("one", None, True, None)) == []


async def test_a_pasted_text_is_a_book_unless_one_was_uploaded(presenter: Any) -> None:
    page = page_after(await all_of(presenter.take_paste("word " * 101, None, False, None)))
    assert "101 of 100 tokens: 1 too many." in page[presenter.layout.measure]["value"]
    assert page[presenter.layout.keep_end]["visible"]
    book = page[presenter.layout.book]["value"]
    assert await all_of(presenter.take_paste("word " * 101, None, False, book)) == []  # the same again
    assert await all_of(presenter.take_paste("other", None, False, Book("Tale.txt", "one"))) == []


async def test_a_continuation_is_written_under_its_ending_and_the_next_under_it(scripted: Any, presenter: Any) -> None:
    layout, book = presenter.layout, Book("Tale.txt", "one two")
    updates = await all_of(presenter.write_on(book, Story(), "", " END ", *SETTINGS))
    assert scripted.bodies[-1]["prompt"] == "one two\n\n\nEND\n\n"
    assert {name: scripted.bodies[-1].get(name) for name in ("temperature", "top_p", "max_tokens")} == {
        "temperature": 0.8, "top_p": None, "max_tokens": 20
    }  # fmt: skip
    page = page_after(updates)
    story = page[layout.story]["value"]
    assert story == Story("END", ("one two\n\n\nEND\n\n",))  # it repeats what it read
    assert "3 words · 3 tokens read, first word after" in page[layout.status]["value"]
    assert "6 of 100 tokens of context" in page[layout.status]["value"]
    assert page[layout.write]["value"] == "Continue"
    assert buttons(page_after(updates[:1]), layout) == [False, True, False, False]
    assert buttons(page, layout) == [True, False, True, True]

    await all_of(presenter.write_on(book, story, "", "ignored now", *SETTINGS))
    assert scripted.bodies[-1]["prompt"] == "one two\n\n\nEND\n\none two\n\n\nEND\n\n"


async def test_the_reading_is_shown_before_the_writing(presenter: Any) -> None:
    layout, book = presenter.layout, Book("Tale.txt", "read these four words")
    updates = await all_of(presenter.write_on(book, Story(), "", "", *SETTINGS))
    lines = [str(update.get(layout.status)) for update in updates]
    half = next(n for n, line in enumerate(lines) if "Reading: 2 of 4 tokens" in line)
    whole = next(n for n, line in enumerate(lines) if "Reading: 4 of 4 tokens, 10 tokens/s" in line)
    written = next(n for n, update in enumerate(updates) if layout.story in update)
    assert half < whole < written


async def test_taking_back_leaves_what_was_before(presenter: Any) -> None:
    layout, book = presenter.layout, Book("Tale.txt", "one")
    page = page_after([presenter.take_back(book, Story("END", ("two", "three"), 1))])
    assert page[layout.story]["value"] == Story("END", ("two",), 1)
    assert buttons(page, layout) == [True, False, True, True]
    page = page_after([presenter.take_back(book, Story("END", ("two",)))])
    assert page[layout.story]["value"] == Story("END", ())
    assert buttons(page, layout) == [True, False, False, False]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("busy", "its queue is full; try again in 7 s."), ("break", "ended the stream in the middle")],
)
async def test_trouble_is_a_sentence_and_keeps_what_was_written(presenter: Any, text: str, sentence: str) -> None:
    layout = presenter.layout
    page = page_after(await all_of(presenter.write_on(Book("Tale.txt", text), Story(), "", "", *SETTINGS)))
    assert 'role="alert"' in page[layout.status]["value"]
    assert sentence in page[layout.status]["value"]
    if text == "break":
        assert page[layout.story]["value"] == Story("", ("It began well ",))
    assert buttons(page, layout) == [True, False, text == "break", text == "break"]


async def test_a_book_too_long_is_told_and_cut_only_when_asked(scripted: Any, presenter: Any) -> None:
    scripted.shows_tokens = True
    layout, book = presenter.layout, Book("Tale.txt", " ".join(f"w{n}" for n in range(150)))
    page = page_after(await all_of(presenter.write_on(book, Story(), "", "", *SETTINGS)))
    assert "too long for the model" in page[layout.status]["value"]
    assert page[layout.keep_end]["visible"]
    assert scripted.bodies == []

    page = page_after(await all_of(presenter.write_on(book, Story(), "", "", True, *SETTINGS[1:])))
    # 100 tokens less 20 new ones, less 12 (an eighth of the context) for the next continuation: the last 68
    assert scripted.bodies[-1]["prompt"].split() == [f"w{n}" for n in range(82, 150)]
    share = page[layout.story]["value"].start / len(book.text)
    assert f"the first {share:.0%} of the book is left out" in page[layout.status]["value"]


async def test_closing_the_handler_frees_the_server_and_the_page_counts_the_words(
    scripted: Any, presenter: Any
) -> None:
    layout = presenter.layout
    writing = presenter.write_on(Book("Tale.txt", "slow tale"), Story(), "", "", *SETTINGS)
    update = await leave_after(writing, lambda update: "word2" in str(update.get(layout.story)))
    await until(lambda: scripted.closed == 1)
    page = page_after([presenter.rest(update[layout.story], True)])
    assert f"Stopped after {len(update[layout.story].written.split())} words." in page[layout.status]["value"]
    assert buttons(page, layout) == [True, False, True, True]
    assert presenter.rest(Story(), False) == {layout.is_writing: False}


async def test_a_silent_server_gives_gradio_a_chance_to_see_that_the_tab_is_closed(
    scripted: Any, presenter: Any
) -> None:
    writing = presenter.write_on(Book("Tale.txt", "silent tale"), Story(), "", "", *SETTINGS)
    await asyncio.wait_for(leave_after(writing, lambda update: update == {presenter.layout.status: gr.skip()}), 5)
    await until(lambda: scripted.closed == 1)


async def test_without_a_book_nobody_is_asked(scripted: Any, presenter: Any) -> None:
    page = page_after(await all_of(presenter.write_on(None, Story(), " ", "END", *SETTINGS)))
    assert "Upload a book first, paste one, or take the sample." in page[presenter.layout.status]["value"]
    assert scripted.started == 0
