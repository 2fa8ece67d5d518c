"""Which models are in memory: loaded when they are asked for, unloaded when nobody asks or others need their room.

A request holds the models that it uses until its last byte is sent, and a model that is held is never unloaded. Loads
go one after another, in the order of the first request for each, because each is decided by the memory that is free
then; requests for the same model share one. Where a model finds no room, those that are idle go, the one least recently
used first. Where all are busy, the least recently used takes no new request until it is idle and goes then, so that
nobody waits for ever; requests for it wait for their turn again.

All of this runs in one event loop; models are opened in threads. Not here: how much memory a model takes and gets
(`mpt/engine/room.py`), who may load by request (`serving/loading.py`).
"""

import asyncio
import logging
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from mpt.catalog import find_local
from mpt.engine.adapter_folders import available
from mpt.engine.endpoint import Endpoint, open_endpoint
from mpt.engine.room import Room, free_memory, give_back_memory, require, room_for
from mpt.errors import DeviceLost, MachineRefused, MPTError
from mpt.options import ModelOptions
from serving.cards import card_of, cards_of, with_adapters
from serving.errors import Conflict, Unavailable
from serving.options import ServeOptions

log = logging.getLogger(__name__)

State = Literal["loaded", "loading", "unloaded", "failed"]
Reason = Literal["idle", "room", "request"]  # of an unload
Failure = tuple[str, str]  # message and code
T = TypeVar("T")

_LET_GO_S = 0.5  # the thread that has stopped an engine drops it a moment after it has told so
_LEAVING = ("the server is shutting down; try another replica", "shutting_down")
_PATH = re.compile(r"(?<![\w.])[/~][^\s`:;,]*")  # of this machine, in a text for clients


@dataclass(eq=False)
class Model:
    """One model of this process, in memory or not. added: adapters that clients have loaded, kept over an unload."""

    name: str
    options: ModelOptions
    n_held: int = 0  # requests that use it
    n_waiting: int = 0  # requests that wait until it is loaded
    is_retiring: bool = False  # takes no new request, and goes once it is idle
    used_at: float = 0.0  # on the clock
    outcome: "asyncio.Future[Failure | None] | None" = None  # of the load that is on its way
    failure: str | None = None  # why the last load failed
    added: Mapping[str, Path] = field(default_factory=dict)
    card: dict[str, Any] | None = None  # its entry while it is not loaded
    n_loads: int = 0
    n_failures: int = 0
    load_seconds: float = 0.0
    n_unloads: Counter[Reason] = field(default_factory=Counter)

    @property
    def is_idle(self) -> bool:
        return not self.n_held and (not self.n_waiting or self.is_retiring)


@dataclass(eq=False)
class Hold:
    """What one request holds. waited_s: for models to load."""

    models: list[Model] = field(default_factory=list)
    waited_s: float = 0.0

    def take(self, model: Model) -> None:
        if model not in self.models:
            self.models.append(model)
            model.n_held += 1


