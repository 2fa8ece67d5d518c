"""A book, the story written on after it, and the requests that write it. Without Gradio, and without HTML."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

try:
    from demos.mpt_space import Card, Piece, Server, SpaceError, context_length
    from demos.storywriter.books import tidy
except ImportError:  # a copied Space has the modules beside it
    from books import tidy  # type: ignore[no-redef]
    from mpt_space import Card, Piece, Server, SpaceError, context_length  # type: ignore[no-redef]


@dataclass(frozen=True)
class Book:
    name: str
    text: str
    is_pasted: bool = False


@dataclass(frozen=True)
class Story:
    """What was written: each continuation, under the ending it began with.

    start: the first character of the book that is read, over 0 where its beginning was cut to make room; kept between
    continuations, because another beginning would have to be read anew.
    """

    ending: str = ""
    continuations: tuple[str, ...] = ()
    start: int = 0

    @property
    def written(self) -> str:
        heading = f"{self.ending}\n\n" if self.ending else ""
        return heading + "".join(self.continuations)

    def prompt(self, book: Book) -> str:
        gap = "\n\n\n" if self.ending else ""
        return f"{book.text[self.start :]}{gap}{self.written}"

    def continued(self, text: str) -> "Story":
        """With one more continuation."""
        return replace(self, continuations=(*self.continuations, text))

    def without_the_last(self) -> "Story":
        return replace(self, continuations=self.continuations[:-1])


def pasted(text: str, now: Book | None) -> Book | None:
    """The pasted text as a book, if it is another one than now; an uploaded book goes before it."""
    text = tidy(text)
    if not text or (now is not None and not now.is_pasted):
        return None
    book = Book("The pasted text", text, is_pasted=True)
    return book if book != now else None


def storywriters_first(cards: list[Card]) -> list[Card]:
    """StoryWriters, then other base models, each kind by its context."""
    return sorted(
        cards,
        key=lambda card: (
            "storywriter" not in card["id"],
            card.get("prompt_style", "none") != "none",
            -(context_length(card) or 0),
        ),
    )


async def continuation(
    server: Server, model: str, prompt: str, parameters: dict[str, Any]
) -> AsyncGenerator[Piece, None]:
    """The stream of a continuation, with reading progress where the server has it. Raises SpaceError."""
    for progress in (True, False):
        n_pieces = 0
        try:
            async with aclosing(server.complete(model, prompt, progress=progress, **parameters)) as pieces:
                async for piece in pieces:
                    n_pieces += 1
                    yield piece
            return
        except SpaceError as error:
            refusals = ("unknown_parameter", "unsupported_parameter")
            is_unknown = error.code in refusals or "include_progress" in error.sentence
            if not progress or n_pieces or not is_unknown:
                raise


async def start_that_fits(server: Server, card: Card, book: Book, story: Story, n_new: int) -> int:
    """Where in the book to begin so that the rest, what was written and what is to come fit; at a paragraph.

    Some more is cut, so that the next continuations fit as well and find their beginning in the server's cache.
    """
    limit = context_length(card)
    if limit is None:
        raise SpaceError("The server does not say how much the model can read, so the book cannot be cut to it.")
    n_keep = limit - n_new - min(3 * n_new, limit // 8)
    text = story.prompt(book)
    n_cut, ids = await _tokens_of_the_end(server, card["id"], text, limit)
    if n_keep < 1 or len(ids) <= n_keep:
        return story.start + n_cut
    kept = await server.detokenize(card["id"], ids[-n_keep:])
    n_cut = max(n_cut, len(text) - len(kept))
    paragraph = text.find("\n\n", n_cut, n_cut + 4000)
    n_cut = paragraph + 2 if paragraph >= 0 else n_cut
    if story.start + n_cut >= len(book.text):
        raise SpaceError("What was written fills the model's context by itself; undo some of it.")
    return story.start + n_cut


async def _tokens_of_the_end(server: Server, model: str, text: str, limit: int) -> tuple[int, list[int]]:
    """How many characters were cut before the server would count, and the tokens of what is left."""
    n_cut = 0
    while True:
        try:
            return n_cut, await server.tokenize(model, text[n_cut:])
        except SpaceError as error:  # too long even to be counted
            if error.code != "context_length_exceeded" or len(text) - n_cut < limit:
                raise
            n_cut += (len(text) - n_cut) // 2
