"""Answers the batches of a store with the server's own app: the same path, keys and limits as over HTTP, last in turn.

A batch's requests enter the app in this process with a key that only this process knows. They count against the limits
of the batch's owner, wait where these say so, and have the lowest priority, so that whoever waits for an answer goes
first. A server that is stopped leaves its batches as they are, and goes on with them when it is started again.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from mpt.engine.request import MAX_PRIORITY
from mpt.errors import MPTError
from serving.auth import Client, Door, Headers
from serving.batch.lines import Line, Problem, Results, check, is_good, read, unanswered
from serving.batch.sending import Sender, send_all
from serving.batch.store import MAX_REQUESTS, Store, StoredBatch
from serving.limits import Limits
from serving.quotas import Quotas

log = logging.getLogger(__name__)

_AT_ONCE = 16  # requests of all batches together: less than a queue takes, enough to fill the steps of a CPU


class BatchDoor:
    """Lets in whom the server's own door does, and the batches of this process as their owners."""

    def __init__(self, door: Door) -> None:
        self._door, self._token = door, secrets.token_hex(32)
        self._clients: dict[str, Client] = {}

    def client(self, headers: Headers) -> Client:
        batch_id = headers.get(b"x-batch-id", "")
        given = headers.get(b"authorization", "").encode("utf-8", "replace")
        if batch_id in self._clients and hmac.compare_digest(given, self._authorization.encode()):
            return self._clients[batch_id]
        return self._door.client(headers)

    def headers(self, batch: StoredBatch) -> dict[str, str]:
        """What a request of a batch must carry."""
        models = None if batch.models is None else frozenset(batch.models)
        limits, quotas = Limits(*batch.limits), Quotas(**batch.quotas)
        self._clients[batch.id] = Client(batch.client, batch.owner, limits, models, quotas)
        return {"authorization": self._authorization, "x-batch-id": batch.id}

    @property
    def _authorization(self) -> str:
        return f"Bearer {self._token}"


class BatchService:
    """The batches of one server. takes_priority: whether the engine of a served name knows priorities."""

    def __init__(self, store: Store, app: ASGIApp, door: BatchDoor, takes_priority: Callable[[str], bool]) -> None:
        self.store = store
        self._door, self._takes_priority = door, takes_priority
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://localhost/v1", timeout=None)
        self._sender = Sender(self._client, gives_up=False)
        self._free = asyncio.Semaphore(_AT_ONCE)  # whoever waits longest goes first, so batches take turns
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.stopped = False

    def resume(self) -> None:
        """Go on with what is not over, from a running event loop. Batches may have been made before: HTTP is up."""
        for batch in reversed(self.store.batches()):
            if not batch.is_over and batch.id not in self._tasks:
                self.begin(batch)

    def begin(self, batch: StoredBatch) -> None:
        """Work on a batch until it is over."""
        task = asyncio.get_running_loop().create_task(self._work(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

    def cancel(self, batch: StoredBatch) -> None:
        """End a batch with the answers it has."""
        batch.shown |= {"status": "cancelling", "cancelling_at": int(time.time())}
        self.store.save(batch)
        if batch.id in self._tasks:
            self._tasks[batch.id].cancel()

    async def stop(self) -> None:
        """Leave all batches as they are; `resume` goes on with them."""
        self.stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()
        self.store.close()

    async def _work(self, batch: StoredBatch) -> None:
        try:
            if batch.shown["status"] == "validating" and not await self._validated(batch):
                return
            if batch.shown["status"] != "cancelling":
                await self._answered(batch)
            self._finish(batch, "cancelled" if batch.shown["status"] == "cancelling" else "completed")
        except asyncio.CancelledError:
            if batch.shown["status"] != "cancelling":
                raise  # the server stops
            self._finish(batch, "cancelled")
        except TimeoutError:
            self._finish(batch, "expired")
        except Exception as error:
            log.exception("batch %s failed", batch.id)
            told = "the server cannot write any more" if isinstance(error, MPTError) else "internal error"
            self._fail(batch, [Problem("server_error", told)])

    async def _validated(self, batch: StoredBatch) -> bool:
        path = self.store.content(batch.shown["input_file_id"])
        n_requests, problems = await asyncio.to_thread(check, path, batch.shown["endpoint"], MAX_REQUESTS)
        if problems:
            self._fail(batch, problems)
            return False
        batch.shown |= {"status": "in_progress", "in_progress_at": int(time.time())}
        batch.shown["request_counts"]["total"] = n_requests
        self.store.save(batch)
        return True

    async def _answered(self, batch: StoredBatch) -> None:
        """Answer what has no result yet. Raises TimeoutError when its time is over; then the rest is told so."""
        source = self.store.content(batch.shown["input_file_id"])
        headers = self._door.headers(batch)
        with ExitStack() as opened:
            good, bad = (opened.enter_context(closing(Results(path))) for path in self._paths(batch))
            counts = batch.shown["request_counts"]
            counts |= {"completed": len(good.done), "failed": len(bad.done)}

            def done(result: dict[str, Any]) -> None:
                (good if is_good(result) else bad).append(result)
                counts["completed" if is_good(result) else "failed"] += 1

            async def send(line: Line) -> dict[str, Any]:
                async with self._free:
                    return await self._sender.send(self._last_in_turn(line), headers)

            try:
                async with asyncio.timeout(max(0.0, batch.shown["expires_at"] - time.time())):
                    await send_all(read(source, frozenset(good.done | bad.done)), send, done, _AT_ONCE)
            except TimeoutError:
                for line in read(source, good.done | bad.done):
                    done(unanswered(line, "batch_expired", "not executed before the completion window ended"))
                raise

    def _last_in_turn(self, line: Line) -> Line:
        if line.url == "/v1/embeddings" or not self._takes_priority(str(line.body.get("model"))):
            return line
        return replace(line, body={**line.body, "priority": MAX_PRIORITY})

    def _paths(self, batch: StoredBatch) -> tuple[Path, Path]:
        good, bad = batch.results
        return self.store.content(good), self.store.content(bad)

    def _finish(self, batch: StoredBatch, status: str) -> None:
        """Show its owner the files of results that are not empty, then that it is over."""
        shown, counts = batch.shown, batch.shown["request_counts"]
        kinds = ("output", "completed"), ("error", "failed")
        for (kind, counted), file_id, path in zip(kinds, batch.results, self._paths(batch), strict=True):
            with closing(Results(path)) as found:  # without a half-written last line
                counts[counted] = len(found.done)
            if counts[counted]:
                self.store.show_file(batch.owner, file_id, f"{batch.id}_{kind}.jsonl", "batch_output")
                shown[f"{kind}_file_id"] = file_id
            else:
                path.unlink()
        shown |= {"status": status, "finalizing_at": shown["finalizing_at"] or int(time.time())}
        shown[f"{status}_at"] = int(time.time())
        self.store.save(batch)
        log.info("batch %s %s: %d answered, %d failed", batch.id, status, counts["completed"], counts["failed"])

    def _fail(self, batch: StoredBatch, problems: list[Problem]) -> None:
        batch.shown["errors"] = {"object": "list", "data": [problem.as_json() for problem in problems]}
        try:
            self._finish(batch, "failed")
        except (OSError, MPTError):
            log.exception("batch %s cannot be written", batch.id)
