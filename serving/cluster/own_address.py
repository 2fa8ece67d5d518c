"""Where Ray lets a replica of ours be called: on this machine only, where the Ray is this machine's."""

import ray
from ray.serve._private import replica as ray_replica


def stay_on_this_machine() -> None:
    """Have Ray bind the port over which a replica is called to the node's address where that is loopback."""
    if (address := ray.util.get_node_ip_address()) == "127.0.0.1":
        bind = ray_replica.add_port_to_grpc_server
        ray_replica.add_port_to_grpc_server = lambda server, where: bind(server, where.replace("[::]", address))
