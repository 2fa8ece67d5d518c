"""Log-probabilities as the APIs show them: OpenAI's two styles and vLLM's of prompts."""

from collections.abc import Callable, Sequence
from typing import Any

from mpt.engine.request import TokenLogprob
from mpt.tokenizer import DetokenizeStream, Tokenizer

_LOWEST = -9999.0  # JSON has no -inf; the value OpenAI's servers use


class CompletionLogprobs:
    """The completions style, growing: parallel lists of tokens, their values, alternatives and places in the text."""

    def __init__(self, tokenizer: Tokenizer, n_top: int, by_id: bool = False) -> None:
        self._n_top, self._name = n_top, namer(tokenizer, by_id)
        self._detokenize = DetokenizeStream(tokenizer, skip_special_tokens=False)
        self._offset = 0

    def add(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The lists for these entries; offsets go on from those before."""
        name = self._name
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._detokenize.push(entry.token_id))
            tops.append(None if entry.logprob is None else self._top(entry, entry.logprob))
        return {
            "tokens": [name(entry.token_id) for entry in entries],
            "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob, logprob: float) -> dict[str, float]:
        """The token itself and its alternatives: the ones asked for by id, else the best.

        Of two tokens with the same text the better one is told.
        """
        name = self._name
        shown = entry.named or entry.top[: self._n_top]
        best = {name(token): finite(value) for token, value in reversed(shown)}
        return {name(entry.token_id): finite(logprob), **dict(reversed(best.items()))}


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob], by_id: bool = False) -> dict[str, Any]:
    """The chat style: each token with its bytes and alternatives, the best or those that were asked for by their ids.

    Sources: OpenAI's API reference; vLLM's `logprob_token_ids`, which tell of the token itself too.
    """
    name = namer(tokenizer, by_id)

    def describe(token: int, logprob: float) -> dict[str, Any]:
        return {"token": name(token), "logprob": finite(logprob), "bytes": list(tokenizer.token_bytes(token))}

    def alternatives(entry: TokenLogprob) -> dict[int, float]:
        return {entry.token_id: entry.logprob or 0.0, **dict(entry.named)} if entry.named else dict(entry.top)

    content = [
        {
            **describe(entry.token_id, entry.logprob or 0.0),
            "top_logprobs": [describe(token, value) for token, value in alternatives(entry).items()],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob], n_top: int) -> list[dict[str, Any] | None]:
    """vLLM's style: for each prompt token but the first, itself and the n_top best by their ids."""
    shown: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry.logprob is None:
            shown.append(None)
            continue
        top = entry.top[:n_top]
        ranks = {token: rank for rank, (token, _) in enumerate(top, 1)}
        found = {entry.token_id: entry.logprob, **dict(top)}
        shown.append(
            {
                str(token): {
                    "logprob": finite(value),
                    "rank": ranks.get(token),  # of a token that is not among the best, nobody has counted it
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, value in found.items()
            }
        )
    return shown


def namer(tokenizer: Tokenizer, by_id: bool) -> Callable[[int], str]:
    """What a token is called: its text, or with vLLM's `return_tokens_as_token_ids` its id."""
    return (lambda token: f"token_id:{token}") if by_id else tokenizer.token_text


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
