"""Run a Ray cluster of three nodes with a CPU each until standard input ends; a line on it removes a node.

Print the address when the cluster is ready, and a line when a node is gone.
"""

import socket
import sys
from contextlib import ExitStack

from ray.cluster_utils import Cluster

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def make_node() -> dict[str, int]:
    """Return the settings of a node.

    Its ports are chosen here: a node that must wait for its agents to choose them gives up after 15 seconds.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in PORTS]
        ports = {name: server.getsockname()[1] for name, server in zip(PORTS, sockets, strict=True)}
    return {"num_cpus": 1, "object_store_memory": 80 << 20, **ports}


cluster = Cluster()
cluster.add_node(include_dashboard=False, **make_node())
for _ in range(2):
    cluster.add_node(wait=False, **make_node())
cluster.wait_for_nodes(timeout=200)
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
