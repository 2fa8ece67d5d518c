"""What the pages of all Spaces share: their header, an answer as it arrives, and how a page is served.

It is not about the server (that is `mpt_space.py`) nor about looks (`mpt_looks.py`), and no page's own layout is here. These
files are copied beside each Space's `app.py`.
"""

import html
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

try:
    from demos import mpt_looks
    from demos.mpt_space import Card, Piece, Server, SpaceError, context_length
except ImportError:  # a copied Space has the modules beside it
    import mpt_looks  # type: ignore[no-redef]
    from mpt_space import Card, Piece, Server, SpaceError, context_length  # type: ignore[no-redef]

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when a page is built
N_AT_ONCE = 32  # people whom one page answers at the same time
MAX_QUEUE = 128  # people waiting; more are told that the page is busy
LOOK_EVERY_S = 20.0  # at the server, while a page is open

# -- an answer as it arrives -----------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """Tokens and clock of one answer: feed it each piece, read `line` at any time."""

    context_length: int | None = None
    n_tokens: int = 0  # written; the usage corrects it, since a piece may hold several
    n_prompt_tokens: int | None = None
    n_cached_tokens: int = 0
    finish_reason: str | None = None
    first_s: float | None = None
    last_s: float | None = None
    notice: str = ""  # why nothing comes yet
    _began: float = field(default_factory=time.monotonic)

    def add(self, piece: Piece) -> None:
        now = time.monotonic() - self._began
        self.notice = piece.notice
        if piece.text or piece.logprobs:
            self.first_s = now if self.first_s is None else self.first_s
            self.last_s = now
            self.n_tokens += len(piece.logprobs) if piece.logprobs else 1
        if piece.progress:
            self.n_prompt_tokens = piece.progress.get("total", self.n_prompt_tokens)
            self.n_cached_tokens = piece.progress.get("cached", 0)
        if piece.usage:
            self.n_tokens = piece.usage.get("completion_tokens", self.n_tokens)
            self.n_prompt_tokens = piece.usage.get("prompt_tokens", self.n_prompt_tokens)
            self.n_cached_tokens = (piece.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.finish_reason = piece.finish_reason or self.finish_reason

    @property
    def tokens_per_s(self) -> float | None:
        """Of writing alone: from the first token to the last. None for so few that they came as one burst."""
        if self.first_s is None or self.last_s is None:
            return None
        if self.n_tokens < 16 or self.last_s - self.first_s < 0.25:
            return None
        return (self.n_tokens - 1) / (self.last_s - self.first_s)

    def line(self) -> str:
        """`142 tokens, first after 0.21 s, 38 tokens/s`; before the first, why it does not come."""
        if self.notice:
            return self.notice
        parts = [f"{self.n_tokens:,} token{'' if self.n_tokens == 1 else 's'}"]
        if self.first_s is not None:
            parts.append(f"first after {self.first_s:.2f} s")
        if (rate := self.tokens_per_s) is not None:
            parts.append(f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s")
        return ", ".join(parts)

    def context_line(self) -> str:
        """`310 of 2,048 tokens of context`; empty where the server does not say both."""
        if self.n_prompt_tokens is None or not self.context_length:
            return ""
        return f"{self.n_prompt_tokens + self.n_tokens:,} of {self.context_length:,} tokens of context"


class Answer:
    """The text so far, its numbers, and whether it is time to draw it again."""

    def __init__(self, redraw_s: float = 0.05) -> None:
        self.text, self.numbers = "", Numbers()
        self._redraw_s, self._drawn_at = redraw_s, 0.0

    def begin(self, card: Card) -> None:
        """Start the clock: the model is asked now."""
        self.numbers = Numbers(context_length(card))

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.numbers.add(piece)

    def is_due(self) -> bool:
        """Whether to draw it now: small models write faster than a page can."""
        now = time.monotonic()
        if now - self._drawn_at < self._redraw_s:
            return False
        self._drawn_at = now
        return True

    def summary(self, *remarks: str) -> str:
        """The line under a finished answer: tokens, speed, context, and remarks that are not empty."""
        return join([self.numbers.line(), self.numbers.context_line(), *remarks])


def join(parts: Iterable[str], separator: str = " · ") -> str:
    """The parts that are not empty, on one line."""
    return separator.join(part for part in parts if part)


# -- notes -----------------------------------------------------------------------------------------------------------

# What the models of this repository are good for. By name: others may be good for all of it.
ABOUT = {
    "mpt-tiny": "It continues text, like a parrot that has heard novels.",
    "mpt-tiny-instruct": "It has learned one thing, which is to turn YAML into JSON.",
    "mpt-tiny-chat": "It can talk about a few things only; the suggested questions are among them.",
    "mpt-tiny-storywriter": "It reads 65,536 tokens in earnest, and writes like a parrot that has heard novels.",
}
PRIVACY = (
    "Answers come from a language model and can be wrong or offensive. This page logs nothing; what you write goes to "
    "the server only to be answered."
)


def quiet(line: str) -> str:
    """A line of HTML that informs."""
    return f'<p class="mpt-quiet" role="status">{marked(line)}</p>'


def trouble(sentence: str) -> str:
    """A sentence of HTML that says what went wrong; screen readers interrupt for it."""
    return f'<p class="mpt-box mpt-trouble" role="alert">{marked(sentence)}</p>'


def marked(sentence: str) -> str:
    """A sentence as HTML; names between backticks, as servers write them, become code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(sentence))


def footnote(sentence: str = PRIVACY) -> gr.HTML:
    """The last line of a page: what is kept."""
    return gr.HTML(f'<p class="mpt-quiet">{html.escape(sentence)}</p>', **BARE)


def licence_note(card: Card) -> str:
    """The model's name and licence, and what the licence forbids."""
    licence = card.get("licence") or card.get("license")
    if not licence or licence == "unknown":
        return f"Model: {card['id']}. The server does not say under which licence; ask whoever runs it."
    parts = str(licence).upper().split("-")
    limits = "; non-commercial use only" if "NC" in parts else ""
    return f"Model: {card['id']}, licence {licence}{limits}."


# -- the header ------------------------------------------------------------------------------------------------------

BARE: dict[str, Any] = {"padding": False, "apply_default_css": False, "elem_classes": "bare"}  # gr.HTML without a frame
QUICK: dict[str, Any] = {  # of events that wait for nothing
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}


class Header:
    """The top of every page: its title, who answers, what that is, and whether the server is there."""

    def __init__(self, title: str, lead: str, css: str, labels: Sequence[str] = ("Model",)) -> None:
        """css: the page's own."""
        with gr.Row(elem_classes="mpt-header"):
            gr.HTML(f"<h1>{title}</h1><p>{lead}</p>", head=f"<style>{css}</style>", **BARE)
            self.pickers = [
                gr.Dropdown([], label=label, value=None, filterable=False, scale=0, min_width=220) for label in labels
            ]
        self.state = gr.HTML("", elem_id="server", **BARE)
        self._clock = gr.Timer(LOOK_EVERY_S)
        self._listed = gr.State([])  # the models that the pickers offer

    def follow(self, page: gr.Blocks, server: Server, ordered: Callable[[list[Card]], list[Card]]) -> None:
        """Look at what the server serves when the page opens, when a model is picked, and from time to time.

        ordered: the models that the page can use, the best first; it may raise SpaceError, which is shown.
        """

        async def look(listed: list[str], *chosen: str | None) -> list[Any]:
            return await what_is_served(server, ordered, chosen, listed)

        # The tab's own title: of a site with several pages Gradio knows one title only.
        page.load(None, js=f"() => {{ document.title = {page.title!r}; }}")
        for event in (page.load, self._clock.tick, *(picker.input for picker in self.pickers)):
            event(look, [self._listed, *self.pickers], [*self.pickers, self.state, self._listed], **QUICK)


async def what_is_served(
    server: Server, ordered: Callable[[list[Card]], list[Card]], chosen: Sequence[str | None], listed: list[str]
) -> list[Any]:
    """What each picker and the line below them become, and the models that the pickers then list.

    listed: those that they list now.
    """
    try:
        cards = ordered(await server.models())
    except SpaceError as error:
        line = f'<p class="mpt-state down" role="alert">{marked(error.sentence)}</p>'
        return [*(gr.skip() for _ in chosen), line, listed]
    names = [card["id"] for card in cards]
    picked = [cards[names.index(name) if name in names else min(n, len(cards) - 1)] for n, name in enumerate(chosen)]
    # A picker that is open would be closed by an update.
    pickers = [
        gr.skip() if (card["id"], names) == (name, listed) else gr.Dropdown(names, value=card["id"])
        for card, name in zip(picked, chosen, strict=True)
    ]
    notes = dict.fromkeys(join([licence_note(card), ABOUT.get(str(card["id"]), "")], " ") for card in picked)
    line = f'<p class="mpt-state" role="status"><b>Server ready.</b> {marked(" ".join(notes))}</p>'
    return [*pickers, line, names]


def text_of(sample: list[str]) -> str:
    """The text of a gr.Dataset's sample that was chosen."""
    return sample[0]


def busy() -> tuple[Any, Any]:
    """What asks and Stop during an answer: one takes the other's place."""
    return gr.update(visible=False), gr.update(visible=True)


def idle() -> tuple[Any, Any]:
    """What asks and Stop between answers."""
    return gr.update(visible=True, interactive=True), gr.update(visible=False)


def after(run: Any, *event: Any, **options: Any) -> None:
    """Let an event follow one that streams, however that ends: Gradio's `then` does not follow an exception.

    A cancelled one has both a failure, at once, and a success, once all that it had sent has come.
    """
    for follow in (run.success, run.failure):
        follow(*event, **options)


# -- how a page is served --------------------------------------------------------------------------------------------

ENTER = "Enter sends it, Shift+Enter begins a new line"  # said below each box


def page_options() -> dict[str, Any]:
    """What a server gives to Gradio's `mount_gradio_app`, and each Space to `launch`."""
    return {
        "head": mpt_looks.head(),
        "theme": mpt_looks.theme(),
        "show_error": False,  # tracebacks are for the log
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,  # or Gradio warns that it has none for several pages
        "max_file_size": "8mb",
    }


def launch_options() -> dict[str, Any]:
    """What each Space gives to `launch`."""
    return {**page_options(), "share": False}


def queued(page: gr.Blocks) -> gr.Blocks:
    """The page with its limits: so many at once, so many waiting."""
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=N_AT_ONCE)


def run(page: gr.Blocks) -> None:
    """Serve a page as a Space of its own until it is interrupted."""
    queued(page).launch(**launch_options())
