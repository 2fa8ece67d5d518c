"""Functions over many items in several processes, results in order: the same whatever the number of processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from mpt.errors import MachineRefused
from mpt.processors import n_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")
_WAITING = 4  # items a process, so that none waits for the one that reads and few are held in memory


def n_cores() -> int:
    """Processes that can compute at a time, by affinity and the container's quota; one in a process of `mapped`."""
    return n_cpus() if multiprocessing.parent_process() is None else 1


class Mapped(Protocol):
    """A function's results over items, in order."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]: ...


def mapped(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    n_processes: int,
    start: Callable[..., None],
    start_with: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """The function's results, in order, as `opened` gives them."""
    with opened(n_processes, start, start_with) as run:
        yield from run(function, items)


@contextmanager
def opened(n_processes: int, start: Callable[..., None], start_with: tuple[Any, ...] = ()) -> Iterator[Mapped]:
    """Processes for several functions, whose items may come of one another's results.

    start: called once in each process, with `start_with`. One process is this one. A result raises what the function
    raises, and MachineRefused where a process has died.
    """
    if n_processes == 1:
        start(*start_with)
        yield _here
        return
    # Not fork: the parent's threads (tokenizers, torch) may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, _start_alone, (start, *start_with)) as pool:

        def run(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
            return _in_order(pool, _WAITING * n_processes, function, items)

        yield run


def _here(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
    return map(function, items)


def _in_order(
    pool: ProcessPoolExecutor, n_waiting: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= n_waiting:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise MachineRefused(
            "a process that was to help reading ended at once or was killed; is memory short? A script of your own "
            'starts its work under `if __name__ == "__main__":`'
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def _start_alone(start: Callable[..., None], *start_with: Any) -> None:
    """In a process of its own: it computes on one core, since there is a process for each, and ends with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*start_with)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
