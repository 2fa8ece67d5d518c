"""Whole responses in JSON."""

from typing import Any

import orjson
from starlette.responses import Response

WELCOME = "MPT is served here: OpenAI's API under /v1, Ollama's under /api"


def as_json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
