"""On which machines does a run start, and through which launcher?"""

import re
from dataclasses import dataclass
from typing import Literal

from launcher.starting.exported import check_exported_lines
from sparse_zero.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How ``sparse-zero launch`` starts the worker on every rank."""

    # All but torchrun go through DeepSpeed's launcher, which starts pdsh, mpirun or srun for other nodes; torchrun
    # through torch's.
    launcher: Literal["local", "pdsh", "openmpi", "mpich", "slurm", "torchrun"] = "local"
    # Nodes that the run is to have: the first of those that are named or (slurm) allocated; with torchrun as many as
    # run the command.
    num_nodes: int = 1
    # Ranks on each node; None: as many as the node has slots, or every GPU of it; 2 on a machine without GPUs. With
    # slurm: the job's tasks on each node; where that is one, or not said, the GPUs that the job has there.
    ranks_per_node: int | None = None
    # DeepSpeed hostfile ("name slots=8" a line); pdsh, openmpi and mpich need it, or hosts.
    hostfile: str | None = None
    # The same lines here, instead of a file.
    hosts: tuple[str, ...] = ()
    # Nodes to take only, by their names in the hostfile; empty: all.
    include: tuple[str, ...] = ()
    # Nodes to leave out, by the same names.
    exclude: tuple[str, ...] = ()
    # Port of ssh on all nodes; None: what ssh's own configuration says.
    ssh_port: int | None = None
    # User of ssh on all nodes; None: likewise.
    ssh_user: str | None = None
    # Network interface between nodes, for NCCL, gloo and MPI; None: they choose.
    network_interface: str | None = None
    # Variables for every rank: NAME, as it is set here, or NAME=value. Those of NCCL, gloo, UCX, OpenMP, Hugging Face
    # and DeepSpeed are passed on without being named. A secret is named without its value: the config is saved.
    export: tuple[str, ...] = ()
    # A file of such lines.
    export_file: str | None = None
    # Arguments more for pdsh, mpirun or srun.
    launcher_arguments: tuple[str, ...] = ()
    # Bind each rank to cores of its own.
    bind_to_core: bool = False
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
    # Seconds without a micro-batch of training, or a batch of calibration, on any rank after which the run is taken to
    # hang: stacks of all ranks are logged, it is ended, and max_restarts counts it. Loading, evaluating and saving are
    # not timed. Longer than the slowest micro-batch; shorter than the 10 minutes of NCCL, whose error is heard of first
    # otherwise, and names a rank that waited. None: never.
    hang_timeout: float | None = 540.0
    # Look on every node for what would keep the run from starting, as `sparse-zero doctor` does, before a rank starts:
    # about a second. False: the ranks find it out.
    preflight: bool = True

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
        if self.hang_timeout is not None and not 1.0 <= self.hang_timeout < float("inf"):
            raise InputError(
                f"cluster.hang_timeout is {self.hang_timeout}: it must be at least 1 second; null waits forever"
            )
        if self.names_nodes and self.hostfile is None and not self.hosts:
            raise InputError(f"cluster.hostfile is missing: the {self.launcher} launcher reads the nodes from it")
        if self.hostfile is not None and self.hosts:
            raise InputError(f"cluster.hostfile is {self.hostfile} and cluster.hosts names nodes, too: leave out one")
        if self.launcher == "local" and self.num_nodes > 1:
            raise InputError(
                f"cluster.num_nodes is {self.num_nodes} with cluster.launcher local: "
                "use pdsh, openmpi, mpich, slurm or torchrun for several nodes"
            )
        self._check_reaching()
        check_exported_lines(self.export)
        if self.launcher == "torchrun" and self.num_nodes > 1 and self.master_address is None:
            raise InputError("cluster.master_address is missing: torchrun on several nodes needs rank 0's address")

    def _check_reaching(self) -> None:
        """Refuse what belongs to another launcher, or is no name of a user or an interface."""
        others = () if self.names_nodes else ("hostfile", "hosts", "include", "exclude", "ssh_port", "ssh_user")
        for name in (*others, *(() if self.reaches_nodes else ("launcher_arguments",))):
            if getattr(self, name):
                remedy = "give it to sbatch or salloc" if self.launcher == "slurm" else "use pdsh, openmpi or mpich"
                raise InputError(
                    f"cluster.{name} is set, and cluster.launcher {self.launcher} does not choose or reach nodes: "
                    f"leave it out, or {remedy}"
                )
        if self.launcher == "local" and self.master_address is not None:
            raise InputError(
                f"cluster.master_address is {self.master_address} with cluster.launcher local, whose ranks meet on "
                "this machine: leave it out, or use torchrun, pdsh, openmpi or mpich for several nodes"
            )
        if self.bind_to_core and self.launcher in ("pdsh", "torchrun"):
            raise InputError(
                f"cluster.bind_to_core is true, which the {self.launcher} launcher cannot do: use local, openmpi, "
                "mpich or slurm, or leave it out"
            )
        if self.ssh_port is not None and not 1 <= self.ssh_port <= 65535:
            raise InputError(f"cluster.ssh_port is {self.ssh_port}: it must lie in 1 to 65535")
        for name, remedy in (
            ("ssh_user", "the name of a user"),
            ("network_interface", "a name such as eth0"),
            ("master_address", "a name or an address"),
        ):
            value = getattr(self, name)
            # They become part of command lines of ssh, pdsh and mpirun.
            if value is not None and not re.fullmatch(r"[A-Za-z0-9_:][A-Za-z0-9_.:@-]*", value):
                raise InputError(f"cluster.{name} is {value!r}: give {remedy}")

    @property
    def names_nodes(self) -> bool:
        """Whether the config says on which nodes ranks start."""
        return self.launcher in ("pdsh", "openmpi", "mpich")

    @property
    def reaches_nodes(self) -> bool:
        """Whether one command starts the ranks of all nodes."""
        return self.names_nodes or self.launcher == "slurm"