class Lifecycle:
    """The models that the options name. endpoints: those that are loaded, by name; others there were given, and stay.

    clock: of how long a model has been idle, in seconds. lost: the device is, so the process must leave.
    """

    def __init__(self, options: ServeOptions, endpoints: dict[str, Endpoint]) -> None:
        self.models = {name: Model(name, each) for name, each in options.models.items()}
        self.clock: Callable[[], float] = time.monotonic
        self.lost: DeviceLost | None = None
        self.n_opening = 0  # in threads, now
        self._options, self._endpoints = options, endpoints
        self._coming: dict[str, Room] = {}  # to be loaded at the start
        self._turn = asyncio.Lock()  # to load or unload
        self._changed = asyncio.Event()  # set, and replaced, when a model is let go of or nobody waits for it
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    # -- requests ------------------------------------------------------------------------------------------------

    @contextmanager
    def holding(self) -> Iterator[Hold]:
        """Around one request."""
        hold = Hold()
        try:
            yield hold
        finally:
            for model in hold.models:
                model.n_held -= 1
                model.used_at = self.clock()
            self._notify()

    def must_wait(self, name: str) -> bool:
        """Whether a model has to be loaded before a request can begin."""
        model = self.models.get(name)
        return model is not None and not self._is_there(model)

    async def get(self, name: str, hold: Hold) -> Endpoint:
        """A model, held by a request, loaded if need be. Raises Unavailable."""
        model = self.models.get(name)
        if model is not None:
            while not self._is_there(model):
                await self._wait_for(model, hold)
            hold.take(model)
        return self._endpoints[name]

    def state(self, name: str) -> State:
        model = self.models.get(name)
        if name in self._endpoints or model is None:
            return "loaded"
        return "loading" if model.outcome is not None else "unloaded" if model.failure is None else "failed"

    def idle_s_left(self, name: str) -> float | None:
        """Seconds until a loaded model goes if nobody asks for it; None where it stays."""
        model, limit = self.models.get(name), self._options.idle_unload_s
        if model is None or limit is None:
            return None
        return limit if model.n_held else max(0.0, limit - (self.clock() - model.used_at))

    def adapter_names(self, name: str) -> list[str] | None:
        """The adapters of a model, loaded or not; None for one that takes none or is not known."""
        model, endpoint = self.models.get(name), self._endpoints.get(name)
        if endpoint is not None:
            return None if endpoint.adapters is None else endpoint.adapters.names()
        if model is None:
            return None
        return list(available({**model.options.named_adapters, **model.added}, model.options.adapters))

    async def cards(self, name: str) -> list[dict[str, Any]]:
        """The entries of a model and of its adapters, with its state; from its files where it is not loaded."""
        model, endpoint = self.models.get(name), self._endpoints.get(name)
        if endpoint is not None:
            found = cards_of(endpoint)
        else:
            assert model is not None, name
            if model.card is None:
                model.card = await asyncio.to_thread(card_of, name, model.options)
            found = with_adapters(model.card, self.adapter_names(name) or [])
        state = self.state(name)
        facts = {"state": state, "reason": model.failure} if model and state == "failed" else {"state": state}
        return [{**card, **facts} for card in found]

    # -- loading -------------------------------------------------------------------------------------------------

    async def check_all(self) -> None:
        """See that every model can be loaded as it is told, without loading one. Raises MPTError."""
        for model in self.models.values():
            room = await _in_thread(partial(room_for, model.name, model.options))
            require({model.name: room}, {model.name: model.options})
            model.card = await _in_thread(partial(card_of, model.name, model.options))

    async def load_at_start(self, names: Sequence[str]) -> AsyncIterator[str]:
        """Load models that must be there, one after another; each name once its model is. Raises MPTError.

        Where all of them together find no room, none is read.
        """
        self._coming = {name: await _in_thread(partial(room_for, name, self.models[name].options)) for name in names}
        require(self._coming, self._options.models)
        for name in names:
            room = self._coming.pop(name)
            async with self._turn:
                await self._open(self.models[name], room)
            yield name

    def close(self) -> None:
        """Load no more: whoever waits is told that the server leaves."""
        self._closing = True
        for model in self.models.values():
            if model.outcome is not None and not model.outcome.done():
                model.outcome.set_result(_LEAVING)
        self._notify()

    def _is_there(self, model: Model) -> bool:
        return model.name in self._endpoints and not model.is_retiring

    async def _wait_for(self, model: Model, hold: Hold) -> None:
        """Wait until the load that is on its way, or a new one, has ended. Raises Unavailable."""
        limit = max(1, model.options.max_waiting)
        if model.n_waiting >= limit:
            message = (
                f"{model.n_waiting} requests wait for `{model.name}` to load, at most {limit} may; try again later"
            )
            raise Unavailable(message, code="overloaded")
        if self._closing:
            raise Unavailable(_LEAVING[0], code=_LEAVING[1])
        if model.outcome is None:
            model.outcome = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._load(model, model.outcome))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        began = time.monotonic()
        model.n_waiting += 1
        try:
            async with asyncio.timeout(self._options.request_timeout_s - hold.waited_s):
                failure = await asyncio.shield(model.outcome)
        except TimeoutError:
            message = f"`{model.name}` was not loaded within {self._options.request_timeout_s:g} s; try again later"
            raise Unavailable(message, code="queue_timeout") from None
        finally:
            model.n_waiting -= 1
            hold.waited_s += time.monotonic() - began
            self._notify()
        if failure is not None:
            raise Unavailable(failure[0], code=failure[1])

    async def _load(self, model: Model, outcome: "asyncio.Future[Failure | None]") -> None:
        """Load a model for those who wait, and tell them."""
        failure: Failure | None = None
        try:
            async with self._turn:
                if not self._is_there(model):
                    room = await _in_thread(partial(room_for, model.name, model.options))
                    if await self._makes_room(model, room):
                        await self._open(model, room)
        except Exception as error:
            if isinstance(error, DeviceLost):
                self.lost = error
            failure = self._failed(model, error)
        if failure is not None:
            await asyncio.to_thread(give_back_memory)  # the error, which held on to what had been read, is gone
        model.outcome = None
        if not outcome.done():
            outcome.set_result(failure)
        self._notify()

    def _failed(self, model: Model, error: Exception) -> Failure:
        """Note why a load failed; what those who wait are told."""
        model.n_failures += 1
        if isinstance(error, MPTError):
            log.error("%s: cannot be loaded: %s", model.name, error)
            model.failure = _for_clients(str(error), model)
        else:
            log.exception("%s: cannot be loaded", model.name, exc_info=error)
            model.failure = "an internal error; the server's log says more"
            if "out of memory" in str(error).lower() or "not enough memory" in str(error).lower():
                model.failure = "memory is short; unload another model, or ask again later"
        return f"`{model.name}` cannot be loaded: {model.failure}", "model_load_failed"

    async def _makes_room(self, model: Model, room: Room) -> bool:
        """Unload others until a model fits; False once nobody waits for it any more."""
        try:
            while model.n_waiting and not self._closing:
                in_the_way = self._in_the_way(model, room)
                if not in_the_way:
                    return True
                if idle := [each for each in in_the_way if each.is_idle]:
                    await self._unload(min(idle, key=_used_at), "room")
                    continue
                busy = [each for each in in_the_way if each.n_held]
                if busy and not any(each.is_retiring for each in busy):
                    min(busy, key=_used_at).is_retiring = True
                await self._changed.wait()
            return False
        finally:
            for each in self.models.values():
                each.is_retiring = False

    def _in_the_way(self, model: Model, room: Room) -> list[Model]:
        """Models of which at least one must go before another fits; none where it fits, or none of them can go."""
        loaded = [each for each in self.models.values() if each.name in self._endpoints]
        limit = self._options.max_loaded
        if limit is not None and len(loaded) >= limit:
            return loaded
        beside = [each for each in loaded if _device(self._endpoints[each.name]) == room.device]
        if room.device is None or not beside:
            return []
        free = free_memory(room.device).free - self._promised_bytes(room)
        log.debug("%s needs %.2f GB, %.2f GB are free", model.name, room.n_bytes / 1e9, free / 1e9)
        return [] if room.n_bytes <= free else beside

    def _promised_bytes(self, room: Room) -> int:
        """What the caches of loaded models may still grow by, of the same memory, and what is still to be loaded."""
        coming = sum(each.weight_bytes for each in self._coming.values() if each.device == room.device)
        return coming + sum(each.kv_growth_bytes for each in self._endpoints.values() if _device(each) == room.device)

    async def _open(self, model: Model, room: Room) -> None:
        """Open a model; it is there when it has answered once. Raises MPTError."""
        started = time.perf_counter()
        n_places = min(self._options.max_loaded or len(self.models), len(self.models))
        n_loaded = sum(name in self._endpoints for name in self.models)
        n_sharing = max(1, n_places - n_loaded)
        work = partial(open_endpoint, model.name, model.options, n_sharing, self._promised_bytes(room))
        self.n_opening += 1
        try:
            endpoint = await _in_thread(work)
            try:
                await _until_ready(endpoint)
                await self._add_adapters(endpoint, model)
            except BaseException:
                await endpoint.engine.drain(0.0)
                raise
        finally:
            self.n_opening -= 1
        if self._closing:
            await endpoint.engine.drain(0.0)
            return
        self._endpoints[model.name] = endpoint
        model.n_loads += 1
        model.load_seconds += time.perf_counter() - started
        model.failure, model.used_at = None, self.clock()
        log.info("%s: loaded in %.1f s", model.name, time.perf_counter() - started)

    async def _add_adapters(self, endpoint: Endpoint, model: Model) -> None:
        """Those that clients had loaded before it was unloaded; one that is not there any more is left out."""
        for name, path in model.added.items():
            try:
                assert endpoint.adapters is not None
                await endpoint.adapters.add(name, path)
            except MPTError as error:
                log.warning("%s: adapter %s is gone: %s", model.name, name, error)
        model.added = {}

    # -- unloading -----------------------------------------------------------------------------------------------

    async def unload(self, name: str) -> None:
        """Unload a model at once, if it is loaded. Raises Conflict while requests use it or wait for it."""
        model = self.models[name]
        if model.outcome is None and model.name not in self._endpoints:
            return
        if not model.is_idle:
            raise Conflict(f"`{name}` is answering or loading for {model.n_held + model.n_waiting} requests; try later")
        async with self._turn:
            if name in self._endpoints:
                if not model.is_idle:
                    raise Conflict(f"`{name}` has new requests; try later")
                await self._unload(model, "request")

    async def unload_idle(self) -> None:
        """Unload what nobody has asked for in the time that the options say."""
        for model in self.models.values():
            if self._is_due(model):
                async with self._turn:
                    if self._is_due(model):
                        await self._unload(model, "idle")

    def _is_due(self, model: Model) -> bool:
        limit = self._options.idle_unload_s
        loaded = model.name in self._endpoints and limit is not None
        return loaded and model.is_idle and self.clock() - model.used_at >= (limit or 0.0)

    async def _unload(self, model: Model, reason: Reason) -> None:
        endpoint = self._endpoints.pop(model.name)
        model.is_retiring = False
        if endpoint.adapters is not None:
            model.added = endpoint.adapters.added()
        model.card = {**cards_of(endpoint)[0], "runs": None}
        await endpoint.engine.drain(0.0)
        gone = weakref.ref(endpoint.engine)
        del endpoint
        until = time.monotonic() + _LET_GO_S
        while gone() is not None and time.monotonic() < until:
            await asyncio.sleep(0.002)
        await asyncio.to_thread(give_back_memory)
        model.n_unloads[reason] += 1
        log.info("%s: unloaded (%s)", model.name, _IN_WORDS[reason])

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


