"""One request to an engine in this process, timed: what `long_context.py` and `prefix_files.py` share."""

import itertools
import statistics
import time
from dataclasses import dataclass

from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling, Started

N_WRITTEN = 64  # tokens


@dataclass(frozen=True)
class Stream:
    first: float  # seconds from the prompt to the first token
    between: float  # seconds between the tokens behind it, the median
    n_cached: int  # tokens of the prompt


async def stream(engine: Engine, prompt: list[int]) -> Stream:
    """Have N_WRITTEN tokens written after a prompt, the likeliest ones."""
    asked = time.perf_counter()
    times, n_cached = [], 0
    sampling = Sampling(max_tokens=N_WRITTEN, temperature=0.0, ignore_eos=True)
    async for event in engine.generate(prompt, sampling, request_id="book"):
        if isinstance(event, Started):
            n_cached = event.cached_tokens
        elif isinstance(event, Delta):
            times.append(time.perf_counter())
    between = statistics.median(later - sooner for sooner, later in itertools.pairwise(times))
    return Stream(times[0] - asked, between, n_cached)
