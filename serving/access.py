"""Which models the client of a request may use: those that its key's line in the key file names, or all.

The gate sets it for the request that it lets in; whoever finds a model by name, or lists models, asks here. So no route
and no dialect can forget to. A model that a client may not use is to it a model that is not there, as with OpenAI.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mpt.options import split_name

_models: ContextVar[frozenset[str] | None] = ContextVar("models of the client", default=None)


@contextmanager
def limited_to(models: frozenset[str] | None) -> Iterator[None]:
    """Until its end, these models are there and no others; None is all of them."""
    before = _models.set(models)
    try:
        yield
    finally:
        _models.reset(before)


def may_use(model: str) -> bool:
    """Whether a model, or an adapter by its whole name, is there for this client. A model brings all its adapters."""
    models = _models.get()
    return models is None or model in models or split_name(model)[0] in models


def may_reach(base: str) -> bool:
    """Whether a model or one of its adapters is there for this client."""
    models = _models.get()
    return models is None or any(split_name(each)[0] == base for each in models)


def reached(bases: Iterable[str]) -> list[str]:
    """Those of these models that are there for this client."""
    return [base for base in bases if may_reach(base)]
