"""A book and its continuation as HTML: the length against the context, the reading, the writing, the story.

Text of a book or a model is not trusted: everything is escaped.
"""

import html
from pathlib import Path

try:
    from demos.mpt_page import Numbers, join, quiet
    from demos.mpt_space import SpaceError
    from demos.storywriter.story import Book, Story
except ImportError:  # a copied Space has the modules beside it
    from mpt_page import Numbers, join, quiet  # type: ignore[no-redef]
    from mpt_space import SpaceError  # type: ignore[no-redef]
    from story import Book, Story  # type: ignore[no-redef]

TAIL_CHARACTERS = 700  # of the book, shown before the continuation
ALIBI_REACHES = 83_968  # the longest prompt MosaicML wrote on from, with a model trained to 65,536
CUTTING = "The beginning can be cut: tick the box below."
CUTTING_ABOVE = "Tick “Cut the beginning and keep the end” above, or ask for fewer new tokens."


def measure(name: str, n_tokens: int, limit: int | None, model: str) -> str:
    """A bar and a sentence: how many of the model's tokens the book takes."""
    if not limit:
        return quiet(f"{name}: {n_tokens:,} tokens.")
    over = n_tokens - limit
    if over > 0:
        sentence = f"{n_tokens:,} of {limit:,} tokens: {over:,} too many. {CUTTING}"
        if limit == 65_536 and n_tokens < ALIBI_REACHES:
            sentence += f" Or let ALiBi reach further: mpt serve --context-length {model}={ALIBI_REACHES}"
    else:
        sentence = f"{n_tokens:,} of {limit:,} tokens, room for {-over:,} more."
    fits = 100 * min(n_tokens, limit) / max(n_tokens, limit)
    rest = f'<span class="over" style="width:{100 - fits:.2f}%"></span>' if over > 0 else ""
    return (
        f'<p class="mpt-measure" role="status"><strong>{html.escape(name)}</strong>: {html.escape(sentence)}</p>'
        f'<p class="mpt-label">The book in the model’s context of {limit:,} tokens</p>'
        f'<div class="mpt-bar" aria-hidden="true"><span class="fits" style="width:{fits:.2f}%"></span>{rest}</div>'
    )


def reading(points: list[dict[str, int]]) -> str:
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


def line(written: str, numbers: Numbers) -> str:
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


def too_long(error: SpaceError, n_new: int) -> str:
    n_prompt, limit = error.numbers.get("n_prompt_tokens"), error.numbers.get("n_ctx")
    if not n_prompt or not limit:
        return f"{error.sentence} {CUTTING_ABOVE}"
    return (
        f"The text has {n_prompt:,} tokens and {n_new:,} are to be written: {n_prompt + n_new - limit:,} more than the "
        f"{limit:,} the model holds. {CUTTING_ABOVE}"
    )


def paper(book: Book | None, story: Story) -> str:
    """The end of the book and what was written after it."""
    if book is None:
        hint = "The end of your book, and what comes after it, appear here."
        return f'<div class="paper"><span class="hint">{hint}</span></div>'
    tail = book.text[-TAIL_CHARACTERS:]
    tail = f"… {tail.partition(' ')[2]}" if len(book.text) > TAIL_CHARACTERS else tail
    gap = "\n\n\n" if story.ending else ""
    name = html.escape(f"{Path(book.name).stem}, continued.txt", quote=True)
    return (
        '<div class="paper" tabindex="0" role="region" aria-label="The story">'
        f'<span class="before">{html.escape(tail)}</span>{gap}'
        f'<span class="written" data-name="{name}">{html.escape(story.written)}</span></div>'
    )
