"""Each part of a cluster is killed, on real clusters: what clients see meanwhile, and that it is back or gone for good.

The rows of the table in docs/operations.md name these tests. Clusters take seconds to start, so one is for many deaths.
"""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

import mpt
from mpt.errors import EngineStopped
from serving.cluster import guard
from serving.ports import free_port
from tests.serving.servers import Server, serve_config, start

WAIT_S = 60  # for what takes a few seconds on an idle machine
GONE = EngineStopped.exit_code


class Cluster:
    """`mpt cluster` with one model, and its processes."""

    def __init__(self, config: Path, port: int) -> None:
        self.server: Server = start("cluster", "--config", str(config), "--port", str(port), "--cpus", "4")
        self.url, self.port = self.server.url, port
        (self.folder,) = {_folder(process) for process in self._family()} - {None}

    def _family(self) -> list[psutil.Process]:
        return psutil.Process(self.server.process.pid).children(recursive=True)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those whose command line has this in it."""
        found = []
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self, name: str, n: int | None = None) -> list[int]:
        victims = self.processes(name)[:n]
        assert victims, name
        for victim in victims:
            victim.kill()
        return [victim.pid for victim in victims]

    def ask(self, n_tokens: int = 4) -> httpx.Response:
        body = {"model": "m", "prompt": "a", "max_tokens": n_tokens, "ignore_eos": True}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=WAIT_S)

    def stream(self, begun: threading.Event, n_tokens: int = 1900) -> list[str]:
        """Its lines; the error's name at the end where the connection was cut."""
        body = {"model": "m", "prompt": "a", "max_tokens": n_tokens, "ignore_eos": True, "stream": True}
        lines = []
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=WAIT_S) as answer:
                for line in answer.iter_lines():
                    if line:
                        lines.append(line)
                        begun.set()
        except httpx.TransportError as error:
            lines.append(type(error).__name__)
        return lines

    def until_two_routers_are_asked(self) -> None:
        """HAProxy hears of a router that has just started a little later."""

        def are_asked() -> bool:
            (admin,) = Path(self.folder).glob("*/admin.sock")
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(str(admin))
                asking.sendall(b"show stat\n")
                with asking.makefile() as answer:
                    servers = [line.split(",") for line in answer if ",SERVE_REPLICA_mpt-Router-" in line]
            return sum(fields[17].startswith("UP") for fields in servers) == 2

        self.until(are_asked, "HAProxy does not know two routers")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < end, f"{what}: {''.join(self.server.lines)[-3000:]}"
            time.sleep(0.05)

    def until_all_is_gone(self) -> None:
        self.until(lambda: self.server.process.poll() is not None and not _alive(self.folder), "processes stay")
        with socket.socket() as probe:  # what a new cluster does first
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))