_IN_WORDS: dict[Reason, str] = {"idle": "nobody asked for it", "room": "another needs its room", "request": "as asked"}


def _used_at(model: Model) -> float:
    return model.used_at


def _device(endpoint: Endpoint) -> str | None:
    """Whose memory a model is in."""
    return None if endpoint.choice is None or endpoint.choice.backend == "triton" else endpoint.choice.device


async def _until_ready(endpoint: Endpoint) -> None:
    """Wait for an engine's first token. Raises MachineRefused and DeviceLost."""
    engine = endpoint.engine
    while not engine.ready and engine.failed is None:
        await asyncio.sleep(0.005)
    if (why := engine.failed) is not None:
        kind = DeviceLost if isinstance(why, DeviceLost) else MachineRefused
        raise kind(f"`{endpoint.name}` cannot answer: {why}")


def _for_clients(message: str, model: Model) -> str:
    """An error without the paths of this machine."""
    with suppress(MPTError):
        for path in (find_local(model.options.root), model.options.root):
            message = message.replace(str(path), model.name)
    return _PATH.sub("...", message)


async def _in_thread(work: Callable[[], T]) -> T:
    """The result of work in a thread that a process which leaves does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # of the work, where there is no error

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # handed to who waits
            error = raised
        with suppress(RuntimeError):  # the loop is closed: the process leaves
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="open", daemon=True).start()
    return await future
