"""Which manifest runs a config on Kubernetes, through Kubeflow's operators?

What runs is `sparse-zero launch` with the config of a ConfigMap: under the training operator (PyTorchJob) one in each
pod, which meet at the address that the operator tells; under the MPI operator (MPIJob) one in the launcher's pod, which
reaches the others over ssh.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from launcher.config import RunConfig, resolved_yaml
from launcher.emitting.batch_config import KubernetesConfig
from launcher.emitting.job import check_exported, host_name, is_below, ranks_per_node
from launcher.yaml_files import dump_yaml
from sparse_zero.errors import InputError

_CONFIG_FOLDER, _CONFIG_NAME = "/etc/sparse_zero", "run.yaml"
# Where the MPI operator tells the launcher which pods there are.
_HOSTFILE = "/etc/mpi/hostfile"
# As the training operator wants its container called.
_CONTAINER = "pytorch"
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def kubernetes_manifest(config: RunConfig) -> str:
    """The text of a manifest for ``kubectl apply``: a ConfigMap and the job that reads it.

    Raises:
        InputError: the config is for another launcher, says too little, or names what pods do not have.
    """
    cluster, batch, kubernetes = config.cluster, config.batch, config.batch.kubernetes
    if cluster.launcher not in ("torchrun", "openmpi", "mpich"):
        raise InputError(
            f"cluster.launcher is {cluster.launcher}, which no operator of Kubernetes starts: use torchrun "
            "(PyTorchJob), or openmpi or mpich (MPIJob)"
        )
    if batch.image is None:
        raise InputError("batch.image is missing: pods are made of a container image with this package in it")
    _check_places(config)
    name = host_name(config)
    job = _pytorch_job(config, name) if cluster.launcher == "torchrun" else _mpi_job(config, name)
    files = {_CONFIG_NAME: resolved_yaml(_config_of_pods(config, name))}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(name, kubernetes), "data": files}
    notes = ["Written by `sparse-zero launch --emit kubernetes`; start it with kubectl apply -f."]
    if batch.setup:
        notes.append("Not said here: batch.setup; the image has what is needed.")
    documents = [dump_yaml(document, blocks=True) for document in (config_map, job)]
    return "".join(f"# {note}\n" for note in notes) + "---\n".join(documents)


def _check_places(config: RunConfig) -> None:
    cluster, batch, kubernetes = config.cluster, config.batch, config.batch.kubernetes
    volumes = [volume.path for volume in kubernetes.volumes]
    if not is_below(config.output.folder, volumes):
        raise InputError(
            f"output.folder is {config.output.folder}, which is lost with the pods: name a folder below the path of "
            "one of batch.kubernetes.volumes"
        )
    if cluster.names_nodes and (cluster.hostfile != _HOSTFILE or cluster.include or cluster.exclude):
        raise InputError(
            f"cluster.hostfile is {cluster.hostfile}, and the MPI operator chooses the pods and names them in "
            f"{_HOSTFILE}: set it to that, without hosts, include and exclude"
        )
    if batch.gpu_type is not None and not _LABEL_VALUE.fullmatch(batch.gpu_type):
        raise InputError(
            f"batch.gpu_type is {batch.gpu_type!r}, which no label of a node can be: give what kubectl shows as "
            "nvidia.com/gpu.product, or leave it out"
        )
    if batch.memory_gib is not None and kubernetes.shared_memory_gib >= batch.memory_gib:
        raise InputError(
            f"batch.kubernetes.shared_memory_gib is {kubernetes.shared_memory_gib} and batch.memory_gib is "
            f"{batch.memory_gib}, in which it counts: lower the one or raise the other"
        )
    check_exported(config, [each.variable for each in kubernetes.secrets], "batch.kubernetes.secrets", volumes)


def _config_of_pods(config: RunConfig, name: str) -> RunConfig:
    """The config with what the operators decide, and the variables that only the launcher's pod has."""
    cluster = config.cluster
    if cluster.names_nodes:
        secrets = [secret.variable for secret in config.batch.kubernetes.secrets]
        export = (*cluster.export, *(each for each in secrets if each not in cluster.export))
        # The launcher asks the pods for their addresses.
        cluster = dataclasses.replace(cluster, export=export, master_address=None)
    else:
        cluster = dataclasses.replace(cluster, master_address=f"{name}-master-0")
    return dataclasses.replace(config, cluster=cluster)


def _metadata(name: str, kubernetes: KubernetesConfig) -> dict[str, Any]:
    # The MPI operator makes a ConfigMap of its own, called the job's name and -config.
    return {"name": f"{name}-run", **_namespace(kubernetes)}


def _namespace(kubernetes: KubernetesConfig) -> dict[str, Any]:
    return {} if kubernetes.namespace is None else {"namespace": kubernetes.namespace}


def _run_policy(config: RunConfig) -> dict[str, Any]:
    limit = config.batch.time_limit_minutes
    return {
        # The ranks of all pods end by themselves; a pod that is kept has its log.
        "cleanPodPolicy": "None",
        "backoffLimit": config.batch.kubernetes.max_restarts,
        **({} if limit is None else {"activeDeadlineSeconds": 60 * limit}),
    }


