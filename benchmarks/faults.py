"""What goes wrong around a server, done to it on purpose while `benchmarks/chaos.py` asks it.

A fault kills a process, fills the sockets, or changes the config. After each one `Faults` measures how long it takes
until every model answers again, and until the part that died is there again. The faults and their victims are drawn
from a generator of the run's seed; the next one strikes when the last one is over.

The server is started here, and started again whenever it ends, as systemd or Kubernetes would.
"""

import asyncio
import contextlib
import random
import re
import resource
import shlex
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import psutil
import yaml

Json = dict[str, Any]

# How the command lines of the processes begin that a fault kills.
PARTS = {
    "replica": r"ray::ServeReplica:\w+:(?!Router|Settings)",
    "router": r"ray::ServeReplica:\w+:Router",
    "controller": r"ray::ServeController",
    "haproxy": r"\S+/haproxy ",
    "haproxy manager": r"ray::HAProxyManager",
    "raylet": r"\S+/raylet ",
    "gcs": r"\S+/gcs_server ",
}
OTHERS = ("server", "rollout", "silent sockets", "early closers", "config")
NAMES = (*PARTS, *OTHERS)
IN_A_ROW = 3  # rounds that every model must answer before a fault is over
BACK_WITHIN_S = 180.0
SILENT_S = 20.0  # how long silent sockets are held
HEALTH_S = 5.0  # within which /health must answer meanwhile
N_CLOSERS = 100
PROBE_S = 0.5  # between two looks whether a model answers
RESTART_S = 1.0  # a supervisor's pause


