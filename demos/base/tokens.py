"""Tokens as HTML, darker where the model was surer, with what else it thought of; from log-probabilities.

Text of a model is not trusted: everything is escaped.
"""

import html
import math

Score = tuple[str, float | None, dict[str, float]]  # a token, its log-probability, the likeliest there
CSS = """<style>
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; font-family: var(--font-mono); }
.tokens span { border-radius: 3px; padding: 2px 0; border-bottom: 2px solid transparent; }
.tokens span:hover { border-bottom-color: var(--body-text-color); }
.token-table { max-height: 300px; overflow: auto; }
.token-table table { border-collapse: collapse; width: 100%; }
.token-table th, .token-table td { text-align: left; padding: 2px 12px 2px 0; overflow-wrap: anywhere; }
</style>"""


def tokens_html(scores: list[Score], with_table: bool = False) -> str:
    """The tokens one after another, the alternatives on hover, and in a table if asked for."""
    if not scores:
        return ""
    spans = "".join(
        f'<span style="background: rgb(59 130 246 / {0.06 + 0.5 * _probability(value):.2f})" '
        f'title="{html.escape(_odds(token, value, tops))}">{html.escape(token)}</span>'
        for token, value, tops in scores
    )
    parts = [CSS, '<p class="quiet">Darker: the model was surer. Hover over a token for what else it thought of.</p>']
    parts.append(f'<div class="tokens">{spans}</div>')
    return "".join([*parts, _table(scores)] if with_table else parts)


def _table(scores: list[Score]) -> str:
    """For keyboards, screen readers and fingers, which do not hover."""
    rows = "".join(
        f"<tr><td><code>{html.escape(_visible(token))}</code></td><td>{_percent(value)}</td>"
        f"<td>{html.escape(_others(token, tops))}</td></tr>"
        for token, value, tops in scores
    )
    return (
        '<details class="token-table"><summary>As a table</summary><table><thead><tr><th scope="col">Token</th>'
        f'<th scope="col">Probability</th><th scope="col">Others</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )


def _odds(token: str, value: float | None, tops: dict[str, float]) -> str:
    return f"{_visible(token)} {_percent(value)}\n{_others(token, tops)}".strip()


def _others(token: str, tops: dict[str, float]) -> str:
    others = sorted((each for each in tops.items() if each[0] != token), key=lambda each: -each[1])
    return ", ".join(f"{_visible(other)} {_percent(value)}" for other, value in others)


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")


def _probability(value: float | None) -> float:
    return 0.0 if value is None else math.exp(min(value, 0.0))


def _percent(value: float | None) -> str:
    share = 100 * _probability(value)
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %" if share >= 0.1 else "under 0.1 %"
