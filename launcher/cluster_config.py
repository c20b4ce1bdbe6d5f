"""On which machines does a run start, and through which launcher?"""

from dataclasses import dataclass
from typing import Literal

from sparse_zero.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How ``sparse-zero launch`` starts the worker on every rank."""

    # local and pdsh go through DeepSpeed's launcher, torchrun through torch's.
    launcher: Literal["local", "pdsh", "torchrun"] = "local"
    # Nodes; above 1 the hostfile names them (pdsh) or every node runs the command (torchrun).
    num_nodes: int = 1
    # Ranks on each node; None: every GPU of the node, or 2 ranks on a machine without GPUs.
    ranks_per_node: int | None = None
    # DeepSpeed hostfile ("name slots=8" a line); needed by pdsh.
    hostfile: str | None = None
    # Address of rank 0's rendezvous; needed by torchrun on several nodes.
    master_address: str | None = None
    # Its port. None: a free one when there is one node, so that two runs on it do not meet; 29500 across nodes, each
    # of which must know it.
    master_port: int | None = None
    # Starts anew after a rank or a node was lost, from the newest checkpoint; counted again from zero once there is a
    # newer one. 0: a loss ends the run. What a restart would meet again (wrong input, divergence) is not restarted.
    max_restarts: int = 0
    # Fewest ranks to go on with when nodes of the hostfile do not answer; None: as many as num_nodes have. The global
    # batch stays what it is at any number of ranks.
    min_world_size: int | None = None
    # Most ranks; nodes of the hostfile beyond them stand by. None: as many as num_nodes have.
    max_world_size: int | None = None
    # Seconds without a sign of life after which a node is taken for lost, and which the others' ranks are given to end
    # by themselves before they are killed.
    node_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise InputError(f"cluster.num_nodes is {self.num_nodes}: it must be at least 1")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise InputError(f"cluster.ranks_per_node is {self.ranks_per_node}: a world needs at least one rank")
        if self.master_port is not None and not 1 <= self.master_port <= 65535:
            raise InputError(f"cluster.master_port is {self.master_port}: it must lie in 1 to 65535")
        if self.max_restarts < 0:
            raise InputError(f"cluster.max_restarts is {self.max_restarts}: it must not be negative")
        for name in ("min_world_size", "max_world_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"cluster.{name} is {value}: a world needs at least one rank")
        least, most = self.min_world_size, self.max_world_size
        if least is not None and most is not None and least > most:
            raise InputError(f"cluster.min_world_size is {least}, more than cluster.max_world_size {most}: lower it")
        if self.launcher == "torchrun" and self.num_nodes > 1 and (self.max_restarts or least or most):
            raise InputError(
                f"cluster.max_restarts is {self.max_restarts}, min_world_size {least} and max_world_size {most} with "
                f"cluster.launcher torchrun and num_nodes {self.num_nodes}, where each node has a launcher of its own: "
                "use pdsh, or leave them out"
            )
        if not 1.0 <= self.node_timeout < float("inf"):
            raise InputError(f"cluster.node_timeout is {self.node_timeout}: it must be at least 1 second")
        if self.launcher == "pdsh" and self.hostfile is None:
            raise InputError("cluster.hostfile is missing: the pdsh launcher reads the nodes from it")
        if self.launcher == "local" and self.num_nodes > 1:
            raise InputError(
                f"cluster.num_nodes is {self.num_nodes} with cluster.launcher local: "
                "use pdsh or torchrun for several nodes"
            )
        if self.launcher == "torchrun" and self.num_nodes > 1 and self.master_address is None:
            raise InputError("cluster.master_address is missing: torchrun on several nodes needs rank 0's address")
