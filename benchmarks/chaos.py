"""Good and bad clients against a running server for a while: what was lost, what was answered wrong, what memory did.

    mpt serve --port 8123 &
    python benchmarks/chaos.py --url http://127.0.0.1:8123 --pid $! --seconds 60 --streams 100

    python benchmarks/chaos.py --command "mpt cluster --port 8123" --url http://127.0.0.1:8123 --faults all

With `--faults` the parts of the server die meanwhile, and more (`benchmarks/faults.py`). A connection that a fault
broke is counted apart: `away` if there was no answer yet, `cut` if its client saw the answer break off. A stream that
ended as if it were whole is lost, whatever happened.

Every client draws its actions from a generator of its own, seeded with the run's seed and its number; what cannot be
repeated is the timing. A well-formed request must end complete (finish_reason and [DONE], or a whole body, with the
greedy text that the same prompt gave when it was alone), or be refused with 429 or 503 and `Retry-After`, or end in an
error event; anything else is lost. A malformed request must get the 4xx of docs/serving.md with OpenAI's body; anything
else is wrong. Bytes that are not HTTP never reach the API, so any 4xx, or a closed connection, is right for them.

In bfloat16 a greedy text may differ after two tokens of almost the same probability, because other requests in the
batch change how matrix products round. Texts are therefore compared up to the first such tie of the reference; for a
server in float32, `--tie 0` compares them whole.
"""

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import aiohttp
import orjson
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.faults import BACK_WITHIN_S, NAMES, Faults, Plan, Supervisor
from benchmarks.storm import Storm
from benchmarks.storm_cases import OUTCOMES, Ended, Json, Run

# -- memory --------------------------------------------------------------------------------------------------------


class Memory:
    """The resident memory of processes and their children, sampled every second."""

    def __init__(self, roots: Callable[[], list[psutil.Process]]) -> None:
        self._roots = roots
        self.samples: list[tuple[float, float]] = []  # (seconds, MB)

    async def watch(self) -> None:
        while True:
            n_bytes = 0
            for root in self._roots():
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in {root, *root.children(recursive=True)}:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            n_bytes += process.memory_info().rss
            if n_bytes:
                self.samples.append((time.monotonic(), n_bytes / 1e6))
            await asyncio.sleep(1)

    def summary(self) -> Json | None:
        """First, last and highest MB, and the slope of the second half by least squares, in MB a minute."""
        half = self.samples[len(self.samples) // 2 :]
        if len(half) < 2:
            return None
        mean_t, mean_y = (sum(column) / len(half) for column in zip(*half, strict=True))
        slope = sum((t - mean_t) * (y - mean_y) for t, y in half) / sum((t - mean_t) ** 2 for t, _ in half)
        megabytes = [y for _, y in self.samples]
        ends = {"first_mb": megabytes[0], "last_mb": megabytes[-1], "peak_mb": max(megabytes)}
        return {**ends, "slope_mb_per_min": slope * 60}


# -- the run and its report ----------------------------------------------------------------------------------------


async def storm_over(run: Run) -> Json:
    """The whole run as numbers. Raises Ended if the server does not answer before the storm."""
    async with contextlib.AsyncExitStack() as stack:
        supervisor = None
        if run.plan is not None:
            supervisor = await stack.enter_async_context(Supervisor(run.plan.command, run.plan.log))
            await ready(run.url)
        storm = await stack.enter_async_context(Storm(run))
        await storm.prepare()
        memory, tally = Memory(lambda: roots_of(run, supervisor)), storm.tally
        watching = asyncio.create_task(memory.watch())
        started = time.monotonic()
        until = started + run.seconds
        if run.plan is not None and supervisor is not None and run.plan.faults:
            names = [model.name for model in storm.models]
            storm.faults = Faults(storm.url, storm.headers, names, supervisor, run.plan, run.seed)
        striking = storm.faults.run(until) if storm.faults else asyncio.sleep(0)
        await asyncio.gather(striking, storm.bursts(until), *(storm.client(k, until) for k in range(run.n_streams)))
        storm_s, n_tokens = time.monotonic() - started, tally.n_tokens
        watching.cancel()
        await storm.afterwards()
    strikes = storm.faults.strikes if storm.faults else []
    compared = [len(case.text[: case.n_certain]) for case in storm.cases]
    ttft = sorted(tally.ttft_s)
    return {
        "seed": run.seed, "streams": run.n_streams, "seconds": round(storm_s, 1),
        "kinds": {
            kind: {"sent": tally.sent[kind], **{each: tally.outcomes[kind, each] for each in OUTCOMES}}
            for kind in sorted(tally.sent)
        },
        "lost": tally.total("lost"), "wrong": tally.total("wrong"),
        "reasons": [[*reason, count] for reason, count in sorted(tally.reasons.items())],
        "examples": {name: texts for name, texts in tally.examples.items() if texts},
        "ttft_p50_s": quantile(ttft, 0.5), "ttft_p99_s": quantile(ttft, 0.99), "slowest_s": tally.slowest_s,
        "tokens_per_s": n_tokens / storm_s,
        "text_compared": sum(compared) / sum(len(case.text) for case in storm.cases),
        "memory": memory.summary(),
        "strikes": [asdict(strike) for strike in strikes],
        "exit_codes": supervisor.exit_codes if supervisor is not None else [],
    }  # fmt: skip


async def ready(url: str) -> None:
    """Wait until the server says so. Raises Ended after BACK_WITHIN_S."""
    deadline = time.monotonic() + BACK_WITHIN_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url.rstrip('/')}/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise Ended("lost", f"not ready within {BACK_WITHIN_S:.0f} s")


