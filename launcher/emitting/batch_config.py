"""What does a batch system have to be told of a run, besides its config?"""

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from sparse_zero.errors import InputError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Names of Kubernetes' objects; some may have dots besides.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_SECRET_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"batch.{name} is {value}: it must be at least {least}")


def _check_is(name: str, value: str | None, pattern: re.Pattern[str], remedy: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise InputError(f"batch.{name} is {value!r}: give {remedy}")


def _check_absolute(name: str, value: str) -> None:
    if not PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
        raise InputError(f"batch.{name} is {value!r}: give an absolute path without '..'")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What ``--emit slurm`` asks Slurm for. Left out: what the cluster's administrators have set."""

    # Partition, as in sbatch --partition.
    partition: str | None = None
    # Account that is charged, as in sbatch --account.
    account: str | None = None
    # Quality of service, as in sbatch --qos.
    qos: str | None = None
    # Features of nodes, in Slurm's own form: "a100&ib".
    constraint: str | None = None
    # Seconds before the time limit at which the run is told to write a checkpoint and end. Slurm is up to a minute
    # late; then a step ends, a checkpoint is written, and the launcher waits up to two minutes for that.
    signal_seconds: int = 300
    # How often a run that was ended in that way is queued again; a run that never gets to its first checkpoint would
    # be queued for ever. 0: never, not even by Slurm itself after a preemption or a lost node.
    max_requeues: int = 30
    # Copy compiled extensions (DeepSpeed's and Triton's) to every node's own disk for the time of the job: nodes that
    # build into one folder of a network file system wait for each other's locks.
    node_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos", "constraint"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise InputError(f"batch.slurm.{name} is {value!r}: leave it out, or give it a value")
        _check_at_least("slurm.signal_seconds", self.signal_seconds, 1)
        # Slurm keeps it in 16 bits.
        if self.signal_seconds > 65535:
            raise InputError(f"batch.slurm.signal_seconds is {self.signal_seconds}: Slurm takes at most 65535")
        _check_at_least("slurm.max_requeues", self.max_requeues, 0)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A persistent volume claim of Kubernetes, as pods see it."""

    # Name of the claim, which is there already.
    claim: str
    # Where it is mounted.
    path: str

    def __post_init__(self) -> None:
        _check_is("kubernetes.volumes.claim", self.claim, _OBJECT, "the name of a claim, such as training-data")
        _check_absolute("kubernetes.volumes.path", self.path)


@dataclass(frozen=True, kw_only=True)
class SecretVariable:
    """An environment variable whose value a Secret of Kubernetes holds; it never passes through here."""

    # HF_TOKEN, for one.
    variable: str
    # Name of the Secret.
    secret: str
    # Key of the value in it.
    key: str

    def __post_init__(self) -> None:
        _check_is("kubernetes.secrets.variable", self.variable, _VARIABLE, "the name of a variable, such as HF_TOKEN")
        _check_is("kubernetes.secrets.secret", self.secret, _OBJECT, "the name of a Secret, not its value")
        _check_is("kubernetes.secrets.key", self.key, _SECRET_KEY, "the key in the Secret, not its value")


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """What ``--emit kubernetes`` asks Kubernetes for."""

    # Namespace of the job and all that belongs to it; None: kubectl's.
    namespace: str | None = None
    # Volumes that every pod mounts: model, data and the run folder lie there.
    volumes: tuple[Volume, ...] = ()
    # Environment variables that come from Secrets.
    secrets: tuple[SecretVariable, ...] = ()
    # GiB of memory for /dev/shm, where ranks of a node exchange data; counted in batch.memory_gib. The container's own
    # 64 MiB are too few for NCCL.
    shared_memory_gib: int = 16
    # How often pods that ended with an error are started again, to continue from the newest checkpoint. 0: never.
    max_restarts: int = 3
    # Seconds between the wish that a pod ends (its node is drained or needed) and its being killed: the launcher waits
    # up to two minutes for a step and a checkpoint.
    grace_seconds: int = 180

    def __post_init__(self) -> None:
        _check_is("kubernetes.namespace", self.namespace, _LABEL, "lower case letters, digits and -, at most 63")
        for name, least in (("shared_memory_gib", 1), ("max_restarts", 0), ("grace_seconds", 1)):
            _check_at_least(f"kubernetes.{name}", getattr(self, name), least)
        for what, values in (
            ("volumes.path", [volume.path for volume in self.volumes]),
            ("secrets.variable", [secret.variable for secret in self.secrets]),
        ):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise InputError(f"batch.kubernetes.{what} is {twice!r} twice: remove one of them")


@dataclass(frozen=True, kw_only=True)
class FileMount:
    """Files that SkyPilot brings to every machine."""

    # A path of this machine, or a bucket: s3://..., gs://...
    source: str
    # Where it is there.
    path: str
    # Copied before the start; or a bucket that stays connected, so that what is written there outlives the machines.
    mode: Literal["copy", "mount"] = "copy"

    def __post_init__(self) -> None:
        _check_absolute("skypilot.file_mounts.path", self.path)
        if self.mode == "mount" and "://" not in self.source:
            raise InputError(
                f"batch.skypilot.file_mounts.source is {self.source!r} with mode mount: name a bucket, as in "
                "s3://runs, or choose copy"
            )


@dataclass(frozen=True, kw_only=True)
class SkypilotConfig:
    """What ``--emit skypilot`` asks SkyPilot for."""

    # Where machines may be taken: "aws/us-east-1", "k8s"; None: the cheapest that has them.
    infra: str | None = None
    # Take machines that may be taken away again; `sky jobs launch` finds others, and the run continues there.
    spot: bool = False
    # A folder of this machine that is copied to every node, where the command then starts.
    workdir: str | None = None
    # Files and buckets that every machine gets besides.
    file_mounts: tuple[FileMount, ...] = ()
    # Lines of shell that are run once on each new machine: installing. Your own script, put in as it stands.
    install: tuple[str, ...] = ()
    # Names of variables that `sky launch --secret NAME` takes from your environment. Never values.
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.secrets:
            # The value is not told: it may be the secret.
            if not _VARIABLE.fullmatch(name):
                raise InputError("batch.skypilot.secrets has an entry that is no name of a variable: write HF_TOKEN")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What a batch system is told; read by ``sparse-zero launch --emit`` only."""

    # Name of the job; None: the last part of output.folder.
    name: str | None = None
    # Minutes; None: the batch system's own limit.
    time_limit_minutes: int | None = None
    # GPUs of each rank: 1, or 0 on machines without.
    gpus_per_rank: int = 1
    # Their kind, as the batch system calls it: Slurm's type (a100), Kubernetes' label nvidia.com/gpu.product
    # (NVIDIA-A100-SXM4-80GB), SkyPilot's accelerator (A100-80GB), which cannot do without. None: any.
    gpu_type: str | None = None
    # CPU cores of each rank; None: the batch system's default.
    cpus_per_rank: int | None = None
    # GiB of memory of each node; None: the batch system's default.
    memory_gib: int | None = None
    # Container image with this package in it; needed by Kubernetes, possible with SkyPilot.
    image: str | None = None
    # Lines of shell before the run is started, in the same shell (Slurm: on the first node; SkyPilot: on each): "module
    # load cuda", ". .venv/bin/activate". Your own script, put in as it stands.
    setup: tuple[str, ...] = ()
    # Read by --emit slurm.
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    # Read by --emit kubernetes.
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    # Read by --emit skypilot.
    skypilot: SkypilotConfig = field(default_factory=SkypilotConfig)

    def __post_init__(self) -> None:
        for name in ("time_limit_minutes", "cpus_per_rank", "memory_gib"):
            _check_at_least(name, getattr(self, name), 1)
        if self.gpus_per_rank not in (0, 1):
            raise InputError(f"batch.gpus_per_rank is {self.gpus_per_rank}: a rank uses 1 GPU, or 0 without any")
        for name in ("name", "gpu_type", "image"):
            if getattr(self, name) == "":
                raise InputError(f"batch.{name} is empty: leave it out, or give it a value")
        _check_is("image", self.image, re.compile(r"[!-~]+"), "the name of an image, without spaces")
