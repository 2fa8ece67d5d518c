"""`mpt cluster`: a local Ray and the application of a Serve config on it, from checking to a clean exit.

Everything a user can have got wrong is told before Ray starts, which takes seconds and hides errors in its logs.
"""

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from mpt.catalog import resolve
from mpt.errors import MachineRefused, UserError
from serving.auth import keys_of
from serving.cluster import haproxy
from serving.cluster.options import NO_KEYS, ClusterOptions, read_args
from serving.cluster.reload import Reloads, tell_room
from serving.cluster.timeouts import Timeouts
from serving.logs import set_up_logging
from serving.options import is_loopback

log = logging.getLogger(__name__)

_IMPORT_PATH = "serving.cluster.deployment:app"
# Read by Ray's processes when they start. HAProxy in front of the routers instead of Ray's Python proxy: 1 ms a request
# instead of 11. Throughput optimized: gRPC between replicas instead of actor calls, no threads of its own around our
# event loops, Ray Serve's own lines in its log files (docs/benchmarks.md).
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_worker_niceness": "0",  # 15 otherwise: behind everything else on this machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray listens on every address; nobody without its token is answered
}


def run(config: Path, port: int | None, cpus: int | None, drain_s: float) -> None:
    """Serve until told to stop; running answers may then take drain_s more. Raises UserError before Ray starts."""
    set_up_logging()
    started = time.perf_counter()
    application, http, logging_config = _read(config)
    options = read_args(application.get("args") or {})
    if port is not None:
        http["port"] = port
    n_cpus = cpus or os.cpu_count() or 1
    _check(options, http, n_cpus)
    _check_port(http)
    # HAProxy's own pages are on fixed ports of Ray's otherwise, so that a machine could hold one cluster only.
    ports = {name: str(_free_port()) for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")}
    ports["RAY_SERVE_HAPROXY_BINARY_PATH"] = haproxy.command()
    for variable, value in {**ENVIRONMENT, **Timeouts.of(options).environment(), **ports}.items():
        os.environ.setdefault(variable, value)

    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from serving.cluster.running import Running

    stop = threading.Event()
    ray.init(num_cpus=n_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level=logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    running = Running(application, logging_config)
    try:
        try:
            serve.start(http_options=HTTPOptions(**http), logging_config=LoggingConfig(**logging_config))
            running.deploy(application.get("args") or {}, {})
        except (RayError, RuntimeError) as error:
            log.debug("Ray Serve did not start", exc_info=error)
            last = str(error).strip().splitlines()[-1]
            raise MachineRefused(f"the models did not start: {last}; see /tmp/ray/session_latest/logs/serve") from None
        reloads = Reloads(config, _read, lambda changed: _check(changed, http, n_cpus), running)
        with reloads.listening(http["port"]):
            log.info("ready after %.1f s on http://%s:%d", time.perf_counter() - started, http["host"], http["port"])
            tell_room(options, running.free())
            stop.wait()
        log.info("shutting down; running requests may take %.0f s more", drain_s)
        running.drain(drain_s)
        serve.shutdown()
    finally:
        ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read(config: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Our application of a Serve config, its HTTP options and its logging."""
    try:
        raw = yaml.safe_load(config.read_text(encoding="utf-8"))
        applications = raw["applications"]
        ours = [each for each in applications if each["import_path"] == _IMPORT_PATH]
    except OSError as error:
        raise UserError(f"`{config}` cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"`{config}` is no Ray Serve config; serving/config.yaml is one") from error
    if len(ours) != 1:
        raise UserError(f"`{config}` has {len(ours)} applications with import_path {_IMPORT_PATH}; give it one")
    http = {"host": "127.0.0.1", "port": 8000, **(raw.get("http_options") or {})}
    return ours[0], http, raw.get("logging_config") or {}


def _check(options: ClusterOptions, http: dict[str, Any], n_cpus: int) -> None:
    """Everything that would fail later and less clearly. Raises UserError."""
    if options.replica_host == "node" and not (options.api_keys or options.api_key_file or options.no_auth):
        raise UserError(NO_KEYS)
    keys = keys_of(options)
    if not is_loopback(http["host"]) and not (keys.required or options.no_auth):
        raise UserError(
            f"`{http['host']}` can be reached from other machines and there are no keys; give `api_key_file` in "
            "`args`, or `no_auth: true` to serve everybody who reaches it"
        )
    for model in options.models.values():
        resolve(model.root)
        if model.adapters is not None and not Path(model.adapters).is_dir():
            raise UserError(f"`{model.adapters}` is no folder of adapters; each adapter is a folder inside it")
    wanted_gpus = sum(model.n_gpus for model in options.models.values())
    if wanted_gpus:
        import torch

        if wanted_gpus > torch.cuda.device_count():
            raise UserError(
                f"the models ask for {wanted_gpus:g} GPUs and this machine has {torch.cuda.device_count()}; lower "
                "num_gpus, tensor_parallel or min_replicas, or serve fewer models"
            )
    wanted_cpus = sum(model.n_cpus for model in options.models.values())
    wanted_cpus += options.router_replicas * options.router_num_cpus
    if wanted_cpus > n_cpus:
        raise UserError(
            f"the models and routers ask for {wanted_cpus:g} CPUs and Ray may hand out {n_cpus}; lower num_cpus or "
            "min_replicas, or give --cpus"
        )


def _check_port(http: dict[str, Any]) -> None:
    """Raises UserError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http["host"], http["port"]))
        except OSError as error:
            raise UserError(
                f"cannot listen on {http['host']}:{http['port']}: {error.strerror}; choose another --port"
            ) from error
