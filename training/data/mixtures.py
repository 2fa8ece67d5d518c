"""What the published models were trained on: their sources with tokens and shares, and the epochs a budget makes of it.

Tokens are billions of GPT-NeoX tokens in a source. Those of MPT-7B and MPT-30B are the launch blog's Table 2 and the
30B's model card; of the RedPajama-1B the shares are its card's and the tokens the RedPajama data card's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpt.errors import UserError


@dataclass(frozen=True)
class Part:
    """One source of a mixture. billions: of tokens it has; share: of the mixture, in per cent."""

    name: str
    billions: float
    share: float


_MPT_BILLIONS = {
    "mc4_en": 2417.99, "c4_semdedup": 100.42, "redpajama_commoncrawl": 878.45, "stack_selected": 463.78,
    "redpajama_wikipedia": 4.87, "stack_markdown": 107.07, "s2orc": 48.95, "redpajama_books": 26.02,
    "redpajama_arxiv": 28.10, "redpajama_stackexchange": 20.54,
}  # fmt: skip


def _mpt(*shares: float) -> tuple[Part, ...]:
    return tuple(
        Part(name, billions, share) for (name, billions), share in zip(_MPT_BILLIONS.items(), shares, strict=True)
    )


MIXTURES: Mapping[str, tuple[Part, ...]] = {
    "mpt_7b": _mpt(33.0, 29.9, 10.0, 10.0, 4.0, 3.5, 3.3, 3.0, 1.9, 1.4),
    "mpt_30b": _mpt(33.5, 29.9, 8.5, 10.0, 4.0, 4.5, 3.3, 3.0, 1.9, 1.4),
    "mpt_1b_redpajama_200b": (
        Part("redpajama_commoncrawl", 878, 67.0), Part("redpajama_c4", 175, 15.0), Part("redpajama_github", 59, 4.5),
        Part("redpajama_wikipedia", 24, 4.5), Part("redpajama_books", 26, 4.5), Part("redpajama_arxiv", 28, 2.5),
        Part("redpajama_stackexchange", 20, 2.0),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Read:
    """What a run reads of one source. tokens: in all epochs together."""

    part: Part
    share: float  # of the run, in per cent
    tokens: float
    epochs: float


def find(name: str) -> tuple[Part, ...]:
    """A published mixture. Raises UserError for an unknown name."""
    if name not in MIXTURES:
        raise UserError(f"no mixture `{name}`; known: {', '.join(MIXTURES)}")
    return MIXTURES[name]


def read(parts: Sequence[Part], budget: float, most_epochs: float | None = None) -> list[Read]:
    """How a budget of tokens falls on the sources.

    most_epochs: of any of them; what that leaves over goes to the others in proportion. Raises UserError when all of
    them together have too little.
    """
    if not budget > 0:
        raise UserError(f"`--tokens` is {budget:g}; it must be above 0")
    if most_epochs is not None and not most_epochs > 0:
        raise UserError(f"`--max-epochs` is {most_epochs:g}; it must be above 0")
    limits = {part: float("inf") if most_epochs is None else most_epochs * part.billions * 1e9 for part in parts}
    if sum(limits.values()) < budget:
        raise UserError(
            f"all sources {most_epochs:g} times are {sum(limits.values()):.4g} tokens, less than the {budget:.4g} of "
            "--tokens; raise --max-epochs, or lower --tokens"
        )
    tokens: dict[Part, float] = {}
    free = list(parts)
    while free:
        left = budget - sum(tokens.values())
        whole = sum(part.share for part in free)
        full = [part for part in free if left * part.share / whole > limits[part]]
        for part in full or free:
            tokens[part] = limits[part] if full else left * part.share / whole
        free = [part for part in free if part not in tokens]
    return [Read(p, 100 * tokens[p] / budget, tokens[p], tokens[p] / (p.billions * 1e9)) for p in parts]


def render(rows: Sequence[Read]) -> str:
    """A table: a source a line, in the order and the units of the blog's."""
    lines = [f"{'source':<24} {'billions':>9} {'share':>7} {'read':>9} {'epochs':>7}"]
    for row in rows:
        lines.append(
            f"{row.part.name:<24} {row.part.billions:>9,.2f} {row.share:>6.2f}% {row.tokens / 1e9:>9,.2f} "
            f"{row.epochs:>7.2f}"
        )
    return "\n".join(lines)