def roots_of(run: Run, supervisor: Supervisor | None) -> list[psutil.Process]:
    """The processes whose memory counts, with their children."""
    if supervisor is not None:
        return [supervisor.root] if supervisor.root is not None else []
    return [psutil.Process(pid) for pid in run.pids if psutil.pid_exists(pid)]


def quantile(ordered: list[float], q: float) -> float | None:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else None


def show(result: Json, console: Console) -> None:
    """The table, the reasons behind its columns, and examples of what went wrong."""
    table = Table(title=f"{result['streams']} clients for {result['seconds']} s, seed {result['seed']}")
    table.add_column("kind")
    for name in ("sent", *OUTCOMES):
        table.add_column(name, justify="right")
    for kind, row in result["kinds"].items():
        table.add_row(kind, *(str(row[name] or "") for name in ("sent", *OUTCOMES)))
    table.add_section()
    totals = (sum(row[name] for row in result["kinds"].values()) for name in ("sent", *OUTCOMES))
    table.add_row("all", *map(str, totals))
    console.print(table)
    reasons: Counter[tuple[str, str]] = Counter()
    for _, outcome, what, count in result["reasons"]:
        reasons[outcome, what] += count
    for (outcome, what), count in reasons.most_common():
        console.print(f"{count:7} {outcome}: {what}", markup=False, highlight=False)
    if result["ttft_p50_s"] is not None:
        p50, p99 = result["ttft_p50_s"], result["ttft_p99_s"]
        console.print(f"TTFT of streams: p50 {p50:.3f} s, p99 {p99:.3f} s; slowest request {result['slowest_s']:.1f} s")
    console.print(
        f"{result['tokens_per_s']:.0f} tokens/s in complete answers; "
        f"{result['text_compared']:.0%} of the reference texts lie before a tie"
    )
    show_strikes(result["strikes"], console)
    if memory := result["memory"]:
        console.print(
            f"memory: {memory['first_mb']:.0f} MB at first, {memory['last_mb']:.0f} at last, peak "
            f"{memory['peak_mb']:.0f}; slope of the second half {memory['slope_mb_per_min']:+.1f} MB/min"
        )
    for name, texts in result["examples"].items():
        for text in texts:
            console.print(f"{name}: {text}", markup=False, highlight=False)
    console.print(f"lost {result['lost']}, wrong {result['wrong']}", style="bold")


