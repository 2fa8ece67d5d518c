"""What a dialect gives for one request: the answer of a chat or completion in its own shape, whole or streamed."""

import re
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from serving.errors import InvalidRequest
from serving.wire import OPENAI, Wire

if TYPE_CHECKING:  # it needs torch, which a cluster's routers do without
    from serving.jobs import Job

Chunks = AsyncGenerator[dict[str, Any], None]


class Translation:
    """OpenAI's own; a dialect overrides what it has otherwise."""

    wire: Wire = OPENAI
    shortens = False  # a limit of the answer over the room there is means all the room: clients must send one
    names: Mapping[str, str] = {}

    def begin(self, job: "Job") -> None:
        """Called with the request at work, before its answer is asked for."""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        return answer

    def events(self, chunks: Chunks) -> Chunks:
        """The events of a stream."""
        return chunks

    def in_its_names(self, error: InvalidRequest) -> InvalidRequest:
        """An error about a field as the client called it."""
        field = (error.param or "").partition("[")[0].partition(".")[0]
        if field not in self.names:
            return error
        said = re.sub(rf"`{field}[^`]*`", f"`{self.names[field]}`", str(error))
        return InvalidRequest(said, code=error.code, param=self.names[field], **error.numbers)


def with_usage(asked: dict[str, Any]) -> dict[str, Any]:
    """A body of ours whose stream tells in every chunk what it has cost, which dialects show at the beginning."""
    if asked.get("stream"):
        asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return asked


def given(**fields: Any) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}
