"""`mpt cluster reload`: what a changed config comes to, and what is refused; on Ray: test_cluster.py."""

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
from ray.serve._private.version import DeploymentVersion

from mpt.engine import room
from mpt.errors import MachineRefused, UserError
from mpt.memory import Memory
from serving.cluster import deployment, local, reload
from serving.cluster.options import ClusterOptions, ReplicaOptions, read_args
from serving.cluster.reload import Reloads, plan, without_room
from serving.cluster.timeouts import Timeouts
from tests.serving.servers import serve_config

# Another value than the default, for each option of a model.
OTHER = {
    "root": "mpt-tiny-chat", "device": "cpu", "dtype": "float32", "quantize": "int8", "kv_cache": "int8",
    "speculate": False, "draft": "mpt-tiny", "tensor_parallel": 2, "kv_gb": 1.0, "prefix_cache": Path("kept"),
    "prefix_cache_gb": 3.0, "max_running": 5, "max_waiting": 3, "prefill_chunk": 256, "context_length": 64,
    "prompt_style": "chatml", "chat_template": "chatml", "adapters": Path("a"), "named_adapters": {"x": Path("b")},
    "threads": 2, "profile": Path("p"), "routing": "prefix", "num_gpus": 1.0, "num_cpus": 1.0, "resources": {"r": 1.0},
    "min_replicas": 0, "max_replicas": 3, "initial_replicas": 1, "target_ongoing_requests": 2.0, "upscale_delay_s": 1.0,
    "downscale_delay_s": 1.0, "graceful_shutdown_timeout_s": 7.0, "startup_timeout_s": 7.0,
    "update_order": "stop_first",
}  # fmt: skip


def as_ray_compares(model: ReplicaOptions) -> DeploymentVersion:
    options = ClusterOptions(models={"m": model})
    made = deployment._deployment("m", model, options.replica_http)
    return DeploymentVersion(made._deployment_config.version, made._deployment_config, made.ray_actor_options)


@pytest.mark.parametrize(("n_gpus", "parallel", "most"), [(0, 1, 32), (0, 2, 32), (1, 1, 256), (1, 2, 256)])
def test_a_replica_takes_as_many_requests_as_its_engine_has_rows(n_gpus, parallel, most):
    """32 on a CPU and 256 on GPUs, as `--max-running` is unless given, also where several GPUs share a model."""
    model = ReplicaOptions("mpt-tiny", num_gpus=n_gpus, tensor_parallel=parallel)
    made = deployment._deployment("m", model, ClusterOptions(models={"m": model}).replica_http)
    assert made._deployment_config.max_ongoing_requests == most


@pytest.mark.parametrize("key", [each.name for each in fields(ReplicaOptions)])
def test_what_is_said_to_restart_is_what_ray_restarts(key):
    old = ReplicaOptions("mpt-tiny", prefix_cache=Path("before") if key == "prefix_cache_gb" else None)
    new = replace(old, **{key: OTHER[key]})
    change = plan(ClusterOptions(models={"m": old}), ClusterOptions(models={"m": new}))
    assert (change.restarted == ("m",)) == as_ray_compares(old).requires_actor_restart(as_ray_compares(new))
    assert len(change.lines) == 1 and f"`{key}`" in change.lines[0]


def test_what_every_replica_is_told_restarts_all_and_the_rest_of_the_front_nothing():
    a = {"models": {"a": {"root": "mpt-tiny"}, "b": {"root": "mpt-tiny", "update_order": "stop_first"}}}
    told = plan(read_args(a), read_args({**a, "request_timeout_s": 5, "api_keys": ["sk-1"]}))
    assert told.restarted == ("a", "b")
    assert [line.partition(":")[0] for line in told.lines] == [
        "`a` restarts for `request_timeout_s`",
        "`b` restarts for `request_timeout_s`",
        "the routers take `api_keys` as they run",
    ]
    assert "starts before one stops" in told.lines[0] and "stops before another starts" in told.lines[1]
    assert plan(read_args(a), read_args({**a, "cors_origins": ["https://a.example"]})).restarted == ()


def test_room_for_one_replica_more():
    options = read_args(
        {
            "models": {
                "gpu": {"root": "mpt-tiny", "num_gpus": 1},
                "patient": {"root": "mpt-tiny", "num_gpus": 1, "update_order": "stop_first"},
                "cpu": {"root": "mpt-tiny", "num_cpus": 0.5, "tensor_parallel": 2},
            }
        }
    )
    lacks = "1 GPU, 0 free"
    assert without_room(options, {"CPU": 1.0, "GPU": 0.0}) == {"gpu": lacks, "patient": lacks}
    assert without_room(options, {"CPU": 0.5, "GPU": 1.0}) == {"cpu": "1 CPU, 0.5 free"}
    assert without_room(options, {"CPU": 4.0, "GPU": 2.0}) == {}


