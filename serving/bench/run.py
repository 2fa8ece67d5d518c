"""Runs `mpt bench`: finds the model, measures its tokens per word, sends the load, prints the report."""

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mpt.errors import MachineRefused, UserError
from mpt.files import require_writable, write_whole
from serving.bench.client import Target, served_models
from serving.bench.load import Load, Prompt, drive, random_words, read_dataset
from serving.bench.record import Record
from serving.bench.report import Report, plot


@dataclass(frozen=True)
class Bench:
    """What `mpt bench` was told."""

    url: str
    model: str | None
    api_key: str | None
    load: Load
    chat: bool
    prompt_tokens: int
    output_tokens: int
    dataset: Path | None
    ignore_eos: bool
    temperature: float
    timeout_s: float
    json_file: Path | None
    plot_file: Path | None

    def fields(self) -> dict[str, Any]:
        """What each body has beside the prompt."""
        asked = {"max_tokens": self.output_tokens, "temperature": self.temperature}
        return {**asked, "ignore_eos": True} if self.ignore_eos else asked


def run(bench: Bench) -> int:
    """Run a load and print its report; the exit code. Raises UserError and OSError before anything is sent."""
    for option, file in (("--json", bench.json_file), ("--plot", bench.plot_file)):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"`{option} {file}`: there is no folder `{file.absolute().parent}`")
        if file is not None:
            require_writable(file)
    if bench.plot_file is not None and bench.plot_file.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"`--plot {bench.plot_file}` is no picture's name; end it in .png, .svg or .pdf")
    dataset = None if bench.dataset is None else read_dataset(bench.dataset, chat=bench.chat)
    report = asyncio.run(_measured(bench, dataset))
    console = Console()
    for line in report.lines():
        console.print(line, highlight=False, soft_wrap=isinstance(line, str))
    try:
        if bench.json_file is not None:
            write_whole(bench.json_file, json.dumps(report.as_json(), indent=1) + "\n")
        if bench.plot_file is not None:
            plot(report, bench.plot_file)
    except OSError as error:
        raise MachineRefused(f"the figures above could not be written: {error}") from error
    if report.interrupted:
        return 130  # as a shell says of Ctrl-C
    return 0 if report.good else 1


async def _measured(bench: Bench, dataset: list[Prompt] | None) -> Report:
    url = bench.url.rstrip("/")
    url = url if url.endswith("/v1") else f"{url}/v1"
    headers = {"authorization": f"Bearer {bench.api_key}"} if bench.api_key else {}
    timeout = aiohttp.ClientTimeout(total=bench.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)  # the load says how many
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        model = bench.model or (await served_models(session, url))[0]
        probe = Target(session, url, model, bench.chat, {**bench.fields(), "max_tokens": 2})
        per_word, beside = await probe.tokens_per_word()
        n_words = max(1, round((bench.prompt_tokens - beside) / per_word))
        prompts: Iterator[Prompt] = (
            random_words(n_words, bench.load.seed) if dataset is None else itertools.cycle(dataset)
        )
        target = Target(session, url, model, bench.chat, bench.fields(), probe.counts)
        records, interrupted = await _driven(bench.load, prompts, target)
    return Report(records, {"url": url, "model": model, "chat": bench.chat, "load": _words(bench.load)}, interrupted)


async def _driven(load: Load, prompts: Iterator[Prompt], target: Target) -> tuple[list[Record], bool]:
    """The load's requests in the order of their ends, under a bar on a terminal."""
    records: list[Record] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task(target.model, total=load.n_requests)

        def seen(record: Record) -> None:
            records.append(record)
            bar.advance(task)

        interrupted = await drive(load, prompts, target.send, seen)
    return records, interrupted


def _words(load: Load) -> str:
    """How it was sent, in words."""
    parts = [] if load.rate is None else [f"{load.rate:g} requests/s"]
    return ", ".join(parts if load.concurrency is None else [*parts, f"at most {load.concurrency} at once"])
