"""How a token is drawn, as a request says it. `mpt/sampling.py` does it."""

from dataclasses import dataclass, field
from typing import Any


def asked_over_http(default: Any, **limits: float) -> Any:
    """A field of a dataclass that requests may set, within these limits (ge, gt, le, lt of pydantic's Field)."""
    return field(default=default, metadata={"http": limits})


@dataclass(frozen=True, kw_only=True)
class DrawParameters:
    """How a token is drawn from its logits, declared here for Python, C and HTTP.

    Each field is a column of `sample`, a number of draw.c's `Wish` under the same name, and a field of OpenAI's bodies.
    """

    temperature: float = asked_over_http(1.0, ge=0, le=2)  # 0 is greedy
    top_p: float = asked_over_http(1.0, ge=0, le=1)
    top_k: int = asked_over_http(0, ge=-1)  # 0 and -1 are off
    min_p: float = asked_over_http(0.0, ge=0, le=1)
