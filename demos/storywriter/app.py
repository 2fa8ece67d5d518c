"""The StoryWriter page: a whole book goes in, the model reads it to the end and writes on.

A Gradio Space and a client of an OpenAI-style server (`MPT_URL`, `MPT_API_KEY`). The worked example is MosaicML's: all
of The Great Gatsby, then "EPILOGUE". What takes long is reading, so the page shows it; the server keeps what it has
read, so the second continuation begins at once. The book lives in this process only while the page is open, and an
uploaded file is deleted as soon as it is read.
"""

import asyncio
import html
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

try:
    from demos.mpt_space import (
        Card,
        Numbers,
        Piece,
        Server,
        SpaceError,
        context_length,
        join,
        launch_options,
        licence_note,
    )
    from demos.storywriter.books import FORMATS, MAX_TEXT_CHARACTERS, BookError, read_book, tidy
except ModuleNotFoundError:  # this folder, copied alone as a Space
    from books import FORMATS, MAX_TEXT_CHARACTERS, BookError, read_book, tidy  # type: ignore[no-redef]
    from mpt_space import (  # type: ignore[no-redef]
        Card,
        Numbers,
        Piece,
        Server,
        SpaceError,
        context_length,
        join,
        launch_options,
        licence_note,
    )

_DRAW_EVERY_S = 0.08
_TAIL_CHARACTERS = 700  # of the book, shown before the continuation
_ALIBI_REACHES = 83_968  # the longest prompt MosaicML wrote on from, with a model trained to 65,536

PRIVACY = (
    "This page logs nothing. An uploaded file is deleted as soon as it is read; its text stays in this page's memory "
    "until you close it, and goes to the server only to be continued. What a language model writes can be wrong or offensive."
)

CSS = """
.bare, .bare .html-container {padding: 0 !important}
.mpt-quiet {font-size: 0.875rem; color: color-mix(in srgb, var(--body-text-color) 72%, transparent);
  overflow-wrap: anywhere; line-height: 1.5; margin: 0 0 0.25rem}
.mpt-trouble {margin: 0; padding: 0.5rem 0.75rem; border-left: 4px solid #dc2626; border-radius: 4px; line-height: 1.45;
  background: var(--background-fill-secondary); color: var(--body-text-color); overflow-wrap: anywhere}
.mpt-measure {margin: 0 0 0.4rem; line-height: 1.5; color: var(--body-text-color); overflow-wrap: anywhere}
.mpt-bar {display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--border-color-primary)}
.mpt-bar .fits {background: var(--color-accent); transition: width 0.2s}
.mpt-bar .over {background: repeating-linear-gradient(45deg, #dc2626 0 5px, #fca5a5 5px 8px)}
.mpt-bar .waits {width: 25%; background: var(--color-accent); animation: mpt-waits 1.6s ease-in-out infinite alternate}
@keyframes mpt-waits {to {margin-left: 75%}}
@media (prefers-reduced-motion: reduce) {.mpt-bar .waits {animation: none}}
.paper {background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 1.25rem 1.5rem; min-height: 16rem; max-height: 32rem; overflow-y: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 1.05rem/1.65 Georgia, "Iowan Old Style", "DejaVu Serif", serif;
  color: var(--body-text-color)}
.paper .before {opacity: 0.7}
.paper .hint {opacity: 0.7; font-style: italic}
@media (max-width: 480px) {.paper {padding: 0.9rem 1rem; font-size: 1rem; max-height: 26rem}}
"""

