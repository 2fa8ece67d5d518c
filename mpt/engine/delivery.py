"""Events on their way from the engine's thread to those who asked: collected during a step, handed over at its end."""

import asyncio
import logging

from mpt.engine.errors import EngineError, EngineFailed
from mpt.engine.request import Delta, Event, TokenLogprob
from mpt.engine.sequence import Request, Sequence, Taken

log = logging.getLogger(__name__)

Told = tuple[Request, Event | EngineError]
Untold = tuple[Sequence, Taken, TokenLogprob | None]  # a token that is no text yet


class Outbox:
    """What a step has to tell. The engine's thread only."""

    def __init__(self) -> None:
        self._told: list[Told] = []
        self._untold: list[Untold] = []

    def tell(self, request: Request, event: Event | EngineError) -> None:
        """Tell a request something, unless nobody waits for it any more."""
        if not request.cancelled:
            self._told.append((request, event))

    def fail(self, request: Request, error: EngineError) -> None:
        """End a request with an error; the scheduler lets go of its sequences at the next step."""
        self.make_text()
        self.tell(request, error)
        request.cancelled = True

    def tell_token(self, sequence: Sequence, taken: Taken, logprob: TokenLogprob | None) -> None:
        """Tell of a token once `make_text` is called; at once where a stop string in its text may end the answer."""
        if sequence.sampling.stop:
            self._say(sequence, taken, logprob)
        else:
            self._untold.append((sequence, taken, logprob))

    def make_text(self) -> bool:
        """Make text of the tokens that are none yet; whether there were any."""
        untold, self._untold = self._untold, []
        for each in untold:
            self._say(*each)
        return bool(untold)

    def _say(self, sequence: Sequence, taken: Taken, logprob: TokenLogprob | None) -> None:
        try:
            self.tell(sequence.request, sequence.say(taken, logprob))
        except Exception:
            log.exception("request %s failed on token %d", sequence.request.id, taken.token)
            self.fail(sequence.request, EngineFailed("this request's text could not be made"))

    def hand_out(self) -> None:
        """Wake each event loop once with all events of its requests."""
        told, self._told = _joined(self._told), []
        by_loop: dict[asyncio.AbstractEventLoop, list[Told]] = {}
        for request, event in told:
            by_loop.setdefault(request.loop, []).append((request, event))
        for loop, events in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, events)
            except RuntimeError:  # that loop is closed: nobody is left to tell
                for request, _ in events:
                    request.cancelled = True


def _joined(told: list[Told]) -> list[Told]:
    """The events of a step with one Delta for each sample, whatever number of tokens it gained."""
    joined: list[Told] = []
    places: dict[tuple[int, int], int] = {}  # of each sample's delta
    for request, event in told:
        if isinstance(event, Delta):
            place = places.setdefault((id(request), event.index), len(joined))
            if place < len(joined):
                before = joined[place][1]
                assert isinstance(before, Delta)
                joined[place] = (request, before.then(event))
                continue
        joined.append((request, event))
    return joined


def _deliver(events: list[Told]) -> None:
    for request, event in events:
        request.deliver(event)
