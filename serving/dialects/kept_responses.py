"""Responses that may be continued: what `previous_response_id` names, in this process's memory and within limits.

A client finds its own only. The least recently used go first.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import orjson

from serving.errors import NotFound

_MAX_KEPT = 4096
_MAX_BYTES = 64 << 20  # of all conversations as JSON


@dataclass(frozen=True)
class Kept:
    """A response, the messages that led to it, and the message that it is."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    n_bytes: int


class KeptResponses:
    """The conversations kept, in order of last use."""

    def __init__(self, max_kept: int = _MAX_KEPT, max_bytes: int = _MAX_BYTES) -> None:
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self._max_kept, self._max_bytes, self._n_bytes = max_kept, max_bytes, 0

    def add(self, salt: str, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Keep a response of the client that salt stands for."""
        kept = Kept(response, messages, len(orjson.dumps([response, messages])))
        if (
            before := self._kept.pop((salt, response["id"]), None)
        ) is not None:  # a client chose its request's id twice
            self._n_bytes -= before.n_bytes
        self._kept[salt, response["id"]] = kept
        self._n_bytes += kept.n_bytes
        while len(self._kept) > self._max_kept or self._n_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._n_bytes -= oldest.n_bytes

    def get(self, salt: str, name: str, param: str | None = None) -> Kept:
        """A client's response. Raises NotFound."""
        kept = self._kept.get((salt, name))
        if kept is None:
            message = f"no response `{name[:80]}` is kept here; send the whole conversation as `input`"
            raise NotFound(message, code="response_not_found", param=param)
        self._kept.move_to_end((salt, name))
        return kept

    def delete(self, salt: str, name: str) -> None:
        """Forget a client's response. Raises NotFound."""
        self._n_bytes -= self.get(salt, name).n_bytes
        del self._kept[salt, name]
