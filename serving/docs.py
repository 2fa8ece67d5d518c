"""The API's own description: /openapi.json, and /docs as one plain page.

The document is made here and not by FastAPI, which knows neither the bodies, since `protocol/` reads them, nor the
answers, which are plain dicts. Swagger's page would load scripts from other people's servers.
"""

import html
import re
from collections.abc import Iterable
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, Response

import mpt
from serving.api.answers import ANSWERS, OPEN, REASONS, Answer, error_of, statuses_of
from serving.routes import BODIES, ROUTES, Route
from serving.wire import wire_of

_ABOUT = "OpenAI's API over MPT checkpoints, with Anthropic's Messages, Ollama's routes and those of vLLM beside it."
_REFERENCES = "#/components/schemas/{model}"
_HEADERS = {"x-request-id": {"description": "Names the request, here and in the logs.", "schema": {"type": "string"}}}
_LATER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}}}
_STYLE = (
    "body{font:16px system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem}td,th{text-align:left;"
    "vertical-align:top;padding:.4rem .8rem .4rem 0}"
)


def add_docs(app: FastAPI, *, needs_key: bool, also: tuple[int, ...] = ()) -> None:
    """Serve /openapi.json and /docs. also: statuses that every route has here."""
    document = openapi(needs_key=needs_key, also=also)
    raw, page = orjson.dumps(document), _page(document)

    @app.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def openapi_json() -> Response:
        return Response(raw, media_type="application/json")

    @app.api_route("/docs", methods=["GET", "HEAD"])
    async def docs() -> Response:
        return HTMLResponse(page)


def openapi(*, needs_key: bool, also: tuple[int, ...] = ()) -> dict[str, Any]:
    """The OpenAPI 3.1 document. Source: the OpenAPI Specification, 3.1.1."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(_template(route), {})[route.method.lower()] = _operation(route, also)
    return {
        "openapi": "3.1.0",
        "info": {"title": "MPT", "version": mpt.__version__, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "One of the server's keys."}
            },
        },
        "security": [{"key": []}] if needs_key else [],
    }


def _template(route: Route) -> str:
    return re.sub(r":\w+}", "}", route.path)


def _operation(route: Route, also: tuple[int, ...]) -> dict[str, Any]:
    answer = ANSWERS[route.name]
    found: dict[str, Any] = {"operationId": route.name, "description": route.description}
    if route.name in OPEN:
        found["security"] = []
    names = re.findall(r"{(\w+)", route.path)
    text = {"type": "string", "minLength": 1}
    parameters = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
    for name, what in answer.query.items():
        parameters.append({"name": name, "in": "query", "required": False, "schema": text, "description": what})
    if parameters:
        found["parameters"] = parameters
    if route.body is not None:
        found["requestBody"] = {"required": True, "content": _content(route.body, answer.asked)}
    if answer.form is not None:
        found["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": answer.form}}}
    found["responses"] = {"200": _whole(route, answer)} | {
        str(status): _refused(route, answer, status) for status in sorted({*statuses_of(route), *also})
    }
    return found


def _content(shape: type[BaseModel], example: Any = None) -> dict[str, Any]:
    media: dict[str, Any] = {"schema": {"$ref": _REFERENCES.format(model=shape.__name__)}}
    return {"application/json": media if example is None else media | {"example": example}}


def _whole(route: Route, answer: Answer) -> dict[str, Any]:
    """A 200: a whole answer, or a stream whose pieces have a shape."""
    if isinstance(answer.shape, str):
        content: dict[str, Any] = {answer.shape: {"schema": {"type": "string"}}}
    else:
        content = _content(answer.shape, answer.example)
    if answer.piece is not None:
        reference = _REFERENCES.format(model=answer.piece.__name__)
        said = f"With `stream`: pieces, each the JSON of `{answer.piece.__name__}`."
        schema = {"type": "string", "description": said, "x-piece": {"$ref": reference}}
        content[wire_of(route.path).media_type.partition(";")[0]] = {"schema": schema}
    return {"description": "The answer.", "headers": _HEADERS, "content": content}


def _refused(route: Route, answer: Answer, status: int) -> dict[str, Any]:
    shape = answer.unavailable if status == 503 and answer.unavailable is not None else error_of(route.path)
    headers = _HEADERS | (_LATER if status in (429, 503) else {})
    return {"description": REASONS[status], "headers": headers, "content": _content(shape)}


def _schemas() -> dict[str, Any]:
    """Every body and every answer, by name."""
    bodies = _defined(BODIES)
    for body in bodies.values():
        _let_model_be_left_out(body)
        _allow_nulls(body)
    said: set[type[BaseModel]] = {error_of(route.path) for route in ROUTES}
    for answer in ANSWERS.values():
        said |= {each for each in (answer.shape, answer.piece, answer.unavailable) if isinstance(each, type)}
    answers = _defined(said)
    assert not bodies.keys() & answers.keys(), bodies.keys() & answers.keys()
    return bodies | answers


def _defined(kinds: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """The JSON schemas of these and of all that they name."""
    wanted = [(kind, "validation") for kind in sorted(kinds, key=lambda kind: kind.__name__)]
    _, found = models_json_schema(wanted, ref_template=_REFERENCES)  # type: ignore[arg-type]
    definitions: dict[str, Any] = found["$defs"]
    return definitions


def _let_model_be_left_out(body: dict[str, Any]) -> None:
    """As `parse` does where one model is served."""
    if "model" in body.get("required", ()):
        body["required"] = [name for name in body["required"] if name != "model"]
        body["properties"]["model"]["description"] = "May be left out where one model is served."


def _allow_nulls(body: dict[str, Any]) -> None:
    """null is as good as left out, wherever a field may be (`NoNulls`)."""
    for name, field in body.get("properties", {}).items():
        branches = field.get("anyOf", [field])
        if name not in body.get("required", ()) and field and {"type": "null"} not in branches:
            about = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
            body["properties"][name] = {"anyOf": [*field.get("anyOf", [field]), {"type": "null"}], **about}


def _page(document: dict[str, Any]) -> str:
    """The routes as a table, with the fields of their bodies."""
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            kind = document["components"]["schemas"].get(body.get("$ref", "").rpartition("/")[2], {})
            fields = ", ".join(f"<code>{name}</code>" for name in kind.get("properties", {}))
            what = html.escape(operation["description"])
            rows.append(f"<tr><td><code>{method.upper()} {html.escape(path)}</code><td>{what}<td>{fields}")
    head = "<!doctype html><meta charset=utf-8><title>MPT API</title><meta name=viewport content='width=device-width'>"
    table = "<table><tr><th>route<th>what it does<th>fields" + "".join(rows) + "</table>"
    said = f"{_ABOUT} Shapes, statuses and examples are in <a href=openapi.json>openapi.json</a>."
    return f"{head}<style>{_STYLE}</style><h1>MPT API</h1><p>{said}{table}"