def _pytorch_job(config: RunConfig, name: str) -> dict[str, Any]:
    ranks, kubernetes = ranks_per_node(config), config.batch.kubernetes
    # Kubernetes puts the operator's values in: the port is free in a pod of its own.
    command = _launch("--cluster.master_address=$(MASTER_ADDR)", "--cluster.master_port=$(MASTER_PORT)")
    replica = {
        "restartPolicy": "OnFailure" if kubernetes.max_restarts else "Never",
        "template": _pod(config, name, container=_CONTAINER, command=command, has_ranks=True, has_secrets=True),
    }
    replicas = {"Master": {"replicas": 1, **replica}}
    if config.cluster.num_nodes > 1:
        replicas["Worker"] = {"replicas": config.cluster.num_nodes - 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, **_namespace(kubernetes)},
        "spec": {"nprocPerNode": str(ranks), "runPolicy": _run_policy(config), "pytorchReplicaSpecs": replicas},
    }


def _mpi_job(config: RunConfig, name: str) -> dict[str, Any]:
    kubernetes = config.batch.kubernetes
    launcher = {
        "replicas": 1,
        "restartPolicy": "OnFailure" if kubernetes.max_restarts else "Never",
        "template": _pod(config, name, container="launcher", command=_launch(), has_ranks=False, has_secrets=True),
    }
    # Without a command the operator has them run sshd.
    worker = {
        "replicas": config.cluster.num_nodes,
        "restartPolicy": "OnFailure" if kubernetes.max_restarts else "Never",
        "template": _pod(config, name, container="worker", command=(), has_ranks=True, has_secrets=False),
    }
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"name": name, **_namespace(kubernetes)},
        "spec": {
            "slotsPerWorker": ranks_per_node(config),
            # A start finds all its nodes, or ends.
            "launcherCreationPolicy": "WaitForWorkersReady",
            # The form of the operator's hostfile, "name slots=8", which the launcher reads with either MPI.
            "mpiImplementation": "OpenMPI",
            # Workers run sshd for ever.
            "runPolicy": {**_run_policy(config), "cleanPodPolicy": "Running"},
            "mpiReplicaSpecs": {"Launcher": launcher, "Worker": worker},
        },
    }


def _launch(*overrides: str) -> tuple[str, ...]:
    return ("sparse-zero", "launch", "--config", f"{_CONFIG_FOLDER}/{_CONFIG_NAME}", *overrides)


def _pod(
    config: RunConfig, name: str, *, container: str, command: Sequence[str], has_ranks: bool, has_secrets: bool
) -> dict[str, Any]:
    """The template of pods with one container.

    Args:
        config: the run.
        name: of the job.
        container: its name.
        command: its arguments, with the image's own interpreter; empty: the operator's.
        has_ranks: whether ranks run in it, which take GPUs and memory.
        has_secrets: whether it starts ranks, to which secrets are passed on.
    """
    batch, kubernetes = config.batch, config.batch.kubernetes
    volumes: list[dict[str, Any]] = [{"name": "run", "configMap": {"name": f"{name}-run"}}]
    mounts: list[dict[str, Any]] = [{"name": "run", "mountPath": _CONFIG_FOLDER, "readOnly": True}]
    for number, volume in enumerate(kubernetes.volumes):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": volume.path})
    described: dict[str, Any] = {"name": container, "image": batch.image}
    if command:
        described["command"] = list(command)
    if has_secrets and kubernetes.secrets:
        described["env"] = [
            {"name": each.variable, "valueFrom": {"secretKeyRef": {"name": each.secret, "key": each.key}}}
            for each in kubernetes.secrets
        ]
    spec: dict[str, Any] = {"terminationGracePeriodSeconds": kubernetes.grace_seconds}
    if has_ranks:
        memory = {"medium": "Memory", "sizeLimit": f"{kubernetes.shared_memory_gib}Gi"}
        volumes.append({"name": "shared-memory", "emptyDir": memory})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        resources = _resources(config)
        if resources:
            described["resources"] = resources
        if batch.gpu_type is not None and batch.gpus_per_rank:
            spec["nodeSelector"] = {"nvidia.com/gpu.product": batch.gpu_type}
    described["volumeMounts"] = mounts
    return {"spec": {**spec, "containers": [described], "volumes": volumes}}


def _resources(config: RunConfig) -> dict[str, Any]:
    ranks, batch = ranks_per_node(config), config.batch
    limits: dict[str, Any] = {}
    if batch.gpus_per_rank:
        limits["nvidia.com/gpu"] = str(ranks)
    if batch.memory_gib is not None:
        limits["memory"] = f"{batch.memory_gib}Gi"
    requests = {} if batch.cpus_per_rank is None else {"cpu": str(batch.cpus_per_rank * ranks)}
    return {name: value for name, value in (("limits", limits), ("requests", requests)) if value}
