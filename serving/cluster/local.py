"""`mpt cluster`: a local Ray and the application of a Serve config on it, from checking to a clean exit.

Everything a user can have got wrong is told before Ray starts, which takes seconds and hides errors in its logs. The
Ray is one of its own, whatever else runs here (`home.py`), and all of it ends with this process (`guard.py`).
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from mpt import processors
from mpt.architecture import read_architecture
from mpt.catalog import resolve
from mpt.errors import EngineStopped, MachineRefused, UserError
from mpt.memory import memory
from serving.auth import book_of
from serving.cluster import guard, home
from serving.cluster.haproxy_config import max_connections
from serving.cluster.options import NO_KEYS, ClusterOptions, read_args, router_keys
from serving.cluster.reload import Reloads, tell_room
from serving.cluster.timeouts import Timeouts
from serving.configuration import anchored, application, convert, load
from serving.listening import listen, url_at
from serving.logs import set_up_logging
from serving.options import is_loopback
from serving.request_log import check_writable
from serving.tracing import check_endpoint

log = logging.getLogger(__name__)

# Read by Ray's processes when they start. HAProxy in front of the routers instead of Ray's Python proxy: 1 ms a request
# instead of 11. Throughput optimized: gRPC between replicas instead of actor calls, no threads of its own around our
# event loops, Ray Serve's own lines in its log files (docs/benchmarks.md).
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_worker_niceness": "0",  # 15 otherwise: behind everything else on this machine
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "120",  # a client that neither sends nor reads; Ray: an hour
    # A request whose router dies before it answers goes to the other one; computing an answer twice harms nobody.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Each router takes three failures until HAProxy leaves it out, and HAProxy's own 3 tries may be over before: then
    # the client is told 503 or, by a fault of HAProxy 2.8.25, nothing at all. Left out are all, it waits for a new one.
    "RAY_SERVE_HAPROXY_RETRIES": "10",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # three that fail, and HAProxy is started anew; 10 s each otherwise
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ROTATION_MAX_BYTES": str(64 << 20),  # of each log file, and as much once more; Ray: 3 GiB, of workers no limit
    "RAY_ROTATION_BACKUP_COUNT": "1",
    "RAY_AUTH_MODE": "token",  # nobody without its token is answered
}
# Of a Ray on one machine: its address is 127.0.0.1, so it listens there only. The name is Ray's, and says what it is
# otherwise for: to stay off the network on desktops.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_WATCH_S = 0.5
NOT_IN_TIME = "did not start within its 30 s"
# A router takes 0.26 GB, which is mostly Ray's code (2026-11-27).
_FREE_FOR_A_SECOND_BYTES = 4_000_000_000


def run(config: Path, port: int | None, cpus: int | None, drain_s: float) -> None:
    """Serve until told to stop; running answers may then take drain_s more. Raises UserError before Ray starts."""
    set_up_logging()
    ours, http, logging_config = _read(config)
    if port is not None:
        http["port"] = port
    n_cpus = cpus or processors.n_cpus()
    try:
        _settle_routers(ours, n_cpus)
        options = read_args(ours["args"])
    except UserError as error:
        raise UserError(f"`{config}`: {error}") from None
    listen(http["host"], http["port"], "choose another --port").close()  # Ray binds it later
    _check(options, http, n_cpus)
    connections = max_connections()
    if elsewhere := os.environ.pop("RAY_ADDRESS", None):
        log.info("this is a Ray of its own, not the one at %s; `serve deploy %s` is for that one", elsewhere, config)
    home.keep_token_private()
    folder = home.make()
    with guard.watching(str(folder)) as watcher:
        certificate, key = home.write_certificate(folder)
        for variable, value in {**ENVIRONMENT, **Timeouts.of(options).environment(), **LOCAL, **home.ports()}.items():
            os.environ.setdefault(variable, value)  # what the user has set stays
        os.environ.update(home.environment(folder))
        log.info("HAProxy takes up to %d connections; Ray's logs are in %s/ray", connections, folder)
        behind = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}  # of the routers, which HAProxy asks

        def read(changed: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
            again, *rest = _read(changed)
            if again["args"].get("router_replicas") is None:
                again["args"]["router_replicas"] = options.router_replicas  # as was settled
            return again, rest[0], rest[1]

        reloads = Reloads(config, read, partial(_check_change, options, http, n_cpus))
        _serve(ours, {**http, **behind}, logging_config, n_cpus, drain_s, _Processes(folder, watcher), reloads)
    home.remove(folder)


def _settle_routers(ours: dict[str, Any], n_cpus: int) -> None:
    """Two routers, or one where a second would crowd out the models; what the config says stays. Raises UserError."""
    args = ours["args"] = dict(ours.get("args") or {})
    if args.get("router_replicas") is not None:
        return
    options = read_args({**args, "router_replicas": 1})
    free = memory().free
    wanted_cpus = sum(model.n_cpus for model in options.models.values()) + 2 * options.router_num_cpus
    args["router_replicas"] = 2
    why = "the one answers while the other is started anew"
    if free < _FREE_FOR_A_SECOND_BYTES or wanted_cpus > n_cpus:
        args["router_replicas"] = 1
        why = f"for a second, {wanted_cpus:g} of {n_cpus} CPUs and {_FREE_FOR_A_SECOND_BYTES / 1e9:g} GB must be there"
        why += f", of which {free / 1e9:.1f} are"
    log.info("%d of `router_replicas`: %s", args["router_replicas"], why)


def _start_ray(n_cpus: int, folder: Path) -> None:
    """Start Ray's processes. Raises MachineRefused where they take longer than it waits, which is 30 s."""
    import ray

    try:
        ray.init(
            "local",
            num_cpus=n_cpus,
            include_dashboard=False,
            _temp_dir=f"{folder}/ray",
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises no other kind here
        if "timed out during startup" not in str(error):
            raise
        raise MachineRefused(
            f"Ray {NOT_IN_TIME}; try again when this machine has less to do, or see {folder}/ray/session_latest/logs"
        ) from None


class _Processes:
    """What runs of this cluster, so that it ends as a whole."""

    def __init__(self, folder: Path, watcher: int) -> None:
        self.folder, self._watcher = folder, watcher
        self.is_ready = self.is_ending = False

    def leave(self, code: int) -> NoReturn:
        """End this process and all others at once."""
        guard.end(str(self.folder), but=frozenset({self._watcher}))
        if code == 0:
            home.remove(self.folder)
        os._exit(code)

    def watch(self, drain_s: float) -> None:
        """Leave when Ray's own processes have died: nothing restarts them, and what they started would stay.

        Without the GCS, routers and replicas still answer: what runs may end. Without the raylet nothing is left.
        """
        own = {pid: name for pid in guard.members(str(self.folder)) if (name := _name(pid)) in ("gcs_server", "raylet")}
        while (dead := next((pid for pid in own if _has_ended(pid)), None)) is None:
            time.sleep(_WATCH_S)
        if self.is_ending:
            return
        self.is_ending = True
        print(f"mpt: Ray's {own[dead]} has died, and with it this cluster; run the same command again", file=sys.stderr)
        if own[dead] == "gcs_server":
            self._let_answers_end(drain_s)
        self.leave(EngineStopped.exit_code)

    def _let_answers_end(self, drain_s: float) -> None:
        """HAProxy closes its port at SIGUSR1, and ends with its last answer."""
        until = time.monotonic() + drain_s
        while (proxies := [pid for pid in guard.members(str(self.folder)) if _name(pid) == "haproxy"]) and (
            time.monotonic() < until
        ):
            for pid in proxies:
                os.kill(pid, signal.SIGUSR1)
            time.sleep(_WATCH_S)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _has_ended(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # waited for already
        return True


def _serve(
    ours: Mapping[str, Any],
    http: Mapping[str, Any],
    logging_config: Mapping[str, Any],
    n_cpus: int,
    drain_s: float,
    processes: _Processes,
    reloads: Reloads,
) -> None:
    started, stop = time.perf_counter(), threading.Event()

    def catch_signals() -> None:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a terminal that is closed; `nohup` ignores it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, lambda *_: stop.set() if processes.is_ready else processes.leave(0))

    catch_signals()
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from serving.cluster.running import Running

    running = Running(ours, logging_config)
    try:
        _start_ray(n_cpus, processes.folder)
        catch_signals()  # Ray has put its own in their place
        threading.Thread(target=processes.watch, args=(drain_s,), daemon=True).start()
        serve.start(http_options=HTTPOptions(**http), logging_config=LoggingConfig(**logging_config))
        running.deploy(ours["args"], {})
        processes.is_ready = True
        with reloads.listening(http["port"], ours["args"], running):
            url = url_at(http["host"], http["port"])
            log.info("ready after %.1f s on %s", time.perf_counter() - started, url)
            log.info("to look at it and try it, open %s/ in a browser", url_at(http["host"], http["port"], shown=True))
            tell_room(read_args(ours["args"]), running.free())
            stop.wait()
        log.info("shutting down; running requests may take %.0f s more", drain_s)
        processes.is_ending = True
        running.drain(drain_s)
        serve.shutdown()
    except (RayError, RuntimeError, OSError) as error:
        if processes.is_ready:
            raise
        log.debug("Ray Serve did not start", exc_info=error)
        last = str(error).strip().splitlines()[-1]
        where = f"{processes.folder}/ray/session_latest/logs"
        raise MachineRefused(f"the models did not start: {last}; see {where}") from None
    except SystemExit:  # what Ray's own handler of SIGTERM does, until ours is there
        processes.leave(0)
    finally:
        processes.is_ending = True
        ray.shutdown()


def _read(config: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Our application of a Serve config, its HTTP options and its logging; or of a file of `mpt serve --config`."""
    raw = load(config)
    if "applications" in raw or not raw:
        ours, listens = application(raw, config), raw.get("http_options") or {}
    else:
        listens = {key: raw.pop(key) for key in ("host", "port") if key in raw}
        raw = {"logging_config": {"enable_access_log": False}, "args": raw}  # ours has tokens and latencies
        ours = raw
    http = {"host": "127.0.0.1", "port": 8000, **listens}
    for key, hint in (("host", str), ("port", int)):
        http[key] = convert(hint, http[key], key)
    args = anchored(ours.get("args") or {}, config.absolute().parent)
    return {**ours, "args": args}, http, raw.get("logging_config") or {}


def _check(
    options: ClusterOptions, http: dict[str, Any], n_cpus: int, starting: Mapping[str, int] | None = None
) -> None:
    """Everything that would fail later and less clearly. Raises UserError.

    starting: replicas of each model that are to start now; by default the first ones of all.
    """
    if given := sorted(key for key in http if key.startswith("ssl_")):
        raise UserError(
            f"`http_options` has `{given[0]}`, and HAProxy does not speak TLS to clients; put a gateway that does in "
            "front of it"
        )
    if options.replica_host == "node" and not (options.api_keys or options.api_key_file or options.no_auth):
        raise UserError(NO_KEYS)
    keys = router_keys(options)
    book_of(keys, options, several_machines=options.replica_host == "node").close()
    if not is_loopback(http["host"]) and not (keys.required or options.no_auth):
        raise UserError(
            f"`{http['host']}` can be reached from other machines and there are no keys; give `api_key_file` in "
            "`args`, or `no_auth: true` to serve everybody who reaches it"
        )
    for model in options.models.values():
        read_architecture(resolve(model.root))
        if model.adapters is not None and not Path(model.adapters).is_dir():
            raise UserError(f"`{model.adapters}` is no folder of adapters; each adapter is a folder inside it")
    check_endpoint(options.otel_endpoint)
    if options.log_requests is not None:
        check_writable(options.log_requests)
    _check_memory(options, starting)
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


def _check_change(
    began: ClusterOptions, http: dict[str, Any], n_cpus: int, changed: ClusterOptions, starting: Mapping[str, int]
) -> None:
    """`_check` for options that a running cluster is to take. began: those that it was started with."""
    _check(changed, http, n_cpus, starting)
    before = Timeouts.of(began).environment()
    for variable, value in Timeouts.of(changed).environment().items():
        if float(value) > max(float(before[variable]), float(os.environ[variable])):  # the user may have set others
            raise UserError(
                f"the changed time-outs need {variable} to be {value} s, and this cluster was started with "
                f"{os.environ[variable]}; start `mpt cluster` anew"
            )


def _check_memory(options: ClusterOptions, starting: Mapping[str, int] | None) -> None:
    """Raises MachineRefused where the replicas on CPU that start do not fit into this machine's memory at once."""
    from mpt.engine.room import Room, require, room_for

    rooms: dict[str, Room] = {}
    for name, model in options.models.items():
        n_replicas = model.initial_replicas or model.min_replicas
        n_replicas = n_replicas if starting is None else starting.get(name, 0)
        if n_replicas and not model.num_gpus:
            rooms[name] = room_for(name, replace(model.model, device="cpu")).of_replicas(n_replicas)
    require(rooms, options.models)
