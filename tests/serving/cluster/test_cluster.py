"""What a cluster adds: options checked before Ray starts, replicas that die, upgrades, scaling from zero, affinity."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from aiohttp import web

import mpt
from mpt.errors import DeviceLost, MachineRefused, UserError
from mpt.memory import Memory
from mpt.options import ModelOptions
from serving.auth import Keys
from serving.cluster import guard, local
from serving.cluster.options import TINY, ClusterOptions, ReplicaOptions, read_args
from serving.cluster.relay import Lease, ReplicaLost
from serving.cluster.router import make_router, merged
from serving.cluster.timeouts import Timeouts
from serving.listening import url_at
from serving.ports import free_port
from tests.serving.cluster.ray_driver import environment
from tests.serving.servers import serve_config

# -- options -------------------------------------------------------------------------------------------------------


def test_without_models_it_is_the_tiny_family():
    assert read_args({}).models == TINY
    assert read_args({"models": {"a": {"root": "mpt-7b"}}}).models == {"a": ReplicaOptions("mpt-7b")}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model": {}}, "did you mean `models`"),
        ({"models": {}}, "at least one"),
        ({"models": {"a b": {"root": "x"}}}, "a b"),
        ({"models": {"Router": {"root": "x"}}}, "a part of itself"),
        ({"models": {"a": "mpt-7b"}}, "root: mpt-7b"),
        ({"models": {"a": {}}}, "models.a.root"),
        ({"models": {"a": {"root": "x", "min_replica": 1}}}, "did you mean `min_replicas`"),
        ({"models": {"a": {"root": "x", "prefix_cache_gb": 3}}}, "or `prefix_cache: FOLDER` in a cluster's config"),
        ({"models": {"a": {"root": "x", "max_running": "8"}}}, "models.a.max_running"),
        ({"models": {"a": {"root": "x", "max_running": True}}}, "a whole number"),
        ({"models": {"a": {"root": "x", "max_running": 0}}}, "max_running is 0"),
        ({"models": {"a": {"root": "x", "dtype": "int8"}}}, "`bfloat16`"),
        ({"models": {"a": {"root": "x", "min_replicas": 3, "max_replicas": 2}}}, "at most the next"),
        ({"models": {"a": {"root": "x", "initial_replicas": 4}}}, "at most the next"),
        ({"models": {"a": {"root": "x", "num_gpus": 2}}}, "tensor_parallel"),
        ({"router_replicas": 0}, "router_replicas is 0"),
        ({"router_replicas": 3, "requests_per_minute": 2}, "requests_per_minute is 2"),
        ({"log_format": "xml"}, "`json`"),
        ({"api_keys": "sk-1"}, "a list of texts"),
    ],
)
def test_wrong_args_are_told_by_name(args, words):
    with pytest.raises(UserError) as wrong:
        read_args(args)
    assert words in str(wrong.value)


def test_limits_are_shared_by_the_routers():
    options = ClusterOptions(models=TINY, router_replicas=3, requests_per_minute=100)
    assert options.share(options.requests_per_minute) == 33 and options.share(None) is None


@pytest.mark.parametrize(
    ("cpus", "gigabytes", "given", "n"), [(4, 8, None, 2), (4, 3, None, 1), (1, 8, None, 1), (1, 3, 2, 2), (4, 8, 1, 1)]
)
def test_a_second_router_runs_where_it_fits_and_what_is_given_stays(monkeypatch, caplog, cpus, gigabytes, given, n):
    """Four models of a quarter CPU and two routers of a tenth are 1.2 CPUs."""
    monkeypatch.setattr(local, "memory", lambda: Memory(gigabytes * 10**9, 16 * 10**9))
    application = {"args": {"router_replicas": given}} if given else {}
    with caplog.at_level(logging.INFO, "serving.cluster.local"):
        local._settle_routers(application, cpus)
    assert application["args"]["router_replicas"] == n == read_args(application["args"]).router_replicas
    assert len(caplog.records) == (given is None)


def refusal(*options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mpt", "cluster", *options], capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        ({"root": "mpt-8b"}, {}, "mpt-8b"),
        ({"root": "mpt-tiny", "num_gpu": 1}, {}, "num_gpus"),
        ({"root": "mpt-tiny", "num_gpus": 1, "tensor_parallel": 64}, {}, "64 GPUs"),
        ({"root": "mpt-tiny", "num_cpus": 4096}, {}, "4096.1 CPUs"),
        ({"root": "mpt-tiny", "adapters": "/nowhere"}, {}, "/nowhere"),
        ({"root": "mpt-tiny"}, {"api_key_file": "/nowhere/keys"}, "/nowhere/keys"),
        ({"root": "mpt-tiny"}, {"replica_host": "node"}, "no_auth"),
    ],
)
def test_what_cannot_start_is_one_line_and_exit_code_2(tmp_path, model, args, words):
    code, line = refusal("--config", str(serve_config(tmp_path, {"m": model}, **args)))
    assert code == 2 and line.startswith("mpt: ") and words in line


def test_a_port_that_is_taken_and_a_config_that_is_none(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, line = refusal("--port", port)
    assert code == 2 and line.startswith("mpt: ") and port in line
    (tmp_path / "c.yaml").write_text("applications: 3")
    assert refusal("--config", str(tmp_path / "c.yaml"))[0] == 2
    assert refusal("--config", str(tmp_path / "none.yaml"))[0] == 2


# -- the router, over a fleet without Ray --------------------------------------------------------------------------

CHUNK = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'


class Replica:
    """An HTTP server that answers as told."""

    def __init__(self, answer: Callable[[web.Request], object]) -> None:
        self._answer, self.n_asked = answer, 0

    async def start(self) -> str:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.n_asked += 1
            self.headers, self.body = dict(request.headers), await request.read()
            return await self._answer(request)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()


async def whole(request: web.Request) -> web.StreamResponse:
    return web.json_response({"choices": [], "usage": {}}, headers={"x-secret": "internal"})


async def stream(request: web.Request, end: bytes = b"data: [DONE]\n\n", n: int = 3) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    for _ in range(n):
        await answer.write(CHUNK)
        await asyncio.sleep(0.01)
    if not end:
        request.transport.abort()
        return answer
    await answer.write(end)
    return answer


async def broken(request: web.Request) -> web.StreamResponse:
    request.transport.abort()
    return web.Response()


async def cut(request: web.Request) -> web.StreamResponse:
    return await stream(request, end=b"")


def test_a_replicas_model_is_told_what_it_is_told_elsewhere(tmp_path):
    given = {"root": "x", "max_running": 5, "kv_gb": 1.0, "adapters": str(tmp_path), "named_adapters": {"a": "folder"}}
    given |= {"prefix_cache": "kept", "prefix_cache_gb": 3}
    options = read_args({"models": {"m": {**given, "max_waiting": 3, "routing": "prefix", "num_cpus": 2}}}).models["m"]
    assert options.max_waiting == 3  # at each router; the engine's own queue is as long as anywhere
    expected = ModelOptions("x", max_running=5, kv_gb=1.0, adapters=tmp_path, named_adapters={"a": Path("folder")})
    expected = replace(expected, prefix_cache=Path("kept"), prefix_cache_gb=3.0)
    assert options.model == expected and type(options.model) is ModelOptions


def test_a_model_of_a_triton_server_is_refused_by_name():
    with pytest.raises(UserError, match=r"`models.m`: `root` is triton://h:1/m.*take `mpt serve`"):
        read_args({"models": {"m": {"root": "triton://h:1/m?checkpoint=x"}}})


class FakeFleet:
    """Leases on the given replicas, one after the other."""

    def __init__(self, replicas: list[str], wait_s: float = 0.0) -> None:
        self.replicas, self.wait_s, self.n_leases, self.n_ended = replicas, wait_s, 0, 0
        self.lost: asyncio.Future | None = None

    def cards(self):
        return {"m": [{"id": "m"}, {"id": "m:x"}]}

    @contextlib.asynccontextmanager
    async def lease(self, model, adapter, prefix):
        await asyncio.sleep(self.wait_s)
        url = self.replicas[self.n_leases % len(self.replicas)]
        self.n_leases += 1
        self.lost = asyncio.get_running_loop().create_future()

        try:
            yield Lease(url, {"authorization": "Bearer t"}, f"r{self.n_leases}", self.lost, self.report)
        finally:
            self.n_ended += 1

    async def report(self):
        return {"prompt_tokens": 3, "completion_tokens": 4, "finish_reason": "stop", "charged_tokens": 7}

    async def runs(self):
        return {"m": {"backend": "torch"}}

    async def expositions(self):
        return {}

    async def not_ready(self):
        return None


async def ask(fleet: FakeFleet, stream: bool, options: ClusterOptions | None = None, **body) -> httpx.Response:
    app = make_router(fleet, options or ClusterOptions(models=TINY), Keys(["sk-1"], None))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"model": "m", "prompt": "abc", "stream": stream, **body}
        return await client.post("/v1/completions", json=body, headers={"authorization": "Bearer sk-1"})


async def test_an_answer_comes_through_as_it_is():
    for kind, made in ((False, whole), (True, stream)):
        replica = Replica(made)
        fleet = FakeFleet([await replica.start()])
        answer = await ask(fleet, kind)
        assert answer.status_code == 200 and fleet.n_ended == 1
        assert replica.headers["Authorization"] == "Bearer t" and json.loads(replica.body)["prompt"] == "abc"
        assert replica.headers["x-mpt-salt"] not in ("", "sk-1")
        assert "x-secret" not in answer.headers
        assert (await ask(fleet, kind, model=None)).status_code == 200  # the one that is served
        if kind:
            assert answer.content == 3 * CHUNK + b"data: [DONE]\n\n"
            assert answer.headers["x-accel-buffering"] == "no"
        await replica.stop()


@pytest.mark.parametrize("kind", [False, True])
async def test_a_replica_lost_before_the_first_byte_is_replaced(kind):
    dead, alive = Replica(broken), Replica(stream if kind else whole)
    fleet = FakeFleet([await dead.start(), await alive.start()])
    answer = await ask(fleet, kind)
    assert answer.status_code == 200 and (dead.n_asked, alive.n_asked) == (1, 1) and fleet.n_ended == 2
    await dead.stop(), await alive.stop()


async def test_when_every_replica_is_lost_it_is_503():
    dead = Replica(broken)
    fleet = FakeFleet([await dead.start()])
    answer = await ask(fleet, True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert fleet.n_leases == 3 and "retry-after" in answer.headers
    await dead.stop()


async def test_a_replica_lost_in_mid_stream_ends_it_with_an_error_event():
    replica = Replica(cut)
    fleet = FakeFleet([await replica.start()])
    answer = await ask(fleet, True)
    events = [line for line in answer.text.split("\n\n") if line]
    assert len(events) == 4 and '"code":"replica_lost"' in events[-1] and "[DONE]" not in answer.text
    assert replica.n_asked == 1  # nothing is generated twice once a client has seen a part
    await replica.stop()


async def test_a_replica_that_ray_gives_up_ends_its_streams_though_its_socket_is_silent():
    async def silent(request):
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(CHUNK)
        await asyncio.sleep(60)
        return answer

    replica = Replica(silent)
    fleet = FakeFleet([await replica.start()])
    asked = asyncio.create_task(ask(fleet, True))
    while fleet.lost is None or not replica.n_asked:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    fleet.lost.set_exception(ReplicaLost("ActorDiedError"))
    answer = await asyncio.wait_for(asked, 5)
    assert '"code":"replica_lost"' in answer.text
    await replica.stop()


@pytest.mark.parametrize("kind", [False, True])
async def test_silence_is_the_end_of_a_stream_but_not_of_a_whole_answer(monkeypatch, kind):
    """A whole answer says nothing until it is there, however long that takes; a stream has comments."""
    monkeypatch.setattr("serving.cluster.relay._SILENCE_S", 0.1)

    async def slow(request):
        await asyncio.sleep(0.6)
        return await (stream if kind else whole)(request)

    replica = Replica(slow)
    options = ClusterOptions(models=TINY, keep_alive_s=0.1)
    answer = await ask(FakeFleet([await replica.start()]), kind, options)
    assert replica.n_asked == (3 if kind else 1)
    assert ("replica_lost" in answer.text) == kind
    await replica.stop()


async def test_a_stream_that_waits_for_a_replica_is_kept_alive():
    replica = Replica(stream)
    options = ClusterOptions(models=TINY, keep_alive_s=0.1)
    answer = await ask(FakeFleet([await replica.start()], wait_s=0.5), True, options)
    assert answer.text.startswith(": keep-alive\n\n") and answer.text.endswith("data: [DONE]\n\n")
    await replica.stop()


@pytest.mark.parametrize("kind", [False, True])
async def test_no_request_waits_for_ever(kind):
    options = ClusterOptions(models=TINY, keep_alive_s=0.1, request_timeout_s=0.4)
    answer = await asyncio.wait_for(ask(FakeFleet(["http://127.0.0.1:9"], wait_s=60), kind, options), 5)
    assert "queue_timeout" in answer.text and ("[DONE]" not in answer.text)
    assert answer.status_code == (200 if kind else 503)


async def test_only_this_machine_reaches_a_router_that_is_for_this_machine():
    """Ray binds the port of its replicas to every address, whatever the config's host is."""
    app = make_router(FakeFleet([]), ClusterOptions(models=TINY), Keys((), None))
    for peer, status in (("127.0.0.1", 200), ("::1", 200), ("192.0.2.7", 403)):
        transport = httpx.ASGITransport(app, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/health")).status_code == status


def test_metrics_of_several_processes_are_told_apart():
    text = '# HELP mpt_x_total X.\n# TYPE mpt_x_total counter\nmpt_x_total{model_name="m"} 2.0\n'
    both = merged({"a": text, "b": text.replace("2.0", "3.0")}).decode()
    assert both.count("# TYPE mpt_x_total counter") == 1
    assert 'mpt_x_total{model_name="m",replica="a"} 2.0' in both
    assert 'mpt_x_total{model_name="m",replica="b"} 3.0' in both


def test_a_replica_whose_engine_has_stopped_gives_no_lease_and_leaves(monkeypatch):
    """In the actor's process; without Ray here."""
    from serving.cluster import deployment

    monkeypatch.setattr(deployment, "_LAST_EVENTS_S", 0.0)
    engine = SimpleNamespace(failed=None)
    endpoint, codes = SimpleNamespace(engine=engine), []
    watch = threading.Thread(target=deployment._leave_when_it_stops, args=(endpoint, codes.append))
    watch.start()
    replica = SimpleNamespace(_endpoint=endpoint, _name="base")
    check = deployment.Model.check_health
    check(replica)
    assert watch.is_alive() and not codes
    engine.failed = DeviceLost("the device is lost: CUDA error: unspecified launch failure")
    watch.join(5)
    assert codes == [6]
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        check(replica)


def test_ray_that_does_not_start_in_time_is_one_line(monkeypatch, tmp_path):
    """The words are those of ray/_private/node.py, version 2.60."""
    import ray

    def late(*args: object, **options: object) -> None:
        raise Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed to "
            "startup or the GCS has become overloaded."
        )

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(MachineRefused, match=local.NOT_IN_TIME):
        local._start_ray(1, tmp_path)


