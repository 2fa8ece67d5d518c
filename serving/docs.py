"""The API's own description: /openapi.json, and /docs as one plain page."""

import html
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import HTMLResponse, Response


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """What a route adds to its OpenAPI operation: the JSON body it reads."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_docs(app: FastAPI, *kinds: type[BaseModel]) -> None:
    """Serve /openapi.json and /docs. kinds: the bodies that `takes` named.

    FastAPI cannot know them, since bodies are read by `serving/protocol/body.py`; Swagger's page would load scripts
    from other people's servers.
    """
    schemas: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**schema.pop("$defs", {}), kind.__name__: schema}

    def described() -> dict[str, Any]:
        document = app.openapi()
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)  # FastAPI's own refusal, which no route here gives
        document["components"] = {"schemas": schemas}
        return document

    @app.api_route("/openapi.json", methods=["GET", "HEAD"], include_in_schema=False)
    async def openapi() -> Response:
        return Response(orjson.dumps(described()), media_type="application/json")

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs() -> Response:
        rows = []
        for path, methods in app.openapi()["paths"].items():
            for method, operation in methods.items():
                takes = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                kind = takes.get("schema", {}).get("$ref", "").rpartition("/")[2]
                fields = ", ".join(f"<code>{name}</code>" for name in schemas.get(kind, {}).get("properties", {}))
                what = html.escape(operation.get("description", ""))
                rows.append(f"<tr><td><code>{method.upper()} {html.escape(path)}</code><td>{what}<td>{fields}")
        page = (
            "<!doctype html><meta charset=utf-8><title>MPT API</title><meta name=viewport content='width=device-width'>"
            "<style>body{font:16px system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem}td,th{text-align:left;"
            "vertical-align:top;padding:.4rem .8rem .4rem 0}</style><h1>MPT API</h1><p>OpenAI's API; the schema is at "
            "<a href=openapi.json>openapi.json</a>.<table><tr><th>route<th>what it does<th>fields" + "".join(rows)
        )
        return HTMLResponse(page + "</table>")
