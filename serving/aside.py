"""Work on what a client sent, beside the event loop: streams go on while a large body is understood.

One thread: each more that computes in Python would be one more to wait for the interpreter with the engine and the
loop. No step inside may be one long call of C code, which nothing interrupts; `protocol/shape.py` sees to that.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from starlette.requests import Request

P = ParamSpec("P")
Result = TypeVar("Result")

SMALL = 4 << 10  # bytes of a body that is understood on the loop: less than a millisecond

_worker = ThreadPoolExecutor(1, "bodies")


async def aside(request: Request, work: Callable[P, Result], *args: P.args, **options: P.kwargs) -> Result:
    """What the work on a request gives. Its body must have been read (`bodies.py`)."""
    if request.state.body_bytes <= SMALL:
        return work(*args, **options)
    return await asyncio.get_running_loop().run_in_executor(_worker, lambda: work(*args, **options))
