"""What the pages of all Spaces share: their looks, an answer as it arrives, its numbers, notes, and how a page is served.

It is not about the server (that is `mpt_space.py`), and no page's own layout is here. Both files are copied beside each
Space's `app.py`.
"""

import html
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

try:
    from demos.mpt_space import Card, Piece, Server, SpaceError, context_length, pick
except ImportError:  # a copied Space has the module beside it
    from mpt_space import Card, Piece, Server, SpaceError, context_length, pick  # type: ignore[no-redef]

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when a page is built
N_AT_ONCE = 32  # people whom one page answers at the same time
MAX_QUEUE = 128  # people waiting; more are told that the page is busy

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


def quiet(line: str) -> str:
    """A line of HTML that informs."""
    return f'<p class="mpt-quiet" role="status">{html.escape(line)}</p>'


def trouble(sentence: str) -> str:
    """A sentence of HTML that says what went wrong; screen readers interrupt for it."""
    return f'<p class="mpt-box mpt-trouble" role="alert">{html.escape(sentence)}</p>'


def notes(card: Card | None, about_tiny: str, privacy: str) -> str:
    """The lines of HTML at the foot of a page: the model's licence, what its mpt-tiny is like, what is kept."""
    lines = [licence_note(card)] if card else []
    if card and str(card["id"]).startswith("mpt-tiny"):
        lines.append(about_tiny)
    return "".join(f'<p class="mpt-quiet">{html.escape(line)}</p>' for line in [*lines, privacy])


def licence_note(card: Card) -> str:
    """The model's name and licence, and what the licence forbids."""
    licence = card.get("licence") or card.get("license")
    if not licence or licence == "unknown":
        return f"Model: {card['id']}. The server does not say under which licence; ask whoever runs it."
    parts = str(licence).upper().split("-")
    limits = "; non-commercial use only" if "NC" in parts else ""
    return f"Model: {card['id']}, licence {licence}{limits}."


def privacy_note() -> str:
    return (
        "Answers come from a language model and can be wrong or offensive. This page logs nothing; conversations stay "
        "in your browser, and go to the server only to be answered."
    )


async def picker_and_note(
    server: Server, ordered: Callable[[list[Card]], list[Card]], model: str | None
) -> tuple[Any, str]:
    """The choices of the model picker and the licence note beside it, from what the server serves now.

    ordered: the models this page can use, the best first; it may raise SpaceError, which is shown.
    """
    try:
        cards = ordered(await server.models())
    except SpaceError as error:
        gr.Warning(error.sentence, title="No models")
        return gr.skip(), error.sentence
    card = pick(cards, model)
    return gr.Dropdown(choices=[card["id"] for card in cards], value=card["id"]), licence_note(card)


# -- looks, and how a page is served ---------------------------------------------------------------------------------

# Gradio takes the looks of a page where it is launched or mounted, not where it is built. Its own colour for quiet text
# has a contrast of 2.6 to the white behind it, where readers need 4.5; so has white on its orange.
CSS = """
.quiet { color: var(--body-text-color) !important; opacity: 0.78; font-size: var(--text-sm) !important; }
.quiet * { color: inherit !important; font-size: inherit !important; }
.bare, .bare .html-container { padding: 0 !important; }
.mpt-quiet { font-size: 0.875rem; color: color-mix(in srgb, var(--body-text-color) 72%, transparent);
  overflow-wrap: anywhere; line-height: 1.5; margin: 0; }
.mpt-box { margin: 0; padding: 0.5rem 0.75rem; border-style: solid; border-width: 0 0 0 4px; border-radius: 4px;
  line-height: 1.45; background: var(--background-fill-secondary); color: var(--body-text-color);
  overflow-wrap: anywhere; }
.mpt-trouble { border-color: #dc2626; }
.gradio-container main.fillable { width: 100% !important; max-width: 1000px !important; }
.gradio-container textarea::placeholder { color: var(--body-text-color); opacity: 0.7; }
@media (max-width: 500px) { .gradio-container main.fillable { padding-left: 12px; padding-right: 12px; } }
"""
BARE: dict[str, Any] = {
    "padding": False,
    "apply_default_css": False,
    "elem_classes": "bare",
}  # of gr.HTML without a frame
QUICK: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}  # of events that wait for nothing


def page_options() -> dict[str, Any]:
    """What a server gives to Gradio's `mount_gradio_app`, and each Space to `launch`."""
    return {
        "css": CSS,
        "theme": gr.themes.Default(primary_hue="blue", secondary_hue="blue"),
        "show_error": False,  # tracebacks are for the log
        "footer_links": [],
        "run_history": False,
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
