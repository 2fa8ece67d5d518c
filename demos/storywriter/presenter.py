"""What happens on the StoryWriter page: a book is taken and measured, then continued, again and again.

No layout is here. A visitor's state, which is the book and the story, is in the page, so one presenter serves all
visitors.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.storywriter import book_html
    from demos.storywriter.books import BookError, read_book
    from demos.storywriter.layout import Layout
    from demos.storywriter.story import Book, Story, continuation, pasted, start_that_fits, storywriters_first
except ImportError:  # a copied Space has the modules beside it
    import book_html  # type: ignore[no-redef]
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from books import BookError, read_book  # type: ignore[no-redef]
    from layout import Layout  # type: ignore[no-redef]
    from story import (  # type: ignore[no-redef]
        Book,
        Story,
        continuation,
        pasted,
        start_that_fits,
        storywriters_first,
    )

REDRAW_S = 0.08  # the whole continuation is sent each time
SAMPLE = ("Alice in Wonderland, the last two chapters", "alice.txt")
Update = dict[Any, Any]  # a component of the layout: what it becomes


@dataclass(frozen=True)
class Settings:
    """The choices for a continuation, in the order of the page."""

    may_cut: bool
    model: str | None
    temperature: float
    top_p: float
    max_tokens: float

    def parameters(self) -> dict[str, Any]:
        """What goes to the server."""
        top_p = self.top_p if self.top_p < 1 else None
        return {"temperature": self.temperature, "top_p": top_p, "max_tokens": int(self.max_tokens)}


class Writing:
    """One continuation while it is written."""

    def __init__(self, book: Book, before: Story) -> None:
        self.book, self.before = book, before
        self.answer = mpt_page.Answer(REDRAW_S)
        self.progress: list[dict[str, int]] = []  # of the reading, the newest last

    @property
    def story(self) -> Story:
        """What was written before, and what has come so far."""
        return self.before.continued(self.answer.text) if self.answer.text else self.before


class StoryWriterPresenter:
    """The event handlers of the page, for the models of a server."""

    def __init__(self, server: mpt_space.Server, layout: Layout) -> None:
        self.server, self.layout = server, layout

    # -- the page and its model ----------------------------------------------------------------------------------------

    async def measure_again(self, model: str | None, book: Book | None) -> Update:
        """For another model."""
        if book is None:
            return {self.layout.measure: gr.skip()}
        try:
            return await self._measured(book, await self._card(model))
        except mpt_space.SpaceError as error:
            return {self.layout.measure: mpt_page.trouble(error.sentence)}

    async def _card(self, model: str | None) -> mpt_space.Card:
        return mpt_space.pick(storywriters_first(await self.server.models()), model)

    # -- a book --------------------------------------------------------------------------------------------------------

    async def take_file(self, path: str | None, model: str | None, is_writing: bool) -> AsyncGenerator[Update, None]:
        """Read an uploaded file and delete it."""
        if path is None:
            return
        if is_writing:
            Path(path).unlink(missing_ok=True)
            yield {self.layout.upload: None, **self._not_now()}
            return
        name = Path(path).name
        yield {self.layout.measure: mpt_page.quiet(f"Opening {name} ...")}
        try:
            text = await asyncio.to_thread(read_book, path)
        except BookError as error:
            yield {self.layout.upload: None, self.layout.measure: mpt_page.trouble(f"{error}.")}
            return
        finally:
            Path(path).unlink(missing_ok=True)
        async with aclosing(self._open(Book(name, text), model)) as updates:
            async for update in updates:
                yield {self.layout.upload: None, **update}

    async def take_sample(self, model: str | None, is_writing: bool) -> AsyncGenerator[Update, None]:
        """A book of the public domain, for who has none at hand."""
        if is_writing:
            yield self._not_now()
            return
        name, file = SAMPLE
        text = await asyncio.to_thread(read_book, Path(__file__).parent / file)
        async with aclosing(self._open(Book(name, text), model)) as updates:
            async for update in updates:
                yield update

    async def take_paste(
        self, text: str, model: str | None, is_writing: bool, now: Book | None
    ) -> AsyncGenerator[Update, None]:
        """The text of the box, unless `write_on` is to find it there."""
        book = None if is_writing else pasted(text, now)
        if book is not None:
            async with aclosing(self._open(book, model)) as updates:
                async for update in updates:
                    yield update

    def _not_now(self) -> Update:
        """A continuation that still comes would put another book away."""
        return {self.layout.measure: mpt_page.trouble("Stop the writing first, then take another book.")}

    async def _open(self, book: Book, model: str | None) -> AsyncGenerator[Update, None]:
        """Show a new book in place of the one before, then its length."""
        story = Story()
        yield {
            **self._shown(book, story),
            self.layout.book: book,
            self.layout.measure: mpt_page.quiet(f"Counting the tokens of {book.name} ..."),
            self.layout.status: "",
            self.layout.keep_end: gr.update(value=False, visible=False),
            **self._at_rest(story),
        }
        try:
            yield await self._measured(book, await self._card(model))
        except mpt_space.SpaceError as error:
            yield {self.layout.measure: mpt_page.trouble(error.sentence)}

    async def _measured(self, book: Book, card: mpt_space.Card) -> Update:
        """How much of the context a book takes, and whether its beginning has to go."""
        limit = mpt_space.context_length(card)
        try:
            n_tokens = await self.server.count(card["id"], book.text)
        except mpt_space.SpaceError as error:
            return self._not_measured(book, error)
        is_over = limit is not None and n_tokens > limit
        measure = book_html.measure(book.name, n_tokens, limit, card["id"])
        return {self.layout.measure: measure, self.layout.keep_end: gr.update(visible=is_over)}

    def _not_measured(self, book: Book, error: mpt_space.SpaceError) -> Update:
        measure = self.layout.measure
        if error.code == "context_length_exceeded":  # too long even to be counted
            sentence = f"{book.name}: {error.sentence} {book_html.CUTTING}"
            return {measure: mpt_page.trouble(sentence), self.layout.keep_end: gr.update(visible=True)}
        if error.code in ("unreachable", "invalid_api_key"):
            return {measure: mpt_page.trouble(error.sentence)}
        line = f"{book.name}: {len(book.text):,} characters; this server counts no tokens."
        return {measure: mpt_page.quiet(line)}

    # -- a continuation ------------------------------------------------------------------------------------------------

    async def write_on(
        self, book: Book | None, story: Story, text: str, ending: str, *settings: Any
    ) -> AsyncGenerator[Update, None]:
        """Stream a continuation of the book and the story; what goes wrong becomes a sentence above it.

        text, ending: what stands in the boxes for a pasted book and for what comes after the book.
        """
        if (new_book := pasted(text, book)) is not None:
            book, story = new_book, Story()
            yield {self.layout.book: book, self.layout.story: story}
        if book is None:
            yield {self.layout.status: mpt_page.trouble("Upload a book first, paste one, or take the sample.")}
            return
        if not story.continuations:
            story = Story(ending.strip(), (), story.start)
        yield self._begun(book, story)
        writing, chosen = Writing(book, story), Settings(*settings)
        try:
            async with aclosing(self._written(writing, chosen)) as updates:
                async for update in updates:
                    yield update
        except mpt_space.SpaceError as error:
            yield self._broken_off(writing, error, int(chosen.max_tokens))

    async def _written(self, writing: Writing, settings: Settings) -> AsyncGenerator[Update, None]:
        """The reading, the continuation as it grows, and the finished one. Raises SpaceError."""
        card = await self._card(settings.model)
        async with aclosing(self._pieces(writing, card, settings)) as pieces:
            async for piece in pieces:
                writing.answer.add(piece)
                if piece == mpt_space.Piece():  # Gradio sees that a tab is closed only when it is handed something
                    yield {self.layout.status: gr.skip()}
                if piece.notice:
                    yield {self.layout.status: mpt_page.quiet(piece.notice)}
                if piece.progress and not writing.answer.text:
                    writing.progress.append(piece.progress)
                    yield {self.layout.status: book_html.reading(writing.progress)}
                if piece.text and writing.answer.is_due():
                    line = mpt_page.quiet(book_html.line(writing.answer.text, writing.answer.numbers))
                    yield {**self._shown(writing.book, writing.story), self.layout.status: line}
        yield self._finished(writing)

    async def _pieces(
        self, writing: Writing, card: mpt_space.Card, settings: Settings
    ) -> AsyncGenerator[mpt_space.Piece, None]:
        """The stream of a continuation; of a book that is too long, after its beginning is cut, if that is wanted."""
        parameters = settings.parameters()
        for may_cut in (settings.may_cut, False):
            n_pieces = 0
            writing.answer.begin(card)
            prompt = writing.before.prompt(writing.book)
            try:
                async with aclosing(continuation(self.server, card["id"], prompt, parameters)) as pieces:
                    async for piece in pieces:
                        n_pieces += 1
                        yield piece
                return
            except mpt_space.SpaceError as error:
                if error.code != "context_length_exceeded" or not may_cut or n_pieces:
                    raise
            start = await start_that_fits(self.server, card, writing.book, writing.before, parameters["max_tokens"])
            writing.before = replace(writing.before, start=start)

    def take_back(self, book: Book | None, story: Story) -> Update:
        """The story without its last continuation."""
        story = story.without_the_last()
        status = mpt_page.quiet("Took the last continuation back.")
        return {**self._shown(book, story), self.layout.status: status, **self._at_rest(story)}

    def rest(self, story: Story, was_writing: bool) -> Update:
        """After a continuation: say so if it was stopped."""
        if not was_writing:
            return {self.layout.is_writing: False}
        n_words = len(story.continuations[-1].split()) if story.continuations else 0
        sentence = f"Stopped after {n_words:,} words." if n_words else "Stopped."
        return {self.layout.status: mpt_page.quiet(sentence), **self._at_rest(story)}

    # -- what the page becomes -----------------------------------------------------------------------------------------

    def _shown(self, book: Book | None, story: Story) -> Update:
        return {self.layout.story: story, self.layout.paper: book_html.paper(book, story)}

    def _begun(self, book: Book, story: Story) -> Update:
        write, stop = mpt_page.busy()
        return {
            self.layout.paper: book_html.paper(book, story),
            self.layout.status: book_html.reading([]),
            self.layout.write: write,
            self.layout.stop: stop,
            self.layout.undo: gr.update(interactive=False),
            self.layout.export: gr.update(interactive=False),
            self.layout.is_writing: True,
        }

    def _at_rest(self, story: Story) -> Update:
        has_text = bool(story.continuations)
        return {
            self.layout.write: gr.update(value="Continue" if has_text else "Write on", visible=True),
            self.layout.stop: gr.update(visible=False),
            self.layout.undo: gr.update(interactive=has_text),
            self.layout.export: gr.update(interactive=has_text),
            self.layout.is_writing: False,
        }

    def _finished(self, writing: Writing) -> Update:
        answer, story = writing.answer, writing.story
        if not answer.text.strip():
            sentence = "The model ended the book here: it wrote nothing more."
            return {self.layout.status: mpt_page.quiet(sentence), **self._at_rest(writing.before)}
        share = story.start / len(writing.book.text)
        left_out = f"the first {share:.0%} of the book is left out" if story.start else ""
        line = book_html.line(answer.text, answer.numbers)
        status = mpt_page.quiet(mpt_page.join([line, answer.numbers.context_line(), left_out]))
        return {**self._shown(writing.book, story), self.layout.status: status, **self._at_rest(story)}

    def _broken_off(self, writing: Writing, error: mpt_space.SpaceError, n_new: int) -> Update:
        if error.code != "context_length_exceeded":
            return {self.layout.status: mpt_page.trouble(error.sentence), **self._at_rest(writing.story)}
        return {
            self.layout.status: mpt_page.trouble(book_html.too_long(error, n_new)),
            self.layout.keep_end: gr.update(visible=True),
            **self._at_rest(writing.story),
        }