# The text is in the page already: nothing is written on the server to export it.
_EXPORT = """() => {
  const written = document.querySelector("#story .written");
  if (!written || !written.textContent) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([written.textContent.trim() + "\\n"], {type: "text/plain;charset=utf-8"}));
  link.download = written.dataset.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
_FOLLOW = """
const follow = () => {
  const paper = element.querySelector(".paper");
  if (paper) paper.scrollTop = paper.scrollHeight;
};
follow(); watch("value", follow);
"""


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
        return (
            f"{book.text[self.start :]}\n\n\n{self.written}" if self.ending else book.text[self.start :] + self.written
        )


def build(server: Server) -> gr.Blocks:
    """The page, for the models of a server."""
    bare: dict[str, Any] = {"padding": False, "apply_default_css": False, "elem_classes": "bare"}
    with gr.Blocks(title="MPT StoryWriter", analytics_enabled=False) as page:
        gr.HTML(f"<style>{CSS}</style>", **bare)
        gr.Markdown("# MPT StoryWriter\nGive it a whole book. It reads to the last page, and writes on.")
        book, story = gr.State(None), gr.State(Story())
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                upload = gr.File(
                    label=f"A book: {', '.join(FORMATS)}, up to 8 MB", file_types=list(FORMATS), height=140
                )
                paste = gr.Textbox(
                    label="Or paste one",
                    placeholder="The whole text, or its last chapters",
                    lines=3,
                    max_lines=6,
                    max_length=MAX_TEXT_CHARACTERS,
                )
                ending = gr.Textbox(
                    "EPILOGUE",
                    label="Then comes",
                    info="put after the book; empty to go on where it stops",
                    max_length=500,
                )
                with gr.Accordion("Model and settings", open=False):
                    model = gr.Dropdown(label="Model", choices=[], interactive=True)
                    temperature = gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", info="0 is greedy")
                    top_p = gr.Slider(0.01, 1, value=1, step=0.01, label="Top-p", info="1 is off")
                    max_tokens = gr.Slider(16, 2048, value=256, step=16, label="New tokens for each continuation")
            with gr.Column(scale=3, min_width=320):
                measure = gr.HTML("", **bare)
                keep_end = gr.Checkbox(
                    label="Cut the beginning and keep the end", value=False, visible=False, interactive=True
                )
                with gr.Row():  # above the text, which grows
                    write = gr.Button("Write on", variant="primary", min_width=100, size="md")
                    stop = gr.Button("Stop", variant="stop", min_width=80, size="md", interactive=False)
                    undo = gr.Button("Undo", min_width=80, size="md", interactive=False)
                    export = gr.Button("Export as text", min_width=120, size="md", interactive=False)
                status = gr.HTML("", **bare)
                paper = gr.HTML(_paper(None, Story()), elem_id="story", js_on_load=_FOLLOW, **bare)
        note = gr.HTML(_note(None), **bare)
        buttons = [write, stop, undo, export]
        is_writing = gr.State(False)  # still true after a continuation: it was stopped

        def at_rest(now: Story) -> dict[Any, Any]:
            has_text = bool(now.continuations)
            return {
                write: gr.update(value="Continue" if has_text else "Write on", interactive=True),
                stop: gr.update(interactive=False),
                undo: gr.update(interactive=has_text),
                export: gr.update(interactive=has_text),
                is_writing: False,
            }

        async def measured(taken: Book, card: Card) -> dict[Any, Any]:
            """How much of the context a book takes, and whether its beginning has to go."""
            limit = context_length(card)
            try:
                n_tokens = await server.count(card["id"], taken.text)
            except SpaceError as error:
                if error.code == "context_length_exceeded":  # too long even to be counted
                    return {measure: _trouble(f"{taken.name}: {error} {_CUTTING}"), keep_end: gr.update(visible=True)}
                if error.code in ("unreachable", "invalid_api_key"):
                    return {measure: _trouble(str(error))}
                return {measure: _quiet(f"{taken.name}: {len(taken.text):,} characters; this server counts no tokens.")}
            is_over = limit is not None and n_tokens > limit
            return {measure: _measure(taken.name, n_tokens, limit, card["id"]), keep_end: gr.update(visible=is_over)}

        async def take_file(path: str | None, model_id: str | None) -> AsyncIterator[dict[Any, Any]]:
            if path is None:
                return
            name = Path(path).name
            yield {measure: _quiet(f"Opening {name} ...")}
            try:
                text = await asyncio.to_thread(read_book, path)
            except BookError as error:
                yield {upload: None, measure: _trouble(f"{error}.")}
                return
            finally:
                Path(path).unlink(missing_ok=True)
            async for update in open_book(Book(name, text), model_id):
                yield {upload: None, **update}

        async def take_paste(text: str, model_id: str | None, now: Book | None) -> AsyncIterator[dict[Any, Any]]:
            pasted = _pasted(text, now)
            if pasted is not None and pasted != now:
                async for update in open_book(pasted, model_id):
                    yield update

        async def open_book(taken: Book, model_id: str | None) -> AsyncIterator[dict[Any, Any]]:
            yield {
                book: taken,
                story: Story(),
                paper: _paper(taken, Story()),
                measure: _quiet(f"Counting the tokens of {taken.name} ..."),
                status: "",
                keep_end: gr.update(value=False, visible=False),
                **at_rest(Story()),
            }
            try:
                yield await measured(taken, await _card(server, model_id))
            except SpaceError as error:
                yield {measure: _trouble(str(error))}

        async def write_on(
            taken: Book | None,
            now: Story,
            text: str,
            then: str,
            cut: bool,
            model_id: str | None,
            temperature: float,
            top_p: float,
            max_tokens: float,
        ) -> AsyncIterator[dict[Any, Any]]:
            pasted = _pasted(text, taken)
            if pasted is not None and pasted != taken:
                taken, now = pasted, Story()
                yield {book: taken, story: now}
            if taken is None:
                yield {status: _trouble("Upload a book first, or paste one.")}
                return
            if not now.continuations:
                now = Story(then.strip(), (), now.start)
            yield {
                paper: _paper(taken, now),
                status: _reading([]),
                write: gr.update(interactive=False),
                stop: gr.update(interactive=True),
                undo: gr.update(interactive=False),
                export: gr.update(interactive=False),
                is_writing: True,
            }
            before, n_new = now, int(max_tokens)
            try:
                card = await _card(server, model_id)
                numbers = Numbers(context_length(card))
                parameters = {"temperature": temperature, "top_p": top_p if top_p < 1 else None, "max_tokens": n_new}
                try:
                    stream = _stream(server, card["id"], now.prompt(taken), parameters)
                    first = await anext(stream, None)
                except SpaceError as error:
                    if error.code != "context_length_exceeded" or not cut:
                        raise
                    start = await _start_that_fits(server, card, taken, now, n_new)
                    before = now = replace(now, start=start)
                    numbers = Numbers(context_length(card))
                    stream = _stream(server, card["id"], now.prompt(taken), parameters)
                    first = await anext(stream, None)
                written, drawn_at = "", 0.0
                points: list[dict[str, int]] = []
                async with aclosing(stream):
                    piece = first
                    while piece is not None:
                        numbers.add(piece)
                        written += piece.text
                        if piece.notice:
                            yield {status: _quiet(piece.notice)}
                        if piece.progress and not written:
                            points.append(piece.progress)
                            yield {status: _reading(points)}
                        if piece.text and time.monotonic() - drawn_at > _DRAW_EVERY_S:
                            drawn_at = time.monotonic()
                            now = replace(before, continuations=(*before.continuations, written))
                            yield {story: now, paper: _paper(taken, now), status: _quiet(_line(written, numbers))}
                        piece = await anext(stream, None)
                if not written.strip():
                    yield {status: _quiet("The model ended the book here: it wrote nothing more."), **at_rest(before)}
                    return
                now = replace(before, continuations=(*before.continuations, written))
                left_out = f"the first {now.start / len(taken.text):.0%} of the book is left out" if now.start else ""
                yield {
                    story: now,
                    paper: _paper(taken, now),
                    status: _quiet(join([_line(written, numbers), numbers.context_line(), left_out])),
                    **at_rest(now),
                }
            except SpaceError as error:
                sentence, is_long = str(error), error.code == "context_length_exceeded"
                if is_long:
                    sentence = _too_long(error, n_new)
                yield {
                    status: _trouble(sentence),
                    **({keep_end: gr.update(visible=True)} if is_long else {}),
                    **at_rest(now),
                }

        def take_back(taken: Book | None, now: Story) -> dict[Any, Any]:
            now = replace(now, continuations=now.continuations[:-1])
            return {
                story: now,
                paper: _paper(taken, now),
                status: _quiet("Took the last continuation back."),
                **at_rest(now),
            }

        def rest(now: Story, was_writing: bool) -> dict[Any, Any]:
            """After a continuation: say so if it was stopped."""
            if not was_writing:
                return {is_writing: False}
            n_words = len(now.continuations[-1].split()) if now.continuations else 0
            return {status: _quiet(f"Stopped after {n_words:,} words." if n_words else "Stopped."), **at_rest(now)}

        async def greet() -> dict[Any, Any]:
            try:
                cards = await _models(server)
            except SpaceError as error:
                return {status: _trouble(str(error))}
            return {
                model: gr.update(choices=[card["id"] for card in cards], value=cards[0]["id"]),
                note: _note(cards[0]),
                status: "",
            }

        async def change_model(model_id: str | None, taken: Book | None) -> dict[Any, Any]:
            try:
                card = await _card(server, model_id)
                return {note: _note(card), **(await measured(taken, card) if taken else {})}
            except SpaceError as error:
                return {status: _trouble(str(error))}

        about_book = [upload, book, story, paper, measure, keep_end, status, is_writing, *buttons]
        quietly: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        upload.upload(take_file, [upload, model], about_book, concurrency_limit=32, **quietly)
        paste.blur(take_paste, [paste, model, book], about_book, concurrency_limit=32, **quietly)
        running = write.click(
            write_on,
            [book, story, paste, ending, keep_end, model, temperature, top_p, max_tokens],
            [book, story, paper, status, keep_end, is_writing, *buttons],
            concurrency_limit=32,
            **quietly,
        )
        # Only once the event has ended: what it had sent before it was cancelled would come after the word "stopped".
        running.then(rest, [story, is_writing], [status, is_writing, *buttons], **quietly)
        stop.click(None, None, None, cancels=[running])
        undo.click(take_back, [book, story], [story, paper, status, is_writing, *buttons], **quietly)
        export.click(None, None, None, js=_EXPORT)
        model.input(change_model, [model, book], [note, measure, keep_end, status], **quietly)
        page.load(greet, None, [model, note, status], **quietly)
    page.queue(max_size=128, default_concurrency_limit=32)
    return page


# -- the server --------------------------------------------------------------------------------------------------------


async def _models(server: Server) -> list[Card]:
    """The server's models, StoryWriters first, then other base models, each kind by its context."""
    return sorted(
        await server.models(),
        key=lambda card: (
            "storywriter" not in card["id"],
            card.get("prompt_style", "none") != "none",
            -(context_length(card) or 0),
        ),
    )


