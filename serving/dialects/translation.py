"""What a dialect gives for one request: the answer of a chat or completion in its own shape, whole or streamed."""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from serving.jobs import Job
from serving.wire import OPENAI, Wire

Chunks = AsyncGenerator[dict[str, Any], None]


class Translation(Protocol):
    wire: Wire
    shortens: bool  # a limit of the answer over the room there is means all the room: clients must send one

    def begin(self, job: Job) -> None:
        """Called with the request at work, before its answer is asked for."""
        ...

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        ...

    def events(self, chunks: Chunks) -> Chunks:
        """The events of a stream."""
        ...


class AsItIs:
    """OpenAI's own."""

    wire, shortens = OPENAI, False

    def begin(self, job: Job) -> None:
        pass

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        return answer

    def events(self, chunks: Chunks) -> Chunks:
        return chunks


def with_usage(asked: dict[str, Any]) -> dict[str, Any]:
    """A body of ours whose stream tells in every chunk what it has cost, which dialects show at the beginning."""
    if asked.get("stream"):
        asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return asked


def given(**fields: Any) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}
