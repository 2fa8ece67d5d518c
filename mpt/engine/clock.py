"""The clock of an engine's events: arrival, first step, tokens. One, so that differences of two of them mean something.

Events carry the time at which they happened. The time at which somebody reads one is later: a step's events are handed
over together when the step has ended.
"""

import time


def now() -> float:
    """Seconds from a moment that does not change while the process runs."""
    return time.monotonic()
