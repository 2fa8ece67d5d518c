"""Runs `mpt run-batch`: a file of requests against a server, or against models opened in this process."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mpt.errors import Interrupted, UserError
from mpt.options import ModelOptions
from serving.batch.lines import Results, check, is_good, read
from serving.batch.sending import Sender, ServerLost, send_all
from serving.options import ServeOptions


@dataclass(frozen=True)
class BatchRun:
    """What `mpt run-batch` was told. url None: `models` are opened here."""

    requests: Path
    results: Path
    url: str | None
    models: Mapping[str, ModelOptions]
    api_key: str | None
    n_at_once: int
    timeout_s: float


def run(batch: BatchRun) -> int:
    """Answer what is not answered yet; the exit code. Raises UserError before anything is sent, Interrupted later."""
    if batch.results.exists() and batch.requests.exists() and batch.results.samefile(batch.requests):
        raise UserError(f"`{batch.results}` is the file of requests; give another one for the results")
    try:
        n_requests, problems = check(batch.requests)
    except OSError as error:
        raise UserError(f"`{batch.requests}` cannot be read: {error.strerror}") from error
    if problems:
        shown = "; ".join(f"line {p.line}: {p.message}" if p.line else p.message for p in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"`{batch.requests}` is no batch, and nothing was sent: {shown}{more}")
    with closing(Results(batch.results)) as results:
        n_before = len(results.done)
        outcomes: Counter[str] = Counter()
        try:
            if any(read(batch.requests, results.done)):  # else no model need be opened
                asyncio.run(_answer_all(batch, results, outcomes, n_requests))
        except KeyboardInterrupt:
            raise Interrupted(_summary(batch, outcomes, n_before) + "; run the same command again") from None
        except ServerLost as error:
            raise Interrupted(
                f"{_summary(batch, outcomes, n_before)}; then nobody answered any more ({error}); see to the server "
                "and run the same command again: it goes on with the rest"
            ) from error
    print(_summary(batch, outcomes, n_before))
    return 1 if outcomes and not outcomes["answered"] else 0


def _summary(batch: BatchRun, outcomes: Counter[str], n_before: int) -> str:
    failed = {kind: n for kind, n in outcomes.items() if kind != "answered"}
    kinds = f" ({', '.join(f'{n} x {kind}' for kind, n in failed.items())})" if failed else ""
    before = f", {n_before} were there before" if n_before else ""
    return f"{outcomes['answered']} answered, {sum(failed.values())} failed{kinds}{before}: `{batch.results}`"


async def _answer_all(batch: BatchRun, results: Results, outcomes: Counter[str], n_requests: int) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    async with _client(batch) as client:
        sender = Sender(client, gives_up=True)
        with bar:
            task = bar.add_task(batch.requests.name, total=n_requests, completed=min(len(results.done), n_requests))

            def done(result: dict[str, Any]) -> None:
                results.append(result)
                bar.advance(task)
                outcomes["answered" if is_good(result) else str(result["response"]["status_code"])] += 1

            left = read(batch.requests, frozenset(results.done))
            await send_all(left, sender.send, done, batch.n_at_once)


@asynccontextmanager
async def _client(batch: BatchRun) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server, or of an app over models opened here."""
    if batch.url is not None:
        url = batch.url.rstrip("/")
        headers = {"authorization": f"Bearer {batch.api_key}"} if batch.api_key else {}
        limits = httpx.Limits(max_connections=batch.n_at_once)
        async with httpx.AsyncClient(
            base_url=url if url.endswith("/v1") else f"{url}/v1",
            headers=headers,
            timeout=httpx.Timeout(batch.timeout_s, connect=10.0),
            limits=limits,
        ) as client:
            yield client
        return
    from mpt.engine.endpoint import open_endpoint  # torch starts here
    from serving.app import make_app
    from serving.endpoints import Serving

    options = ServeOptions(models=batch.models, docs=False, request_timeout_s=batch.timeout_s)
    serving = Serving(options)
    with ExitStack() as opened:
        for name, model in batch.models.items():
            serving.endpoints[name] = await asyncio.to_thread(open_endpoint, name, model, len(batch.models))
            opened.callback(serving.endpoints[name].engine.close)
        transport = httpx.ASGITransport(make_app(serving), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here/v1", timeout=None) as client:
            yield client
