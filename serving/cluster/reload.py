"""`mpt cluster reload`: a changed config taken into the cluster that runs.

A command rather than a watched file: it says what would restart, or why the file is refused, to who asked, and a file
that is half written, or is changed in three steps, does nothing. It talks to `mpt cluster` over a Unix socket that is
its user's only.
"""

import json
import logging
import os
import socketserver
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any, Protocol

from mpt.errors import MachineRefused, MPTError, UserError
from mpt.options import ModelOptions
from serving.cluster.options import ClusterOptions, ReplicaHttp, ReplicaOptions, read_args

log = logging.getLogger(__name__)

_FOLLOW_S = 60.0  # for the routers to go by what was deployed
# Options of a model that its replicas are made of. What else changes, Ray Serve and the routers take in place.
RESTARTING = frozenset(each.name for each in fields(ModelOptions)) - {"max_waiting"} | {
    "num_cpus",
    "num_gpus",
    "resources",
}
_OF_ALL_REPLICAS = frozenset(each.name for each in fields(ReplicaHttp))

Check = Callable[[ClusterOptions, Mapping[str, int]], None]  # the new options, and the replicas that start
Read = Callable[[Path], tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]  # application, HTTP, logging


# -- what a change comes to ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a new config changes."""

    lines: tuple[str, ...]  # for people
    added: tuple[str, ...]
    restarted: tuple[str, ...]  # models whose replicas are replaced
    removed: tuple[str, ...]


def plan(old: ClusterOptions, new: ClusterOptions) -> Plan:
    front = _changed(old, new) - {"models"}
    of_all = front & _OF_ALL_REPLICAS
    lines, restarted = [], []
    for name, model in new.models.items():
        if (before := old.models.get(name)) is None:
            lines.append(f"`{name}` is new")
            continue
        changed = _changed(before, model)
        if why := (changed & RESTARTING) | of_all:
            restarted.append(name)
            lines.append(f"`{name}` restarts for {_named(why)}: {_order(model)}")
        elif changed:
            lines.append(f"`{name}` takes {_named(changed)} as it runs")
    removed = tuple(name for name in old.models if name not in new.models)
    for name in removed:
        patience = old.models[name].graceful_shutdown_timeout_s
        lines.append(f"`{name}` is removed; its running answers may take {patience:g} s more")
    if front & {"router_num_cpus"}:
        lines.append("the routers restart for `router_num_cpus`: another starts before one stops")
    if rest := front - of_all - {"router_num_cpus"}:
        lines.append(f"the routers take {_named(rest)} as they run")
    added = tuple(name for name in new.models if name not in old.models)
    return Plan(tuple(lines), added, tuple(restarted), removed)


def _changed(old: Any, new: Any) -> set[str]:
    return {each.name for each in fields(new) if getattr(old, each.name) != getattr(new, each.name)}


def _named(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys))


def _order(model: ReplicaOptions) -> str:
    if model.update_order == "stop_first":
        return "a replica stops before another starts, and requests wait meanwhile"
    return "another replica starts before one stops"


def without_room(options: ClusterOptions, free: Mapping[str, float]) -> dict[str, str]:
    """The models of which a replica more has no room, and what it lacks. free: Ray's resources that nobody holds."""
    lacking = {}
    for name, model in options.models.items():
        n = model.tensor_parallel
        wanted = {"CPU": model.num_cpus * n, "GPU": model.num_gpus * n, **model.resources}
        lacks = [
            f"{amount:g} {kind}, {free.get(kind, 0):g} free"
            for kind, amount in wanted.items()
            if amount > free.get(kind, 0) + 1e-6
        ]
        if lacks:
            lacking[name] = "; ".join(lacks)
    return lacking


def tell_room(options: ClusterOptions, free: Mapping[str, float]) -> None:
    """Say at the start which models a later change could not restart."""
    for name, lacks in without_room(options, free).items():
        if options.models[name].update_order == "start_first":
            log.warning(
                "no room for a second replica of `%s` (%s): `mpt cluster reload` refuses what restarts it; with "
                "`update_order: stop_first` it does not, and requests wait meanwhile",
                name,
                lacks,
            )


# -- in the cluster's process --------------------------------------------------------------------------------------


class Application(Protocol):
    """What runs, as `serving.cluster.running` has it on Ray."""

    def deploy(self, args: Mapping[str, Any], leaving: Mapping[str, ReplicaOptions]) -> None: ...

    def follows(self, args: Mapping[str, Any]) -> bool: ...

    def free(self) -> Mapping[str, float]: ...

    def running(self) -> set[str]: ...