class FakeCluster:
    """Takes every config, but for one with a model named `broken`."""

    def __init__(self) -> None:
        self.deployed: list[set[str]] = []  # the models of each deployment
        self.resources = {"CPU": 4.0}
        self._args: Mapping[str, object] = {}

    def deploy(self, args, leaving):
        self.deployed.append({*args["models"], *leaving})
        if "broken" in args["models"]:
            raise RuntimeError("Deploying application mpt failed:\nno first token in time")
        self._args = args

    def follows(self, args):
        return args == self._args

    def free(self):
        return self.resources

    def running(self):
        return {"a"}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[tuple[FakeCluster, Callable[..., list[str]], int]]:
    """A cluster that listens, and what `reload` says after its file has these models."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    path, fake = serve_config(tmp_path, {"a": {"root": "mpt-tiny"}}), FakeCluster()

    def changed_to(models: dict[str, dict[str, object]], **args: object) -> list[str]:
        serve_config(tmp_path, models, **args)
        return list(reload.ask(None, None))

    began = read_args({"models": {"a": {"root": "mpt-tiny"}}})
    for variable, value in Timeouts.of(began).environment().items():
        monkeypatch.setenv(variable, value)
    check = functools.partial(local._check_change, began, {"host": "127.0.0.1", "port": 1}, 4)
    with Reloads(path, local._read, check).listening(4321, {"models": {"a": {"root": "mpt-tiny"}}}, fake):
        yield fake, changed_to, 4321


def test_a_changed_file_is_deployed_and_a_model_that_goes_is_forgotten_first(cluster):
    fake, changed_to, _ = cluster
    tiny = {"root": "mpt-tiny"}
    assert changed_to({"a": tiny}) == ["nothing changed", "done after 0.0 s"]
    assert changed_to({"a": tiny, "b": tiny})[0] == "`b` is new"
    assert changed_to({"b": tiny})[0].startswith("`a` is removed; its running answers may take 120 s")
    assert fake.deployed == [{"a"}, {"a", "b"}, {"a", "b"}, {"b"}]


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        ({"root": "mpt-tiny", "prefil_chunk": 256}, {}, "did you mean `prefill_chunk`"),
        ({"root": "mpt-8b"}, {}, "mpt-8b"),
        ({"root": "mpt-tiny", "num_cpus": 64}, {}, "64.2 CPUs"),
        ({"root": "mpt-tiny"}, {"api_key_file": "/nowhere/keys"}, "/nowhere/keys"),
        ({"root": "mpt-tiny"}, {"otel_endpoint": "localhost"}, "`localhost` (otel_endpoint), is no URL"),
        ({"root": "mpt-tiny"}, {"log_requests": "/nowhere/log"}, "/nowhere/log"),
        ({"root": "mpt-tiny"}, {"no_auth": True, "api_keys": ["sk-1"]}, "contradict"),
    ],
)
def test_a_config_that_is_wrong_changes_nothing(cluster, model, args, words):
    fake, changed_to, _ = cluster
    with pytest.raises(UserError) as wrong:
        changed_to({"a": model}, **args)
    assert words in str(wrong.value) and "\n" not in str(wrong.value) and fake.deployed == []


def test_what_there_is_no_room_for_is_refused(cluster):
    fake, changed_to, _ = cluster
    fake.resources = {"CPU": 0.1}
    tiny, changed, idle = {"root": "mpt-tiny"}, {"root": "mpt-tiny", "prefill_chunk": 256}, {"min_replicas": 0}
    with pytest.raises(UserError, match=r"`a` would restart.*0.25 CPU, 0.1 free.*`update_order: stop_first`"):
        changed_to({"a": changed})
    with pytest.raises(UserError, match=r"`b` is new, and there is no room.*0.25 CPU, 0.1 free"):
        changed_to({"a": tiny, "b": tiny})
    assert fake.deployed == []
    assert "stops before" in changed_to({"a": {**changed, "update_order": "stop_first"}})[0]
    changed_to({"a": changed, "b": {**tiny, **idle}})  # nobody asks it, so it has no replica
    changed_to({"a": changed, "b": {**changed, **idle}})


def test_a_limit_of_the_key_file_that_two_routers_cannot_share_is_refused(cluster, tmp_path):
    fake, changed_to, _ = cluster
    keys = tmp_path / "keys"
    keys.write_text("alice: sk-1 requests_per_minute=1\n")
    with pytest.raises(UserError, match="each of 2 routers"):
        changed_to({"a": {"root": "mpt-tiny"}}, api_key_file=str(keys))
    assert fake.deployed == []


def test_only_what_starts_must_find_memory(cluster, monkeypatch):
    """A model and its KV cache are there already when nothing of it starts."""
    fake, changed_to, _ = cluster
    monkeypatch.setattr(room, "memory", lambda: Memory(10**6, 10**9))
    tiny = {"root": "mpt-tiny"}
    assert changed_to({"a": tiny}, api_keys=["sk-1"])[0] == "the routers take `api_keys` as they run"
    with pytest.raises(MachineRefused, match=r"0.00 GB that are free"):
        changed_to({"a": tiny, "b": tiny})
    with pytest.raises(MachineRefused, match=r"0.00 GB that are free"):
        changed_to({"a": {**tiny, "prefill_chunk": 256}}, api_keys=["sk-1"])
    assert fake.deployed == [{"a"}]


def test_what_the_routers_do_not_take_is_taken_back(cluster, monkeypatch):
    fake, changed_to, _ = cluster
    monkeypatch.setattr(reload, "_FOLLOW_S", 0.1)
    monkeypatch.setattr(fake, "follows", lambda args: False)
    with pytest.raises(MachineRefused, match=r"the routers do not take.*from before runs on"):
        changed_to({"a": {"root": "mpt-tiny"}, "b": {"root": "mpt-tiny"}})
    assert fake.deployed == [{"a", "b"}, {"a"}]


def test_longer_time_outs_than_ray_was_started_with_are_refused(cluster, monkeypatch):
    _, changed_to, _ = cluster
    slow = {"a": {"root": "mpt-tiny", "graceful_shutdown_timeout_s": 3600}}
    with pytest.raises(UserError, match=r"and this cluster was started with \d+"):
        changed_to(slow)
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "1")  # the user's own
    changed_to({"a": {"root": "mpt-tiny"}}, requests_per_minute=100)
    for variable in Timeouts.of(read_args({"models": slow})).environment():
        monkeypatch.setenv(variable, "9999")
    changed_to(slow)


def test_what_does_not_start_leaves_what_ran(cluster):
    fake, changed_to, _ = cluster
    with pytest.raises(MachineRefused, match="no first token in time; the config from before runs on"):
        changed_to({"broken": {"root": "mpt-tiny"}})
    assert fake.deployed == [{"a", "broken"}, {"a"}]
    assert changed_to({"a": {"root": "mpt-tiny"}})[0] == "nothing changed"


def test_what_needs_a_new_cluster_is_refused(cluster, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(path.read_text() + "http_options: {port: 9999}\n")
    with pytest.raises(UserError, match="`http_options`"):
        list(reload.ask(None, 4321))


def test_the_command_tells_in_lines_and_exit_codes(cluster, tmp_path):
    _, _, port = cluster
    other = serve_config(tmp_path / "run", {"a": {"root": "mpt-tiny"}, "b": {"root": "mpt-tiny"}})

    def run(*options: str) -> tuple[int, list[str], list[str]]:
        command = [sys.executable, "-m", "mpt", "cluster", "reload", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    code, said, wrong = run("--port", str(port), "--config", str(other))
    assert (code, said[0], wrong) == (0, "`b` is new", [])
    code, said, wrong = run("--port", "1")
    assert (code, said) == (2, []) and wrong == [
        "mpt: no `mpt cluster` of yours runs on port 1; start it, or give its --port"
    ]
    code, _, wrong = run("--cpus", "3")
    assert code == 2 and "--cpus" in wrong[-1]


def test_others_cannot_reach_the_socket(cluster, tmp_path):
    folder = tmp_path / "run" / "mpt"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(MachineRefused, match="not this user's alone"):
        list(reload.ask(None, 4321))


def test_a_socket_that_a_killed_cluster_left_is_no_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "mpt").mkdir(mode=0o700)
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "mpt" / "cluster-1234.sock"))
    left.close()
    assert os.path.exists(tmp_path / "mpt" / "cluster-1234.sock")
    with pytest.raises(UserError, match="no `mpt cluster` of yours runs"):
        list(reload.ask(None, None))
