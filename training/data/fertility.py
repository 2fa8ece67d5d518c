"""How well tokenizers fit one's own text: bytes a token, tokens a word, by source, and the ids they leave free."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpt.checkpoint_text import open_tokenizer
from mpt.errors import UserError
from mpt.files import read_optional_json
from training.data.files import documents

_MULTIPLE = 128  # of an embedding's rows, which GPUs multiply well; MPT's 50,432 are 394 of them


@dataclass
class Fit:
    """A tokenizer on one source. fertility: tokens a word, words as white space divides them."""

    n_bytes: int = 0
    n_words: int = 0
    n_tokens: int = 0
    used: set[int] = field(default_factory=set)

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / self.n_tokens

    @property
    def fertility(self) -> float:
        return self.n_tokens / self.n_words

    def add(self, other: "Fit") -> None:
        self.n_bytes += other.n_bytes
        self.n_words += other.n_words
        self.n_tokens += other.n_tokens
        self.used |= other.used


@dataclass(frozen=True)
class Report:
    """One tokenizer. spare: rows of the embedding that no token has, of the checkpoint's config or of the next 128."""

    name: str
    vocab_size: int
    spare: int
    by_source: dict[str, Fit]

    @property
    def whole(self) -> Fit:
        found = Fit()
        for fit in self.by_source.values():
            found.add(fit)
        return found


def compare(
    sources: Sequence[str],
    tokenizers: dict[str, Path],
    text_key: str = "text",
    limit: int | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> list[Report]:
    """Each tokenizer on every source, read once. limit: documents of each source; report: called with documents read.

    Raises UserError for a source without a word, and what reading it raises.
    """
    opened = {name: open_tokenizer(place) for name, place in tokenizers.items()}
    fits: dict[str, dict[str, Fit]] = {name: {} for name in opened}
    n_read = 0
    for source in sources:
        for n, text in enumerate(_texts(source, text_key)):
            if n == limit:
                break
            for name, tokenizer in opened.items():
                ids = tokenizer.encode(text)
                fit = Fit(len(text.encode(errors="surrogatepass")), len(text.split()), len(ids), set(ids))
                fits[name].setdefault(source, Fit()).add(fit)
            n_read += 1
            report(n_read)
        if not all(source in found and found[source].n_words for found in fits.values()):
            raise UserError(f"`{source}` has no words; give other text")
    return [
        Report(name, opened[name].vocab_size, _spare(place, opened[name].vocab_size), fits[name])
        for name, place in tokenizers.items()
    ]


def _texts(source: str, text_key: str) -> Iterator[str]:
    return (row[text_key] for row in documents([source], text_key))


def _spare(place: Path, vocab_size: int) -> int:
    config = read_optional_json(place / "config.json") if place.is_dir() else {}
    rows = config.get("vocab_size", -(-vocab_size // _MULTIPLE) * _MULTIPLE)
    return max(0, rows - vocab_size)


def render(reports: Sequence[Report]) -> str:
    """A table: a line for each tokenizer and source, and one for all sources together."""
    lines = [f"{'tokenizer':<20} {'source':<28} {'bytes/token':>11} {'tokens/word':>11} {'ids used':>9} {'spare':>6}"]
    for report in reports:
        named = report.by_source if len(report.by_source) == 1 else {**report.by_source, "all": report.whole}
        for source, fit in named.items():
            share = len(fit.used) / report.vocab_size
            numbers = f"{fit.bytes_per_token:>11.3f} {fit.fertility:>11.3f} {share:>9.1%} {report.spare:>6}"
            lines.append(f"{report.name:<20} {source[-28:]:<28} {numbers}")
    return "\n".join(lines)
