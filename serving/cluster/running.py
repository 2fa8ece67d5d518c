"""Our application on the Ray of this process: deployed, changed, drained."""

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from serving.cluster.deployment import application
from serving.cluster.options import ROUTER, ReplicaOptions
from serving.cluster.settings import digest_of

_ANSWER_S = 5.0


class Running:
    """application, logging: as the Serve config says them."""

    def __init__(self, application: Mapping[str, Any], logging: Mapping[str, Any]) -> None:
        self.name = application.get("name", "mpt")
        self._route_prefix = application.get("route_prefix", "/")
        self._logging = LoggingConfig(**logging)
        self._loop = asyncio.new_event_loop()  # a handle wants one that runs until Ray has gone
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def deploy(self, args: Mapping[str, Any], leaving: Mapping[str, ReplicaOptions]) -> None:
        """Run these `args`, and models that stay besides; returns when they answer. Raises RuntimeError."""
        built = application(args, leaving)
        try:
            serve.run(built, name=self.name, route_prefix=self._route_prefix, logging_config=self._logging)
        except RayError as error:
            raise RuntimeError(str(error)) from error

    def follows(self, args: Mapping[str, Any]) -> bool:
        """Whether every router goes by these `args`."""
        try:
            return set(self._ask_routers("follows", _ANSWER_S)) == {digest_of(args)}
        except (RayError, RayServeException, TimeoutError):
            return False

    def free(self) -> dict[str, float]:
        """Ray's resources that nobody holds."""
        return dict(ray.available_resources())

    def running(self) -> set[str]:
        """The deployments that have a replica now."""
        found = serve.status().applications[self.name].deployments
        return {name for name, deployment in found.items() if deployment.replica_states.get("RUNNING")}

    def drain(self, timeout_s: float) -> None:
        """Let running answers end, for so long."""
        self._ask_routers("drain", timeout_s + 30, timeout_s)

    def _ask_routers(self, method: str, timeout_s: float, *args: object) -> list[Any]:
        async def answers() -> list[Any]:
            asked = serve.get_deployment_handle(ROUTER, self.name).broadcast(method, *args)
            return list(await asked.results_async(timeout_s=timeout_s))

        return asyncio.run_coroutine_threadsafe(answers(), self._loop).result()
