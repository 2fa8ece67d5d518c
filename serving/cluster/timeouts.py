"""How long each part of a cluster waits for running answers when something leaves, as one chain.

Every link outlasts the one inside it, or it would cut what that one still waits for. `mpt cluster` takes its values
from here, `serve deploy` those of its deployments; the manifests of k8s/ and the table in docs/operations.md are
checked against it. All values are in seconds.
"""

import math
from dataclasses import dataclass
from typing import Self

from serving.cluster.options import ClusterOptions

HEALTH_CHECK_S = 5  # between two looks of Ray at a replica
PRE_STOP_S = 10  # of a pod: until Services and gateways have stopped sending to it
REPLACEMENT_S = 120  # a draining node's replicas have so long to become ready elsewhere before they refuse requests
HEAD_S = 120  # of Ray's head, which keeps no replica and is never idle: for workers that end with it
_DEREGISTER_S = {"loopback": 3, "node": 30}  # a router that leaves is reached so long; 30 is Ray's, for balancers
_MARGIN_S = 20  # for what follows the last answer: sockets, processes, the next look of Ray's controller
_NODE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"  # read by `ray start --block` when it gets SIGTERM; 30 otherwise


@dataclass(frozen=True)
class Timeouts:
    """The chain, from the inside outwards."""

    replica_s: int  # the longest `graceful_shutdown_timeout_s` of a model: its last answers
    router_s: int  # a router, which passes them on
    haproxy_s: int  # a HAProxy that was replaced, whose router may live on: also the longest request
    node_s: int  # a Ray node
    pod_s: int  # a pod, `terminationGracePeriodSeconds`
    deletion_s: int  # the old cluster after an upgrade, `rayClusterDeletionDelaySeconds`
    deregister_s: int

    @classmethod
    def of(cls, options: ClusterOptions) -> Self:
        deregister_s = _DEREGISTER_S[options.replica_host]
        replica_s = math.ceil(max(model.graceful_shutdown_timeout_s for model in options.models.values()))
        router_s = deregister_s + replica_s + _MARGIN_S
        haproxy_s = max(router_s, math.ceil(options.request_timeout_s)) + _MARGIN_S
        # Ray stops a draining node's replica when a replacement is ready, or when its own time-out before the node's.
        node_s = REPLACEMENT_S + router_s + _MARGIN_S
        return cls(replica_s, router_s, haproxy_s, node_s, PRE_STOP_S + node_s + _MARGIN_S, haproxy_s, deregister_s)

    def environment(self) -> dict[str, str]:
        """What Ray's processes read when they start, on every node."""
        return {
            _NODE: str(self.node_s),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(self.haproxy_s),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(self.deregister_s),
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": str(self.deregister_s),
        }