def show_strikes(strikes: list[Json], console: Console) -> None:
    """Each kind of fault: how often it struck, the slowest return, what was wrong."""
    if not strikes:
        return
    table = Table("fault", "struck", "all models answer, s", "the part is there, s", "worst wait, s", "wrong")
    for name in sorted({strike["fault"] for strike in strikes}):
        found = [strike for strike in strikes if strike["fault"] == name]
        answers, parts = ([strike[key] for strike in found] for key in ("answers_after_s", "part_after_s"))
        table.add_row(
            name, str(len(found)), "never" if None in answers else f"{max(answers):.1f}",
            "" if None in parts else f"{max(parts):.1f}", f"{max(strike['worst_wait_s'] for strike in found):.1f}",
            "; ".join(strike["wrong"] for strike in found if strike["wrong"]),
        )  # fmt: skip
    console.print(table)


def chaos(
    url: str = typer.Option("http://127.0.0.1:8000", help="The server."),
    api_key: str | None = typer.Option(None, help="A key, if it wants one."),
    pid: str = typer.Option("", metavar="PID[,PID]", help="Processes whose memory, with their children's, to watch."),
    seconds: float = typer.Option(60.0, min=0.1, help="How long clients begin new requests."),
    seed: int = typer.Option(0, help="Of every random choice."),
    streams: int = typer.Option(100, min=1, help="Clients at once."),
    burst: int = typer.Option(400, min=0, help="Requests at once in a burst; 0 for none."),
    patience: float = typer.Option(120.0, min=0.1, help="Seconds after which a request counts as lost."),
    tie: float = typer.Option(0.25, min=0, help="Compare texts up to two tokens this close, in nats; 0 wholly."),
    json: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
    command: str | None = typer.Option(None, help="Start the server by this, and again whenever it ends."),
    faults: str = typer.Option("", metavar="NAME[,NAME]", help=f"With --command: {', '.join(NAMES)}, or all."),
    pause: float = typer.Option(10.0, min=0, help="Seconds between the end of a fault and the next."),
    config: Path | None = typer.Option(None, help="For the fault `config`: the server's config, which is changed."),
    reload: str | None = typer.Option(None, help="For the fault `config`: the command that applies it."),
    log: Path | None = typer.Option(None, help="File for what the server of --command writes."),
) -> None:
    """Good and bad clients against a running server; exit code 1 if a request was lost or answered wrong."""
    names = tuple(name for name in NAMES if faults == "all" or name in faults.split(","))
    if unknown := set(filter(None, faults.split(","))) - {*NAMES, "all"}:
        raise typer.BadParameter(f"no fault {sorted(unknown)}; known: {', '.join(NAMES)}", param_hint="--faults")
    if names and command is None:
        raise typer.BadParameter("a server that is to be hurt is started here; give --command", param_hint="--faults")
    if "config" in names and (config is None or reload is None):
        raise typer.BadParameter("`config` needs --config and --reload", param_hint="--faults")
    pids = tuple(int(each) for each in re.findall(r"\d+", pid))
    if missing := [each for each in pids if not psutil.pid_exists(each)]:
        raise typer.BadParameter(f"no process {missing}", param_hint="--pid")
    try:
        plan = None if command is None else Plan(command, names, pause, config, reload, log)
        run = Run(url, api_key, pids, seconds, seed, streams, burst, patience, tie, plan)
        result = asyncio.run(storm_over(run))
    except (Ended, aiohttp.ClientError) as error:
        typer.echo(f"chaos: {url} does not answer before the storm: {error}", err=True)
        raise typer.Exit(2) from None
    if json is not None:
        json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    show(result, Console(width=120))
    never = [strike for strike in result["strikes"] if strike["wrong"] or strike["answers_after_s"] is None]
    if result["lost"] or result["wrong"] or never:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(chaos)
