"""Which CUDA graphs there are of steps of few tokens, when they are captured, and which one a step runs in.

A graph has a fixed shape: a number of rows, and a width of the block table, in pages of the longest row. A step takes
the smallest that holds it. All are captured at start, the largest first: each then finds the memory that it needs in
the pool of those before, and when the time for it is over, whatever is left runs in a larger one. Beyond its own rows
a graph reads one token each into page 0, which costs a step little: it waits for the weights.

There are two kinds: of steps in which every row reads one token, and, where somebody guesses, of steps that read up to
FEW_TOKENS of a row and `tokens_for` in all. Steps that fit neither run without.

Recording a step and replaying it are the caller's (`paged_backend.py`); nothing here knows CUDA.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from mpt.backends import compilations
from mpt.backends.backend import CHEAP_TOKENS, FEW_TOKENS
from mpt.backends.device_errors import raise_if_lost

log = logging.getLogger(__name__)

_COARSE = 64  # rows up to which each number is twice the last; from here on one more lies between two of those
START_S = 30.0  # that capturing at start may take
GUESSES_START_S = 15.0  # and capturing those of steps with guesses
_FIRST_WIDTH, _WIDER = 8, 4  # widths 8, 32, 128 and so on, so 2,048, 8,192 and 32,768 tokens
_HOPELESS = 3  # failures one after the other, after which the others are not tried
_AGAIN_S = 60.0  # after a failure: memory may be free again

Recorded = TypeVar("Recorded")


class Shape(NamedTuple):
    n_rows: int
    width: int

    def holds(self, other: "Shape") -> bool:
        return self.n_rows >= other.n_rows and self.width >= other.width


def width_for(n_pages: int) -> int:
    """The width of the block table for a longest row of n_pages."""
    width = _FIRST_WIDTH
    while width < n_pages:
        width *= _WIDER
    return width


def rows_for(n_rows: int) -> int:
    """The number of rows that a step of n_rows is padded to: 1, 2, 4 ... 64, 96, 128, 192, 256, 384 and so on."""
    doubled = 1 << (n_rows - 1).bit_length()
    between = doubled * 3 // 4
    return between if doubled > _COARSE and n_rows <= between else doubled


def shapes(most_rows: int, most_pages: int) -> list[Shape]:
    """Every shape that steps of up to most_rows, the longest of up to most_pages, are padded to, the largest first."""
    rows = [1]
    while rows[-1] < most_rows:
        rows.append(rows_for(rows[-1] + 1))
    widths = [width_for(1)]
    while widths[-1] < most_pages:
        widths.append(widths[-1] * _WIDER)
    return [Shape(n, width) for n, width in itertools.product(reversed(rows), reversed(widths))]


def tokens_for(n_rows: int) -> int:
    """What a graph of a step with guesses reads, padding included. n_rows: as `rows_for` gives it."""
    return FEW_TOKENS if n_rows == 1 else CHEAP_TOKENS


def guessed_shapes(most_rows: int, most_pages: int) -> list[Shape]:
    """As `shapes`, of steps in which somebody guesses: beside CHEAP_TOKENS rows there is no room for it."""
    return shapes(min(most_rows, CHEAP_TOKENS - 1), most_pages)


class Graphs(Generic[Recorded]):
    """The graphs of one model. `capture_all` at start, then `find` one for each step."""

    def __init__(
        self, record: Callable[[Shape], Recorded], planned: list[Shape], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """record: captures a shape; RuntimeError where that cannot be, or not now. planned: for the start."""
        self._record, self._planned, self._clock = record, planned, clock
        self._graphs: dict[Shape, Recorded] = {}
        self._not_before = -float("inf")  # when to try again

    def __len__(self) -> int:
        return len(self._graphs)

    def __iter__(self) -> Iterator[Shape]:
        return iter(self._graphs)

    def clear(self) -> None:
        """Let go of all of them; a step that needs one has it captured again."""
        self._graphs.clear()

    def capture_all(self, seconds: float = START_S) -> None:
        """Capture every shape, as many as that time allows, which is looked at before each."""
        until, n_failed = self._clock() + seconds, 0
        for shape in self._planned:
            if self._clock() >= until or n_failed == _HOPELESS:
                break
            n_failed = 0 if self._capture(shape) else n_failed + 1
        if len(self) < len(self._planned):
            found = (len(self), len(self._planned))
            log.warning("%d of %d CUDA graphs were captured; other steps run in larger ones, or without", *found)

    def find(self, shape: Shape) -> tuple[Shape, Recorded] | None:
        """The graph that a step of this shape runs in, with its own shape; None: it runs without.

        Where there is none, one is captured, unless that has failed a short while ago.
        """
        graph = self._graphs.get(shape)
        if graph is not None:
            return shape, graph
        larger = [each for each in self._graphs if each.holds(shape)]
        if larger:
            return min(larger), self._graphs[min(larger)]
        may_try = self._clock() >= self._not_before
        return (shape, self._graphs[shape]) if may_try and self._capture(shape) else None

    def _capture(self, shape: Shape) -> bool:
        try:
            compilations.count("graph", f"{shape.n_rows} rows, {shape.width} pages")
            self._graphs[shape] = self._record(shape)
        except RuntimeError as error:  # torch's out of memory too
            raise_if_lost(error)
            self._not_before = self._clock() + _AGAIN_S
            log.exception("a step of %d rows and %d pages cannot be captured; going on without", *shape)
            return False
        return True