async def _card(server: Server, model: str | None) -> Card:
    cards = await _models(server)
    return next((card for card in cards if card["id"] == model), cards[0])


async def _stream(server: Server, model: str, prompt: str, parameters: dict[str, Any]) -> AsyncGenerator[Piece, None]:
    """The continuation, with reading progress where the server has it."""
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
            is_unknown = error.code in refusals or "include_progress" in str(error)
            if not progress or n_pieces or not is_unknown:
                raise


async def _start_that_fits(server: Server, card: Card, book: Book, story: Story, n_new: int) -> int:
    """Where in the book to begin so that the rest, what was written and what is to come fit; at a paragraph.

    Some more is cut, so that the next continuations fit as well and find their beginning in the server's cache.
    """
    limit = context_length(card)
    if limit is None:
        raise SpaceError("The server does not say how much the model can read, so the book cannot be cut to it.")
    n_keep = limit - n_new - min(3 * n_new, limit // 8)
    text = story.prompt(book)
    n_cut = 0  # characters of `text`
    while True:
        try:
            ids = await server.tokenize(card["id"], text[n_cut:])
            break
        except SpaceError as error:  # too long even to be counted
            if error.code != "context_length_exceeded" or len(text) - n_cut < limit:
                raise
            n_cut += (len(text) - n_cut) // 2
    if n_keep < 1 or len(ids) <= n_keep:
        return story.start + n_cut
    kept = await server.detokenize(card["id"], ids[-n_keep:])
    n_cut = max(n_cut, len(text) - len(kept))
    paragraph = text.find("\n\n", n_cut, n_cut + 4000)
    n_cut = paragraph + 2 if paragraph >= 0 else n_cut
    if story.start + n_cut >= len(book.text):
        raise SpaceError("What was written fills the model's context by itself; undo some of it.")
    return story.start + n_cut


def _pasted(text: str, now: Book | None) -> Book | None:
    """The pasted text as a book, if there is one; an uploaded book goes before it."""
    text = tidy(text)
    if not text or (now is not None and not now.is_pasted):
        return None
    return Book("The pasted text", text, is_pasted=True)


# -- what stands on the page -----------------------------------------------------------------------------------------

_CUTTING = "The beginning can be cut: tick the box below."


def _measure(name: str, n_tokens: int, limit: int | None, model: str) -> str:
    """A bar and a sentence: how many of the model's tokens the book takes."""
    if not limit:
        return _quiet(f"{name}: {n_tokens:,} tokens.")
    over = n_tokens - limit
    if over > 0:
        sentence = f"{n_tokens:,} of {limit:,} tokens: {over:,} too many. {_CUTTING}"
        if limit == 65_536 and n_tokens < _ALIBI_REACHES:
            sentence += f" Or let ALiBi reach further: mpt serve --context-length {model}={_ALIBI_REACHES}"
    else:
        sentence = f"{n_tokens:,} of {limit:,} tokens, room for {-over:,} more."
    fits = 100 * min(n_tokens, limit) / max(n_tokens, limit)
    rest = f'<span class="over" style="width:{100 - fits:.2f}%"></span>' if over > 0 else ""
    return (
        f'<p class="mpt-measure" role="status"><strong>{html.escape(name)}</strong>: {html.escape(sentence)}</p>'
        f'<div class="mpt-bar" aria-hidden="true"><span class="fits" style="width:{fits:.2f}%"></span>{rest}</div>'
    )


def _reading(points: list[dict[str, int]]) -> str:
    """How far the model has read: tokens, rate and time left; without numbers, that it reads.

    points: the progress so far, the newest last.
    """
    if not points or not points[-1].get("total"):
        return (
            '<p class="mpt-measure" role="status">The model reads the book ...</p>'
            '<div class="mpt-bar" role="progressbar" aria-label="Reading"><span class="waits"></span></div>'
        )
    total, done, cached = (points[-1].get(name, 0) for name in ("total", "processed", "cached"))
    seconds = points[-1].get("time_ms", 0) / 1000
    parts = [f"Reading: {done:,} of {total:,} tokens"]
    if seconds > 0 and done > cached:
        parts.append(f"{(done - cached) / seconds:,.0f} tokens/s")
        if done < total:
            parts.append(f"{_duration(_seconds_left(points))} left")
    if cached:
        parts.append(f"{cached:,} from the cache")
    return (
        f'<p class="mpt-measure">{", ".join(parts)}</p>'
        f'<div class="mpt-bar" role="progressbar" aria-label="Reading" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{done}"><span class="fits" style="width:{100 * done / total:.2f}%"></span></div>'
    )


def _seconds_left(points: list[dict[str, int]]) -> float:
    """When the rest will be read. Attention makes each token dearer than the last: time = a n + b n^2.

    a and b come from the newest point and the one nearest to half of its tokens; b is never under 0.
    """
    start = points[-1].get("cached", 0)
    total, done, seconds = points[-1]["total"], points[-1]["processed"], points[-1]["time_ms"] / 1000
    half = min(points, key=lambda point: abs(point["processed"] - (start + done) / 2))
    n, n_half, seconds_half = done - start, half["processed"] - start, half["time_ms"] / 1000
    b = max(0.0, (seconds / n - seconds_half / n_half) / (n - n_half)) if 0 < n_half < n else 0.0
    a = seconds / n - b * n
    return max(0.0, a * (total - start) + b * (total - start) ** 2 - seconds)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _line(written: str, numbers: Numbers) -> str:
    """`142 words, 105 words a minute · 65,007 of 65,010 tokens from the cache, first after 0.11 s`."""
    n_words = len(written.split())
    speed = f"{n_words:,} word{'' if n_words == 1 else 's'}"
    if numbers.first_s is not None and numbers.last_s is not None and numbers.tokens_per_s is not None:
        speed += f", {60 * n_words / (numbers.last_s - numbers.first_s):,.0f} words a minute"
    read = ""
    if numbers.n_cached_tokens:
        read = f"{numbers.n_cached_tokens:,} tokens from the cache"
        if numbers.n_prompt_tokens:
            read += f", {max(0, numbers.n_prompt_tokens - numbers.n_cached_tokens):,} read"
    elif numbers.n_prompt_tokens:
        read = f"{numbers.n_prompt_tokens:,} tokens read"
    if numbers.first_s is not None:
        read = join([read, f"first word after {numbers.first_s:.2f} s"], ", ")
    return join([speed, read])


def _too_long(error: SpaceError, n_new: int) -> str:
    n_prompt, limit = error.numbers.get("n_prompt_tokens"), error.numbers.get("n_ctx")
    if not n_prompt or not limit:
        return f"{error} {_CUTTING_ABOVE}"
    return (
        f"The text has {n_prompt:,} tokens and {n_new:,} are to be written: {n_prompt + n_new - limit:,} more than the "
        f"{limit:,} the model holds. {_CUTTING_ABOVE}"
    )


_CUTTING_ABOVE = "Tick “Cut the beginning and keep the end” above, or ask for fewer new tokens."


def _paper(book: Book | None, story: Story) -> str:
    """The end of the book and what was written after it."""
    if book is None:
        hint = "The end of your book, and what comes after it, appear here."
        return f'<div class="paper"><span class="hint">{hint}</span></div>'
    tail = book.text[-_TAIL_CHARACTERS:]
    tail = f"… {tail.partition(' ')[2]}" if len(book.text) > _TAIL_CHARACTERS else tail
    gap = "\n\n\n" if story.ending else ""
    name = html.escape(f"{Path(book.name).stem}, continued.txt", quote=True)
    return (
        '<div class="paper" tabindex="0" role="region" aria-label="The story">'
        f'<span class="before">{html.escape(tail)}</span>{gap}'
        f'<span class="written" data-name="{name}">{html.escape(story.written)}</span></div>'
    )


def _quiet(line: str) -> str:
    return f'<p class="mpt-quiet" role="status">{html.escape(line)}</p>'


def _trouble(sentence: str) -> str:
    return f'<p class="mpt-trouble" role="alert">{html.escape(sentence)}</p>'


def _note(card: Card | None) -> str:
    lines = [licence_note(card)] if card else []
    if card and str(card["id"]).startswith("mpt-tiny"):
        lines.append("This tiny model reads 65,536 tokens in earnest, and writes like a parrot that has heard novels.")
    lines.append(PRIVACY)
    return "".join(f'<p class="mpt-quiet">{html.escape(line)}</p>' for line in lines)


if __name__ == "__main__":
    build(Server()).launch(**launch_options())