def test_what_had_no_environment_for_a_moment_is_ended_too(monkeypatch):
    looks, killed = iter([[], [4242], [], []]), []
    monkeypatch.setattr(guard, "members", lambda folder: next(looks))
    monkeypatch.setattr(guard.os, "kill", lambda pid, number: killed.append(pid))
    assert guard.end("/nowhere") == [] and killed == [4242]


def test_addresses_as_people_open_them():
    assert url_at("::1", 80) == "http://[::1]:80"
    assert url_at("0.0.0.0", 80) == "http://0.0.0.0:80" and url_at("0.0.0.0", 80, shown=True) == "http://127.0.0.1:80"
    assert url_at("192.0.2.7", 80, shown=True) == "http://192.0.2.7:80"


@pytest.mark.parametrize(("key", "value"), [("port", "8000"), ("host", None)])
def test_where_to_listen_has_types(key, value, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=f"`{key}`"):
        local._read(tmp_path / "c.yaml")


# -- on Ray --------------------------------------------------------------------------------------------------------


KEY = "sk-1"
WITH_KEY = {"authorization": f"Bearer {KEY}"}


class Cluster:
    """A Ray of this test's own; `deploy` runs our application on it, anew if there is one."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._log = (folder / "driver.log").open("w")
        self._node: subprocess.Popen | None = None
        for _ in range(2):  # Ray waits 30 s for its own processes, and a machine that tests is busy
            self._folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # its sockets need short names
            self._process = self._start_driver(port)
            if address := self._process.stdout.readline().strip():
                break
            self.stop()
        self._address = address

    def _start_driver(self, port: int) -> subprocess.Popen:
        driver = Path(__file__).with_name("ray_driver.py")
        return subprocess.Popen(
            [sys.executable, str(driver), str(port), self._folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(driver.parents[3]), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def join(self, drain: Mapping[str, str]) -> tuple[subprocess.Popen, str]:
        """Another node, with the resource `second`, as `ray start --block` makes it, and the URL of its HAProxy."""
        port = free_port()
        ray = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--address",
            self._address,
            "--node-ip-address=127.0.0.1",
        ]
        shared = environment(Path(self._folder))
        files = {name for name in shared if name.startswith("RAY_SERVE_HAPROXY_") and self._folder in shared[name]}
        own = {name: shared[name].replace(self._folder, f"{self._folder}/second") for name in files}
        own |= {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port), "HF_HUB_OFFLINE": "1"}
        Path(self._folder, "second").mkdir()
        self._node = subprocess.Popen(
            [*ray, "--temp-dir", f"{self._folder}/ray", "--num-cpus", "1", "--resources", '{"second": 1}'],
            stdout=self._log, stderr=self._log, start_new_session=True,
            env={**os.environ, **shared, **own, **drain},
        )  # fmt: skip
        return self._node, f"http://127.0.0.1:{port}"

    def deploy(self, args: dict[str, object]) -> None:
        self._process.stdin.write(json.dumps(args) + "\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()) != "deployed\n":
            assert line, Path(self._log.name).read_text()[-3000:]

    def replicas(self, model: str) -> list[psutil.Process]:
        nodes = [each.pid for each in (self._process, self._node) if each is not None]
        family = [process for pid in nodes for process in psutil.Process(pid).children(recursive=True)]
        return [process for process in family if _command(process).startswith(f"ray::ServeReplica:mpt:{model}")]

    def stop(self) -> None:
        if self._node is not None:
            os.killpg(self._node.pid, signal.SIGKILL)
            self._node.wait()
        with contextlib.suppress(BrokenPipeError):  # it has failed
            self._process.stdin.close()
        try:
            self._process.wait(100)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def post(self, timeout: float = 60, **body) -> httpx.Response:
        body = {"prompt": "a", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout, headers=WITH_KEY)

    def get(self, path: str) -> dict[str, object]:
        return httpx.get(self.url + path, headers=WITH_KEY).json()


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):  # also one that has ended since, or that nobody has waited for yet
        return " ".join(process.cmdline()).strip()
    return ""


@pytest.fixture(scope="module")
def args(model, tokenizer, tmp_path_factory) -> dict[str, object]:
    folder = mpt.save(model, tmp_path_factory.mktemp("cluster") / "m", tokenizer=tokenizer)
    each = {"root": str(folder), "kv_gb": 0.064, "num_cpus": 0.1, "threads": 1, "max_running": 8}
    each["graceful_shutdown_timeout_s"] = 60  # requests wait long while new replicas import torch on a busy machine
    return {
        "replica_host": "node",  # a second node joins
        "no_auth": True,
        "router_replicas": 1,  # two are in test_deaths.py
        "models": {
            "one": each,
            "two": {**each, "min_replicas": 2, "max_replicas": 2, "routing": "prefix"},
            "zero": {**each, "min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0.5, "downscale_delay_s": 600},
        },
    }


@pytest.fixture(scope="module")
def cluster(args, tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("ray"))
    cluster.deploy(args)
    yield cluster
    cluster.stop()


def events(
    cluster: Cluster, model: str, n_tokens: int, begun: threading.Event | None = None, url: str | None = None
) -> list[str]:
    body = {"model": model, "prompt": "a", "max_tokens": n_tokens, "stream": True, "ignore_eos": True}
    found = []
    asked = f"{url or cluster.url}/v1/completions"
    with httpx.stream("POST", asked, json=body, timeout=100, headers=WITH_KEY) as answer:
        for line in answer.iter_lines():
            if line:
                found.append(line)
                if begun is not None:
                    begun.set()
    return found


def test_a_model_without_replicas_gets_one_when_asked(cluster):
    assert cluster.replicas("zero") == []
    assert httpx.get(f"{cluster.url}/v1/models/zero").json()["context_length"] == 2048
    assert cluster.post(model="zero").json()["usage"]["completion_tokens"] == 8
    assert len(cluster.replicas("zero")) == 1


def test_prompts_that_begin_alike_meet_their_cache(cluster):
    """With two replicas, least loaded would find it half the time; twelve in a row one time in 4,096."""
    for book in range(4):
        prompt = f"book {book}: " + "once upon a time " * 60
        cached = [
            cluster.post(model="two", prompt=prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for _ in range(4)
        ]
        assert cached[0] < 100 and min(cached[1:]) > 1000


def test_a_killed_replica_loses_its_own_streams_only_and_comes_back(cluster):
    text = cluster.post(model="one").json()["choices"][0]["text"]
    begun = [threading.Event() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        lost = [pool.submit(events, cluster, "one", 1900, event) for event in begun[:2]]
        kept = pool.submit(events, cluster, "two", 1900, begun[2])
        assert all(event.wait(100) for event in begun)
        (victim,) = cluster.replicas("one")
        os.kill(victim.pid, signal.SIGKILL)
        for stream_ in lost:
            lines = stream_.result(100)
            assert '"code":"replica_lost"' in lines[-1] and "data: [DONE]" not in lines
        assert kept.result(100)[-1] == "data: [DONE]"
    until = time.monotonic() + 100
    while (answer := cluster.post(model="one")).status_code == 503 and time.monotonic() < until:
        assert answer.json()["error"]["code"] in ("replica_lost", "overloaded", "queue_timeout")
        time.sleep(0.5)
    assert answer.json()["choices"][0]["text"] == text
    assert cluster.replicas("one")[0].pid != victim.pid


class Asking:
    """Eight clients: half of them stream, half of them wait for whole answers.

    Each pauses for a moment, so that they leave a machine of two cores time to start what the test is about.
    """

    def __init__(self, cluster: Cluster, models: tuple[str, ...]) -> None:
        self.failures: list[str] = []
        self.waits: list[float] = []  # of the requests that were answered, in seconds
        self._cluster, self._models, self._stop = cluster, models, threading.Event()

    def __enter__(self) -> "Asking":
        self._pool = ThreadPoolExecutor(8)
        self._asking = [self._pool.submit(self._ask_on, k) for k in range(8)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._asking:
            each.result()
        self._pool.shutdown()

    def _ask_on(self, k: int) -> None:
        model = self._models[k // 2 % len(self._models)]
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                end = self._ask(model, streams=k % 2 == 1)
            except httpx.HTTPError as error:
                end = repr(error)
            if end is not None:
                self.failures.append(end)
            self.waits.append(time.monotonic() - begun)
            self._stop.wait(0.1)

    def _ask(self, model: str, streams: bool) -> str | None:
        """What went wrong."""
        if streams:
            last = events(self._cluster, model, 60)[-1]
            return None if last == "data: [DONE]" else last
        answer = self._cluster.post(model=model, max_tokens=60)
        return None if answer.status_code == 200 else answer.text


def pids(cluster: Cluster, *models: str) -> set[int]:
    return {process.pid for model in models for process in cluster.replicas(model)}


def test_models_that_come_and_go_keys_and_limits_restart_nothing(cluster, args, tmp_path):
    (tmp_path / "keys").write_text(f"asking: {KEY}\nfew: sk-2 requests_per_minute=2\n")
    before = pids(cluster, "one", "two", "Router", "Settings")
    with Asking(cluster, ("one", "two")) as asking:
        cluster.deploy({**args, "models": {**args["models"], "new": args["models"]["one"]}})
        until(lambda: cluster.post(model="new").status_code == 200)
        cluster.deploy({**args, "no_auth": False, "api_key_file": str(tmp_path / "keys")})
        until(lambda: cluster.post(model="new").status_code == 404)
    assert asking.failures == []
    assert httpx.get(f"{cluster.url}/v1/models").status_code == 401
    few = [httpx.get(f"{cluster.url}/v1/models", headers={"authorization": "Bearer sk-2"}) for _ in range(3)]
    assert [answer.status_code for answer in few] == [200, 200, 429]
    assert before == pids(cluster, "one", "two", "Router", "Settings") and len(before) == 5


@pytest.mark.timeout(600)  # Ray starts another node beside clients and other tests
def test_a_changed_model_restarts_itself_only_and_a_node_that_must_go_ends_its_streams(cluster, args):
    """The new replica fits on a node only that joins later, so the old one answers meanwhile.

    Then that node gets SIGTERM, as `ray start --block` does in a pod that is deleted. Ray's own time-out, 30 s, is half
    a second here. The node's HAProxy passes one of the streams on.
    """
    one, others = pids(cluster, "one"), pids(cluster, "two", "Router", "Settings")
    moved = {**args["models"]["one"], "resources": {"second": 0.1}, "context_length": 16_000}
    changed = {**args, "models": {**args["models"], "one": moved}}
    rays_s = 0.5
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(rays_s), **Timeouts.of(read_args(changed)).environment()}
    with ThreadPoolExecutor(3) as pool:
        with Asking(cluster, ("one", "two")) as asking:
            deployed = pool.submit(cluster.deploy, changed)
            until(lambda: cluster.get("/v1/models/one").get("context_length") == 16_000)
            assert [cluster.post(model="one", timeout=100).status_code for _ in range(3)] == [200] * 3
            assert one == pids(cluster, "one")
            node, its_url = cluster.join(drain)
            deployed.result(300)
        assert asking.failures == [] and one.isdisjoint(pids(cluster, "one"))
        assert others == pids(cluster, "two", "Router", "Settings") and len(others) == 4
        until(lambda: answers(f"{its_url}/health"))
        begun = [threading.Event(), threading.Event()]
        streams = [
            pool.submit(events, cluster, "one", 8_000, each, url)
            for each, url in zip(begun, (cluster.url, its_url), strict=True)
        ]
        assert all(each.wait(100) for each in begun)
        node.send_signal(signal.SIGTERM)
        time.sleep(2 * rays_s)
        assert not any(stream_.done() for stream_ in streams)
        assert cluster.post(model="one").status_code == 200
        assert [stream_.result(100)[-1] for stream_ in streams] == ["data: [DONE]"] * 2


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def until(holds: Callable[[], bool], within_s: float = 200.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
