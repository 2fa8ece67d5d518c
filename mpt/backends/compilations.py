"""Counts what is compiled and captured, where it happens and for the thread that waits for it.

A server should have compiled all that requests can need before it says that it is ready: a kernel takes a second, and
every stream of the step waits. The engine counts what its own thread still had to wait for (`/metrics`).

Kinds: `triton`, a kernel of ours for another shape; `torch.compile`, FlexAttention for another shape; `graph`, a CUDA
graph. Not here: what is compiled beforehand (`paged_backend.py`), which graphs there are (`graphs.py`).
"""

import functools
import logging
import threading
from collections import Counter
from typing import Any, Literal

log = logging.getLogger(__name__)

Kind = Literal["triton", "torch.compile", "graph"]
KINDS: tuple[Kind, ...] = ("triton", "torch.compile", "graph")


class _Counts(threading.local):
    def __init__(self) -> None:
        self.n: Counter[Kind] = Counter()


_counts = _Counts()


def of_this_thread() -> Counter[Kind]:
    """How many of each kind this thread has waited for since it began."""
    return Counter(_counts.n)


def count(kind: Kind, what: str) -> None:
    """Note one that is about to be made in this thread."""
    _counts.n[kind] += 1
    log.debug("%s: %s", kind, what)


@functools.cache
def watch() -> None:
    """From now on count what Triton and torch.compile make in this process. Imports both, which takes seconds."""
    import torch._dynamo

    torch._dynamo.callback_handler.register_start_callback(lambda args: count("torch.compile", str(args.compile_id)))
    try:
        from triton import knobs
    except ImportError:
        return
    before = knobs.runtime.jit_post_compile_hook

    def compiled(*args: Any, **details: Any) -> Any:
        count("triton", str(details.get("repr")))
        return None if before is None else before(*args, **details)

    knobs.runtime.jit_post_compile_hook = compiled
