"""What the routers of an application go by, in a replica of its own: the `args` of the Serve config.

A router that Ray Serve reconfigured itself (`user_config`) would be out of HAProxy's list meanwhile, and the only one
there is leaves HAProxy without any: with Ray 2.60, six of eight requests of that moment never got an answer. So the
one that is reconfigured is this, which answers nobody but the routers.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from serving.cluster.own_address import stay_on_this_machine

_ASK_AGAIN_S = 10.0  # an answer at the latest: a call that never ends would hold up the end of this replica


def digest_of(args: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(args, sort_keys=True).encode()).hexdigest()[:16]


class Settings:
    """Keeps the `args`, and tells routers when they are others."""

    def __init__(self) -> None:
        stay_on_this_machine()
        self._args: dict[str, Any] = {}
        self._changed = asyncio.Condition()

    async def reconfigure(self, args: dict[str, Any]) -> None:
        """Called by Ray Serve before the first call and whenever the application is deployed with other `args`."""
        async with self._changed:
            self._args = args
            self._changed.notify_all()

    async def args(self, known: str) -> dict[str, Any]:
        """The `args`, as soon as their digest is not `known`; those that are known after some seconds."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: digest_of(self._args) != known), _ASK_AGAIN_S)
            return self._args
