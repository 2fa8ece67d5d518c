"""The tokens of a continuation, with how likely each was and what else the model thought of, from log-probabilities."""

import html
import math
from typing import Any

Score = tuple[str, float | None, dict[str, float]]  # a token, its log-probability, the likeliest there
Token = dict[str, Any]  # where it is in the text, how likely it was (0 to 1), and what is told of it: see _odds
_REACH = 8  # characters: a token of half a character is not in the text


def tokens_of(text: str, start: int, scores: list[Score]) -> list[Token]:
    """The tokens of a continuation that begins at a character of the text; places are counted as JavaScript does."""
    tokens: list[Token] = []
    for token, value, tops in scores:
        place = text.find(token, start, start + len(token) + _REACH) if token else -1
        if place >= 0:
            begin, start = _utf16(text[:place]), place + len(token)
            end, share = begin + _utf16(token), round(_probability(value), 3)
            tokens.append({"start": begin, "end": end, "share": share, "odds": _odds(token, value, tops)})
    return tokens


def _utf16(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def table_html(tokens: list[Token]) -> str:
    """The same as a table, for screen readers. Text of a model is not trusted: everything is escaped."""
    if not tokens:
        return ""
    cells = (f"<td>{'</td><td>'.join(map(html.escape, token['odds']))}</td>" for token in tokens)
    return (
        '<details class="token-table"><summary>The new tokens as a table</summary><table><thead><tr>'
        '<th scope="col">Token</th><th scope="col">Probability</th><th scope="col">Others</th></tr></thead>'
        f"<tbody>{''.join(f'<tr>{cell}</tr>' for cell in cells)}</tbody></table></details>"
    )


def _odds(token: str, value: float | None, tops: dict[str, float]) -> list[str]:
    """The token, its probability, and the others with theirs, for people to read."""
    others = sorted((each for each in tops.items() if each[0] != token), key=lambda each: -each[1])
    return [
        _visible(token),
        _percent(value),
        ", ".join(f"{_visible(other)} {_percent(odds)}" for other, odds in others),
    ]


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")


def _probability(value: float | None) -> float:
    return 0.0 if value is None else math.exp(min(value, 0.0))


def _percent(value: float | None) -> str:
    share = 100 * _probability(value)
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %" if share >= 0.1 else "under 0.1 %"
