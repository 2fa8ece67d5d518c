"""The routes `/v1/files` and `/v1/batches`, in OpenAI's form; off where the server was given no folder for them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse, Response

from serving.auth import Door
from serving.batch.lines import new_id
from serving.batch.service import BatchService
from serving.batch.store import MAX_FILE_BYTES, StoredBatch
from serving.bodies import pieces_of, read
from serving.errors import Forbidden, InvalidRequest, TooLarge, Unavailable, UnsupportedMediaType
from serving.options import HttpOptions
from serving.replies import as_json
from serving.routes import BatchRequest

_WINDOW_S = 24 * 3600
_FORM_BYTES = 64 << 10  # of an upload, beside the file
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def batch_functions(service: BatchService | None, door: Door, options: HttpOptions) -> dict[str, Callable[..., Any]]:
    """What answers each route, by its name. service None: every route says how to turn it on."""

    def ours() -> BatchService:
        if service is None:
            raise Forbidden("this server keeps no files and runs no batches; start it with --batch-dir FOLDER")
        if service.stopped:
            raise Unavailable("the server is shutting down; try again when it is back", code="shutting_down")
        return service

    async def create_file(request: Request) -> Response:
        store, owner = ours().store, request.state.salt
        store.check_room(owner, 0)  # before the body is read
        form = await _read_form(request, options.read_timeout_s)
        try:
            upload = _checked_upload(form)
            store.check_room(owner, upload.size or 0)
            file_id = await asyncio.to_thread(store.keep, upload.file)
        finally:
            await form.close()
        name = (upload.filename or "file")[:255]
        shown = await asyncio.to_thread(store.show_file, owner, file_id, name, "batch")  # it waits for the disk
        return as_json(shown.shown)

    async def files(request: Request) -> Response:
        rows = [file.shown for file in ours().store.files(request.state.salt)]
        purpose, order = request.query_params.get("purpose"), request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"`order` is {order[:20]!r}; it must be `asc` or `desc`", param="order")
        if order == "asc":
            rows.reverse()
        return _page(request, [row for row in rows if purpose in (None, row["purpose"])], 10_000, 10_000)

    async def file(request: Request, file_id: str) -> Response:
        return as_json(ours().store.file(request.state.salt, file_id).shown)

    async def delete_file(request: Request, file_id: str) -> Response:
        ours().store.delete_file(request.state.salt, file_id)
        return as_json({"id": file_id, "object": "file", "deleted": True})

    async def file_content(request: Request, file_id: str) -> Response:
        found = ours().store.file(request.state.salt, file_id)
        path = ours().store.content(found.id)
        return FileResponse(path, media_type="application/jsonl", filename=found.shown["filename"])

    async def create_batch(request: Request) -> Response:
        work, owner = ours(), request.state.salt
        asked = await read(request, BatchRequest, options)
        work.store.file(owner, asked.input_file_id)
        client = door.client({name: value.decode("latin-1") for name, value in request.headers.raw})
        limits = client.limits.requests_per_minute, client.limits.tokens_per_minute
        models = None if client.models is None else sorted(client.models)
        batch = StoredBatch(owner, client.name, limits, _new_batch(asked), models, asdict(client.quotas))
        work.store.add_batch(batch)
        work.begin(batch)
        return as_json(batch.shown)

    async def batches(request: Request) -> Response:
        return _page(request, [batch.shown for batch in ours().store.batches(request.state.salt)], 20, 100)

    async def batch(request: Request, batch_id: str) -> Response:
        return as_json(ours().store.batch(request.state.salt, batch_id).shown)

    async def cancel_batch(request: Request, batch_id: str) -> Response:
        found = ours().store.batch(request.state.salt, batch_id)
        if found.is_over:
            message = f"`{found.id}` is {found.shown['status']} and cannot be cancelled"
            raise InvalidRequest(message, code="batch_is_over", param="batch_id")
        if found.shown["status"] != "cancelling":
            ours().cancel(found)
        return as_json(found.shown)

    return {
        "create_file": create_file, "files": files, "file": file, "delete_file": delete_file,
        "file_content": file_content, "create_batch": create_batch, "batches": batches, "batch": batch,
        "cancel_batch": cancel_batch,
    }  # fmt: skip


def _new_batch(asked: BatchRequest) -> dict[str, Any]:
    now = int(time.time())
    return {
        "id": new_id("batch_"), "object": "batch", "endpoint": asked.endpoint, "errors": None,
        "input_file_id": asked.input_file_id, "completion_window": asked.completion_window, "status": "validating",
        "output_file_id": None, "error_file_id": None, "created_at": now, "expires_at": now + _WINDOW_S,
        **{f"{each}_at": None for each in _TIMES},
        "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": asked.metadata,
    }  # fmt: skip


async def _read_form(request: Request, timeout_s: float) -> FormData:
    """An upload's fields, its file on disk. Raises UnsupportedMediaType, TooLarge, BodyTimeout and InvalidRequest."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise UnsupportedMediaType(
            f"content-type is `{kind[:60]}`; send `multipart/form-data` with `purpose` and `file`"
        )
    too_large = TooLarge(f"the upload is over the limit of {MAX_FILE_BYTES} bytes; split the file")
    pieces = pieces_of(request, MAX_FILE_BYTES + _FORM_BYTES, timeout_s, too_large)
    parser = MultiPartParser(request.headers, pieces, max_files=1, max_fields=8, max_part_size=_FORM_BYTES)
    try:
        return await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InvalidRequest(f"the body is no multipart form: {error}", code="invalid_form") from None


def _checked_upload(form: FormData) -> UploadFile:
    """The file of a form that asks for nothing else. Raises InvalidRequest and TooLarge."""
    upload, purpose = form.get("file"), form.get("purpose")
    for name in form:
        if name not in ("file", "purpose"):
            message = f"unknown parameter `{name[:60]}`; send `purpose` and `file`"
            raise InvalidRequest(message, code="unknown_parameter", param=name[:60])
    if not isinstance(upload, UploadFile):
        raise InvalidRequest("`file` is missing", code="missing_required_parameter", param="file")
    if purpose != "batch":
        raise InvalidRequest("`purpose` must be `batch`; files for other things are not kept here", param="purpose")
    if (upload.size or 0) > MAX_FILE_BYTES:
        raise TooLarge(f"the file is over the limit of {MAX_FILE_BYTES} bytes; split it")
    return upload


def _page(request: Request, rows: list[dict[str, Any]], default: int, most: int) -> Response:
    """The rows behind `after`, at most `limit` of them. Raises InvalidRequest."""
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= most):
        raise InvalidRequest(f"`limit` is {text[:20]!r}; give a whole number from 1 to {most}", param="limit")
    after = request.query_params.get("after")
    if after is not None:
        places = [at for at, row in enumerate(rows) if row["id"] == after]
        if not places:
            raise InvalidRequest(f"`after` names nothing of yours: `{after[:60]}`", param="after")
        rows = rows[places[0] + 1 :]
    shown = rows[: int(text)]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return as_json({"object": "list", "data": shown, **ends, "has_more": len(shown) < len(rows)})
