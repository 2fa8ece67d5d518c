"""Rate limits of each client: requests and tokens per minute, as token buckets, with OpenAI's headers.

A bucket holds one minute's worth and fills evenly, so a burst of a minute's worth is allowed. A request takes its
estimate of tokens (prompt and max_tokens) when it begins, and gives back what it did not use when it ends.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mpt.errors import UserError
from serving.errors import RateLimited


@dataclass(frozen=True)
class Limits:
    """What a client may ask for in a minute; None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give a whole number from 1, or leave it out for no limit")


NO_LIMITS = Limits()


class _Bucket:
    def __init__(self, limit: int, now: float) -> None:
        self.limit, self._left, self._at = limit, float(limit), now

    def left(self, now: float) -> float:
        self._left = min(self.limit, self._left + max(0.0, now - self._at) * self.limit / 60)
        self._at = now
        return self._left

    def take(self, amount: float, now: float) -> None:
        self._left = min(self.limit, self.left(now) - amount)

    def seconds_until(self, amount: float, now: float) -> float:
        return max(0.0, (amount - self.left(now)) * 60 / self.limit)


class Admission:
    """One request's share of its client's limits."""

    def __init__(self, limiter: "RateLimiter", buckets: dict[str, _Bucket]) -> None:
        self._limiter, self._buckets, self._reserved = limiter, buckets, 0

    def reserve(self, n_tokens: int) -> None:
        """Take the tokens a request may come to. Raises RateLimited."""
        self._limiter.take(self._buckets, "tokens", n_tokens)
        self._reserved = n_tokens

    def settle(self, n_tokens: int) -> None:
        """Correct what was reserved to what was used."""
        bucket = self._buckets.get("tokens")
        if bucket is not None:
            bucket.take(n_tokens - self._reserved, self._limiter.clock())
            self._reserved = n_tokens

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-limit|remaining|reset-requests|tokens`, of the limits there are."""
        now = self._limiter.clock()
        found: dict[str, str] = {}
        for kind, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.left(now))))
            found[f"x-ratelimit-reset-{kind}"] = _duration(bucket.seconds_until(bucket.limit, now))
        return found


class RateLimiter:
    """Every client's buckets; as many as there are keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._clients: dict[tuple[str, Limits], dict[str, _Bucket]] = {}
        self._lock = threading.Lock()

    def admit(self, salt: str, limits: Limits) -> Admission:
        """Count one request of a client. Raises RateLimited."""
        with self._lock:
            buckets = self._clients.get((salt, limits))
            if buckets is None:
                now = self.clock()
                wanted = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
                buckets = {kind: _Bucket(limit, now) for kind, limit in wanted.items() if limit is not None}
                self._clients[salt, limits] = buckets
        self.take(buckets, "requests", 1)
        return Admission(self, buckets)

    def take(self, buckets: dict[str, _Bucket], kind: str, amount: int) -> None:
        bucket = buckets.get(kind)
        if bucket is None:
            return
        now = self.clock()
        headers = Admission(self, buckets).headers()
        if amount > bucket.limit:
            headers["x-should-retry"] = "false"
            raise RateLimited(
                f"the request may come to {amount} {kind}, over your limit of {bucket.limit} a minute; "
                "lower max_tokens or shorten the prompt",
                kind,
                headers,
            )
        wait_s = bucket.seconds_until(amount, now)
        if wait_s > 0:
            headers["retry-after"] = str(math.ceil(wait_s))
            raise RateLimited(
                f"over your limit of {bucket.limit} {kind} a minute; try again in {math.ceil(wait_s)} s", kind, headers
            )
        bucket.take(amount, now)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.2s, 12ms."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{round(rest)}s" if minutes else f"{rest:.3g}s"
