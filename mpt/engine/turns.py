"""Who leaves the queue next: the urgent first, and within one priority the clients in turn.

A client that sends 256 requests at once so delays another's single one by one of its own, not by all of them.
"""

from collections import Counter
from collections.abc import Iterable

from mpt.engine.sequence import Sequence


class Turns:
    """Remembers when each client was last let in; there are as many as keys, one where there are none."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._n = 0

    def order(self, waiting: Iterable[Sequence]) -> list[Sequence]:
        """Those sent back by the engine, as they are; then by priority, round by round, each client's as they came."""
        sent_back: list[Sequence] = []
        ranked: list[tuple[int, int, int, int, Sequence]] = []
        rounds: Counter[tuple[int, str]] = Counter()
        for at, sequence in enumerate(waiting):
            if sequence.admitted:
                sent_back.append(sequence)
                continue
            priority, client = sequence.sampling.priority, sequence.request.client
            ranked.append((priority, rounds[priority, client], self._last.get(client, -1), at, sequence))
            rounds[priority, client] += 1
        return [*sent_back, *(entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:-1]))]

    def take(self, sequence: Sequence) -> None:
        """A sequence has left the queue; its client's next turn comes after the others'."""
        if not sequence.admitted:
            sequence.admitted = True
            self._n += 1
            self._last[sequence.request.client] = self._n