class Reloads:
    """Takes changed configs into a running cluster, one after the other."""

    _args: Mapping[str, Any]  # these two once it listens: what runs, and on what
    _cluster: Application

    def __init__(self, config: Path, read: Read, check: Check) -> None:
        self._config, self._read, self._check = config, read, check
        application, *self._fixed = read(config)
        self._name = {key: value for key, value in application.items() if key != "args"}
        self._one_at_a_time = threading.Lock()

    def reload(self, config: Path | None) -> Iterator[str]:
        """Take a config, by default the one it was started with; yields what it does. Raises MPTError.

        When it raises UserError, nothing was changed; when MachineRefused, what ran before runs again.
        """
        with self._one_at_a_time:
            config = config or self._config
            application, *fixed = self._read(config)
            args = application.get("args") or {}
            if fixed != self._fixed or any(application.get(key) != value for key, value in self._name.items()):
                raise UserError(
                    f"`{config}` changes more than `args`; `http_options`, `logging_config` and the application's name "
                    "are for a new `mpt cluster`"
                )
            old, new = read_args(self._args), read_args(args)
            changes = plan(old, new)
            self._check(new, self._starting(new, changes))
            self._check_room(new, changes)
            yield from changes.lines or ("nothing changed",)
            begun = time.monotonic()
            self._take(args, {name: old.models[name] for name in changes.removed})
            yield f"done after {time.monotonic() - begun:.1f} s"

    def _starting(self, new: ClusterOptions, changes: Plan) -> dict[str, int]:
        """How many replicas of each model start while those that run are there too."""
        running = self._cluster.running()
        twice = [
            name for name in changes.restarted if name in running and new.models[name].update_order != "stop_first"
        ]
        first = {name: new.models[name].initial_replicas or new.models[name].min_replicas for name in changes.added}
        return first | dict.fromkeys(twice, 1)

    def _check_room(self, new: ClusterOptions, changes: Plan) -> None:
        """Raises UserError where a replica would wait for ever for its place."""
        running = self._cluster.running()
        for name, lacks in without_room(new, self._cluster.free()).items():
            model = new.models[name]
            if name in changes.added and model.min_replicas:
                raise UserError(f"`{name}` is new, and there is no room for it ({lacks}); serve fewer, or lower theirs")
            if name in changes.restarted and name in running and model.update_order == "start_first":
                raise UserError(
                    f"`{name}` would restart, and there is no room for a second replica of it ({lacks}); give it "
                    "`update_order: stop_first`, and requests wait meanwhile"
                )

    def _take(self, args: dict[str, Any], leaving: Mapping[str, ReplicaOptions]) -> None:
        """leaving: models that the routers forget before their replicas go."""
        try:
            self._cluster.deploy(args, leaving)
        except RuntimeError as error:
            log.debug("the changed application did not start", exc_info=error)
            raise self._taken_back(f"what changed did not start: {str(error).strip().splitlines()[-1]}") from None
        until = time.monotonic() + _FOLLOW_S
        while not self._cluster.follows(args):
            if time.monotonic() > until:
                raise self._taken_back("the routers do not take what changed; `mpt cluster`'s log says why")
            time.sleep(0.05)
        if leaving:
            self._cluster.deploy(args, {})
        self._args = args

    def _taken_back(self, why: str) -> MachineRefused:
        """The error of a change that failed, once the config from before runs again."""
        try:
            self._cluster.deploy(self._args, {})
        except RuntimeError as error:
            log.debug("the config from before did not start again", exc_info=error)
            return MachineRefused(f"{why}; nor does the config from before start again: run `mpt cluster` anew")
        return MachineRefused(f"{why}; the config from before runs on")

    @contextmanager
    def listening(self, port: int, args: Mapping[str, Any], cluster: Application) -> Iterator[None]:
        """Do as `mpt cluster reload` asks. port: the cluster's, by which it is found; args: what runs on it."""
        self._args, self._cluster = args, cluster
        path = _socket_of(port)
        path.unlink(missing_ok=True)  # of a cluster that was killed: the port is ours now
        handler = type("Handler", (_Handler,), {"reloads": self})
        with socketserver.ThreadingUnixStreamServer(str(path), handler) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield
            finally:
                server.shutdown()
                path.unlink(missing_ok=True)


class _Handler(socketserver.StreamRequestHandler):
    reloads: Reloads

    def handle(self) -> None:
        if not (line := self.rfile.readline()):  # who looks whether there is a cluster says nothing
            return
        asked = json.loads(line)
        try:
            for told in self.reloads.reload(Path(asked["config"]) if asked["config"] else None):
                log.info("reload: %s", told)
                self._say(line=told)
        except MPTError as error:
            log.warning("reload: %s", error)
            self._say(error=str(error), is_users=isinstance(error, UserError))
        else:
            self._say(done=True)

    def _say(self, **what: Any) -> None:
        try:
            self.wfile.write(json.dumps(what).encode() + b"\n")
        except OSError:  # who asked has gone; what was begun goes on
            log.debug("nobody listens to the reload any more")


# -- the command ---------------------------------------------------------------------------------------------------


def ask(config: Path | None, port: int | None) -> Iterator[str]:
    """Have the cluster on a port reload; yields what it does. port None: the only one there is. Raises MPTError."""
    with socket(AF_UNIX) as connection:
        try:
            connection.connect(str(_socket_of(port) if port is not None else _only_one()))
        except OSError:
            raise UserError(f"no `mpt cluster` of yours runs on port {port}; start it, or give its --port") from None
        stream = connection.makefile("rwb")
        stream.write(json.dumps({"config": str(config.absolute()) if config is not None else None}).encode() + b"\n")
        stream.flush()
        for line in stream:
            said = json.loads(line)
            if "line" in said:
                yield said["line"]
            elif "error" in said:
                raise (UserError if said["is_users"] else MachineRefused)(said["error"])
            else:
                return
    raise MachineRefused("the cluster has ended meanwhile; its log says why")


def _only_one() -> Path:
    running = [path for path in sorted(_folder().glob("cluster-*.sock")) if _answers(path)]
    if len(running) != 1:
        ports = ", ".join(path.stem.partition("-")[2] for path in running)
        raise UserError(
            f"several of your clusters run, on ports {ports}; give --port"
            if running
            else "no `mpt cluster` of yours runs"
        )
    return running[0]


def _answers(path: Path) -> bool:
    with socket(AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _socket_of(port: int) -> Path:
    return _folder() / f"cluster-{port}.sock"


def _folder() -> Path:
    """Where sockets of this user's clusters are. Raises MachineRefused where it is another's, who could answer."""
    shared = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(shared) / "mpt" if shared else Path(tempfile.gettempdir()) / f"mpt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise MachineRefused(f"`{folder}` is not this user's alone; remove it, or set $XDG_RUNTIME_DIR")
    return folder