def _folder(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(guard.VARIABLE)
    return None


def _alive(folder: str) -> list[int]:
    return [pid for pid in guard.members(folder) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def cluster_on(config: Path, port: int) -> Iterator[Cluster]:
    cluster = Cluster(config, port)
    try:
        yield cluster
    finally:
        cluster.server.stop()


@pytest.fixture(scope="module")
def config(model, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deaths")
    root = mpt.save(model, folder / "m", tokenizer=tokenizer)
    each = {"root": str(root), "kv_gb": 0.064, "num_cpus": 0.1, "threads": 1}
    return serve_config(folder, {"m": each})


@pytest.fixture(scope="module")
def cluster(config) -> Iterator[Cluster]:
    with cluster_on(config, free_port()) as cluster:
        yield cluster


def asked_while(cluster: Cluster, happens: Callable[[], object], over: Callable[[], bool]) -> list[httpx.Response]:
    """The answers of a client that asks without a pause until it is over; a refused connection is asked again."""
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def ask_on() -> None:
        while not stop.is_set():
            with contextlib.suppress(httpx.ConnectError):
                answers.append(cluster.ask())

    with ThreadPoolExecutor(1) as pool:
        asking: Future[None] = pool.submit(ask_on)
        cluster.until(lambda: bool(answers), "no answer")
        happens()
        try:
            cluster.until(over, "it is not back")
        finally:
            stop.set()
        asking.result()
    return answers


def test_there_are_two_routers_and_no_port_for_other_machines(cluster):
    assert len(cluster.processes("ray::ServeReplica:mpt:Router")) == 2
    assert any("2 of `router_replicas`" in line for line in cluster.server.lines)
    listening = []
    for process in [psutil.Process(cluster.server.process.pid), *cluster._family()]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that started a moment ago may have ended
            found = process.net_connections("tcp")
            listening += [each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN]
    assert len(listening) > 10 and {address.rpartition(":")[2] for address in listening} == {"127.0.0.1"}


def test_other_users_reach_neither_its_sockets_nor_its_token(cluster):
    assert stat.S_IMODE(os.stat(cluster.folder).st_mode) == 0o700
    (admin,) = Path(cluster.folder).glob("*/admin.sock")
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    assert stat.S_IMODE((Path.home() / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_a_router_that_dies_takes_its_own_streams_only(cluster):
    cluster.until_two_routers_are_asked()
    begun = [threading.Event() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(cluster.stream, event) for event in begun]
        assert all(event.wait(WAIT_S) for event in begun)
        answers = asked_while(
            cluster,
            lambda: cluster.kill("ray::ServeReplica:mpt:Router", 1),
            lambda: len(cluster.processes("ray::ServeReplica:mpt:Router")) == 2,
        )
        ends = {stream.result()[-1] for stream in streams}
    assert {answer.status_code for answer in answers} == {200}
    assert ends == {"RemoteProtocolError", "data: [DONE]"}  # cut: clients see that there is no end


def test_without_any_router_requests_wait_or_are_told_to_ask_again(cluster):
    cluster.until_two_routers_are_asked()
    killed: list[int] = []
    answers = asked_while(
        cluster,
        lambda: killed.extend(cluster.kill("ray::ServeReplica:mpt:Router")),
        lambda: len(cluster.processes("ray::ServeReplica:mpt:Router")) == 2 and cluster.ask().status_code == 200,
    )
    assert len(killed) == 2 and answers[-1].status_code == 200
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code in (502, 503) and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] in ("no_router", "router_lost")


def test_another_haproxy_is_started_when_one_dies(cluster):
    (before,) = cluster.kill("bin/haproxy")
    cluster.until(lambda: bool({p.pid for p in cluster.processes("bin/haproxy")} - {before}), "no HAProxy")
    cluster.until(lambda: _status(cluster) == 200, "no answer")


def test_another_haproxy_is_started_when_its_manager_dies(cluster):
    """The HAProxy that the manager had started would keep the port from the next."""
    (before,) = [process.pid for process in cluster.processes("bin/haproxy")]
    cluster.kill("ray::HAProxyManager")
    cluster.until(lambda: bool({p.pid for p in cluster.processes("bin/haproxy")} - {before}), "no HAProxy")
    cluster.until(lambda: _status(cluster) == 200 and not psutil.pid_exists(before), "no answer")


def test_no_request_notices_that_the_controller_dies(cluster):
    (before,) = [process.pid for process in cluster.processes("ray::ServeController")]
    answers = asked_while(
        cluster,
        lambda: cluster.kill("ray::ServeController"),
        lambda: bool({p.pid for p in cluster.processes("ray::ServeController")} - {before}),
    )
    assert {answer.status_code for answer in answers} == {200}


def test_two_clusters_stand_side_by_side_and_one_without_a_raylet_ends_alone(cluster, config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # somebody's, which is not there
    with cluster_on(config, free_port()) as other:
        assert any("`serve deploy" in line and "127.0.0.1:1" in line for line in other.server.lines)
        assert cluster.ask().status_code == other.ask().status_code == 200
        other.kill("raylet/raylet")
        other.until_all_is_gone()
        assert other.server.process.returncode == GONE
    assert cluster.ask().status_code == 200


def test_without_its_gcs_a_cluster_lets_answers_end_and_leaves(cluster):
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(cluster.stream, begun)
        assert begun.wait(WAIT_S)
        cluster.kill("gcs/gcs_server")
        assert stream.result()[-1] == "data: [DONE]"
    cluster.until_all_is_gone()
    assert cluster.server.process.returncode == GONE
    assert any(line.startswith("mpt: Ray's gcs_server has died") for line in cluster.server.lines)


def test_the_same_command_starts_again_and_nothing_outlives_its_driver(cluster, config):
    cluster.until_all_is_gone()
    with cluster_on(config, cluster.port) as again:
        assert again.ask().status_code == 200
        again.server.process.send_signal(signal.SIGKILL)
        again.until_all_is_gone()


def test_sigterm_while_it_loads_ends_everything_at_once(config):
    command = [sys.executable, "-m", "mpt", "cluster", "--config", str(config), "--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "Ray's logs are in" in line)
        folder = said.split()[-1].removesuffix("/ray")
        while not any(psutil.Process(pid).name() == "gcs_server" for pid in guard.members(folder)):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(WAIT_S) == 0
    assert not Path(folder).exists()
    end = time.monotonic() + WAIT_S
    while _alive(folder):  # the guard leaves last
        assert time.monotonic() < end
        time.sleep(0.01)


def _status(cluster: Cluster) -> int | None:
    with contextlib.suppress(httpx.TransportError):
        return cluster.ask().status_code
    return None