class Supervisor:
    """A server's process, started again when it ends."""

    def __init__(self, command: str, log: Path | None = None) -> None:
        self._command, self._log = shlex.split(command), log
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self.exit_codes: list[int] = []

    async def __aenter__(self) -> "Supervisor":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            self.exit_codes.append(await self._process.wait())

    async def _run(self) -> None:
        while True:
            with contextlib.ExitStack() as stack:
                output = asyncio.subprocess.DEVNULL if self._log is None else stack.enter_context(self._log.open("ab"))
                self._process = await asyncio.create_subprocess_exec(*self._command, stdout=output, stderr=output)
            self.exit_codes.append(await self._process.wait())
            await asyncio.sleep(RESTART_S)

    @property
    def root(self) -> psutil.Process | None:
        """The server's first process, or None between two of its lives."""
        if self._process is None or self._process.returncode is not None:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid)
        return None

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of a part, by pid."""
        root, found = self.root, []
        for process in root.children(recursive=True) if root is not None else []:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if re.match(PARTS[part], " ".join(process.cmdline())):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def resident_mb(self) -> float:
        root, n_bytes = self.root, 0
        for process in [root, *root.children(recursive=True)] if root is not None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                n_bytes += process.memory_info().rss
        return n_bytes / 1e6


@dataclass(frozen=True)
class Plan:
    """A server that is started here, and what is done to it."""

    command: str
    faults: tuple[str, ...] = ()
    pause_s: float = 10.0  # between two faults
    config: Path | None = None  # of the server, for the fault `config`
    reload: str | None = None  # the command that applies it
    log: Path | None = None  # of the server


@dataclass
class Strike:
    """One fault. Seconds count from the strike; None: not back within BACK_WITHIN_S."""

    fault: str
    victim: str
    at_s: float  # since the storm began
    answers_after_s: float | None = None  # every model has answered, and goes on answering
    part_after_s: float | None = None  # as many processes of the part as before
    worst_wait_s: float = 0.0  # of a request that was tried again until it was answered
    wrong: str = ""


class Faults:
    """The faults of one run, one after the other. `strikes` is what happened."""

    def __init__(
        self, url: str, headers: dict[str, str], models: list[str], supervisor: Supervisor, plan: Plan, seed: int
    ) -> None:
        self._url, self._headers, self._models, self._supervisor = url, headers, models, supervisor
        self._plan = plan
        self._rng = random.Random(f"{seed}/faults")
        self.strikes: list[Strike] = []
        self._since = self._until = -1.0  # of the newest fault, by the monotonic clock

    def excuses(self, began: float) -> bool:
        """Whether a broken connection of a request that began then is a fault's doing."""
        return self._since >= 0 and (self._until < 0 or began <= self._until + 1)

    async def run(self, until: float) -> None:
        """Strike with each of the planned ones in a drawn order, over and over, until the time is up."""
        started = time.monotonic()
        while True:
            for name in self._rng.sample(self._plan.faults, len(self._plan.faults)):
                await asyncio.sleep(self._plan.pause_s)
                if time.monotonic() > until:
                    return
                strike = Strike(name, "", round(time.monotonic() - started, 1))
                self.strikes.append(strike)
                self._since, self._until = time.monotonic(), -1.0
                await self._strike(strike)
                self._until = time.monotonic()

    async def _strike(self, strike: Strike) -> None:
        others: dict[str, Callable[[Strike], Awaitable[None]]] = {
            "server": self._server, "silent sockets": self._silent, "early closers": self._close_early,
            "config": self._config, "rollout": self._rollout,
        }  # fmt: skip
        n_before = len(self._supervisor.processes(strike.fault)) if strike.fault in PARTS else 0
        if strike.fault in others:
            await others[strike.fault](strike)
        elif n_before:
            victim = self._rng.choice(self._supervisor.processes(strike.fault))
            strike.victim = f"{victim.pid} {' '.join(victim.cmdline())[:60]}"
            victim.kill()
        else:
            strike.wrong = "no such process"
        await asyncio.gather(self._until_answers(strike), self._until_there(strike, n_before))

    async def _server(self, strike: Strike) -> None:
        if root := self._supervisor.root:
            strike.victim = f"{root.pid} {' '.join(root.cmdline())[:60]}"
            root.kill()

    async def _rollout(self, strike: Strike) -> None:
        """What a rollout does: SIGTERM, and the supervisor starts the next one."""
        if root := self._supervisor.root:
            strike.victim = f"SIGTERM to {root.pid}"
            root.terminate()
            until = time.monotonic() + BACK_WITHIN_S
            while self._supervisor.root == root and time.monotonic() < until:
                await asyncio.sleep(0.1)

    async def _silent(self, strike: Strike) -> None:
        """Sockets that say nothing, as many as this process may open; /health answers all the same."""
        n = min(4300, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
        where = urlsplit(self._url)
        silent: list[socket.socket] = []
        try:
            for k in range(n):
                each = socket.socket()
                each.setblocking(False)
                silent.append(each)
                with contextlib.suppress(BlockingIOError):
                    each.connect((where.hostname, where.port))
                if k % 100 == 0:
                    await asyncio.sleep(0.05)
            strike.victim = f"{n} sockets"
            until = time.monotonic() + SILENT_S
            while time.monotonic() < until and not strike.wrong:
                strike.wrong = await self._health()
                await asyncio.sleep(1)
        finally:
            for each in silent:
                each.close()

    async def _health(self) -> str:
        try:
            async with self._session(HEALTH_S) as session, session.get(f"{self._url}/health") as response:
                return "" if response.status == 200 else f"/health is {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"/health: {type(error).__name__} {error}"

    async def _close_early(self, strike: Strike) -> None:
        """Streams whose clients leave with the first token."""

        async def close() -> None:
            body = {"model": self._rng.choice(self._models), "prompt": "The", "max_tokens": 200, "stream": True}
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with (
                    self._session(30) as session,
                    session.post(f"{self._url}/v1/completions", data=orjson.dumps(body), headers=self._headers) as got,
                ):
                    await got.content.readany()

        await asyncio.gather(*(close() for _ in range(N_CLOSERS)))
        strike.victim = f"{N_CLOSERS} streams"

    async def _config(self, strike: Strike) -> None:
        """One changed option of one model, applied while everybody asks."""
        plan = self._plan
        assert plan.config is not None and plan.reload is not None
        config = yaml.safe_load(plan.config.read_text())
        models = config["applications"][0]["args"]["models"]
        name = self._rng.choice(sorted(models))
        models[name]["max_running"] = 9 + len(self.strikes)
        strike.victim = f"{name}: max_running {models[name]['max_running']}"
        plan.config.write_text(yaml.safe_dump(config))
        done = await asyncio.create_subprocess_exec(
            *shlex.split(plan.reload), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        _, said = await done.communicate()
        if done.returncode:
            strike.wrong = f"`{plan.reload}` left with {done.returncode}: {said.decode()[-200:]}"

    async def _until_answers(self, strike: Strike) -> None:
        waits = await asyncio.gather(*(self._until_one_answers(model) for model in self._models))
        if None not in waits:
            strike.answers_after_s = round(max(after for after, _ in waits if after is not None), 2)
        strike.worst_wait_s = round(max(worst for _, worst in waits), 2)

    async def _until_one_answers(self, model: str) -> tuple[float | None, float]:
        """When it answers from then on, and the longest that a client which tries again had to wait."""
        started = began = time.monotonic()
        n_in_a_row, first, worst_s = 0, 0.0, 0.0
        while time.monotonic() < started + BACK_WITHIN_S:
            if await self._answers(model):
                now = time.monotonic()
                worst_s, began = max(worst_s, now - began), now
                n_in_a_row, first = n_in_a_row + 1, first if n_in_a_row else now - started
                if n_in_a_row == IN_A_ROW:
                    return first, worst_s
            else:
                n_in_a_row = 0
            await asyncio.sleep(PROBE_S)
            began = began if n_in_a_row == 0 else time.monotonic()
        return None, time.monotonic() - began

    async def _answers(self, model: str) -> bool:
        body = orjson.dumps({"model": model, "prompt": "The", "max_tokens": 1})
        try:
            async with (
                self._session(BACK_WITHIN_S) as session,
                session.post(f"{self._url}/v1/completions", data=body, headers=self._headers) as response,
            ):
                return response.status == 200 and bool(orjson.loads(await response.read())["choices"])
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError, KeyError):
            return False

    async def _until_there(self, strike: Strike, n_before: int) -> None:
        started = time.monotonic()
        gone = {strike.victim.partition(" ")[0]}
        while n_before and time.monotonic() < started + BACK_WITHIN_S:
            alive = [each for each in self._supervisor.processes(strike.fault) if str(each.pid) not in gone]
            if len(alive) >= n_before:
                strike.part_after_s = round(time.monotonic() - started, 2)
                return
            await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def _session(self, timeout_s: float) -> AsyncIterator[aiohttp.ClientSession]:
        """With connections of its own: one that a fault broke says nothing about the next."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
            yield session
