"""With which settings does DeepSpeed hold little more than training a selection (or adapters, or all) needs?"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparse_zero.module_map import VALUES_PREFIX, parameter_shape
from sparse_zero.zero.compat import full_numel


def _sizes(model: nn.Module) -> tuple[list[int], list[int], int]:
    """Entries of each matrix (or stack of them) and vector of the base, ascending, and of all that is trained.

    What is trained beside a larger frozen base (values, adapters) is no part of the base; a base that is trained is.
    """
    parameters = dict(model.named_parameters())
    trained = {name for name in parameters if name.rpartition(".")[2].startswith(VALUES_PREFIX)}
    beside = trained
    if not trained:
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        num_trained = sum(full_numel(parameters[name]) for name in trained)
        total = sum(full_numel(parameter) for parameter in parameters.values())
        beside = trained if 2 * num_trained < total else set()
    matrices: list[int] = []
    vectors: list[int] = []
    for name, parameter in parameters.items():
        if name not in beside:
            (matrices if len(parameter_shape(parameter)) > 1 else vectors).append(full_numel(parameter))
    return sorted(matrices), sorted(vectors), sum(full_numel(parameters[name]) for name in trained)


def overlaps(section: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed reduces gradients of stage 1 or 2 on a stream of their own, from two buckets in turn."""
    return section.get("overlap_comm") is True and int(section.get("stage", 0)) in (1, 2)


def bucket_size(num_trained: int, *, overlapping: bool = False) -> dict[str, int]:
    """``reduce_bucket_size``: room for the gradients of so many entries, which are all that is trained.

    DeepSpeed's own is 5e8 entries, which it allocates in one piece, on a GPU a gigabyte in bf16. A bucket is reduced
    when it is full, so that one for all is reduced after backward, which is no loss where all is little.

    Args:
        num_trained: entries.
        overlapping: see :func:`overlaps`: then it is a quarter, of which three are reduced while backward goes on; the
            two buckets together have half of the room.
    """
    # More than there are: each parameter is padded to a multiple of the ranks.
    wanted = num_trained + num_trained // 100
    return {"reduce_bucket_size": min((wanted // 4 if overlapping else wanted) + 65_536, 500_000_000)}


def stage3_sizes(matrices: Sequence[int], vectors: Sequence[int]) -> dict[str, int]:
    """Settings of DeepSpeed's ``zero_optimization`` with which stage 3 gathers no more at once than it must.

    DeepSpeed's own are for models of many billions: on smaller ones nothing that forward has gathered is given back
    before backward needs it again, so that every rank ends up with the whole base beside its shards. Here every weight
    is gathered for forward and once more for backward, which is twice the traffic.

    Args:
        matrices: entries of each matrix of the base, ascending.
        vectors: entries of each of its vectors.

    Returns:
        Entries of parameters: ``stage3_prefetch_bucket_size`` (the median matrix: about one ahead of the one in use),
        ``stage3_max_live_parameters`` (the largest parameter, and two matrices), ``stage3_max_reuse_distance`` (one
        matrix: what forward ends with and backward begins with stays), and ``stage3_param_persistence_threshold`` (the
        largest vector: norms and biases stay whole). None is above DeepSpeed's own default.
    """
    matrix = matrices[len(matrices) // 2] if matrices else 0
    largest = max([*matrices[-1:], *vectors], default=0)
    return {
        "stage3_prefetch_bucket_size": min(matrix, 50_000_000),
        "stage3_max_live_parameters": min(largest + 2 * matrix, 1_000_000_000),
        "stage3_max_reuse_distance": min(matrix, 1_000_000_000),
        "stage3_param_persistence_threshold": min(max(vectors, default=0), 100_000),
    }


def bucket_default(model: nn.Module, *, overlapping: bool = False) -> dict[str, int]:
    """:func:`bucket_size` of a model: sparsified, plain or with adapters, whole or sharded."""
    return bucket_size(_sizes(model)[2], overlapping=overlapping)


def stage3_defaults(model: nn.Module) -> dict[str, int]:
    """:func:`stage3_sizes` of a model: sparsified, plain or with adapters, whole or sharded."""
    matrices, vectors, _ = _sizes(model)
    return stage3_sizes(matrices, vectors)


def with_defaults(model: nn.Module, section: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization`` with these defaults for what it leaves open, or says "auto" to.

    Args:
        model: sparsified or plain or with adapters, whole or sharded.
        section: as the user gives it; it is not changed, and what it sets stays.
    """
    stage, found = int(section.get("stage", 0)), dict(section)
    defaults = bucket_default(model, overlapping=overlaps(section)) if stage else {}
    if stage == 3:
        defaults |= stage3_defaults(model)
    for name, value in defaults.items():
        # DeepSpeed takes both names.
        given = [each for each in (name, name.removeprefix("stage3_")) if each in found]
        if all(found[each] == "auto" for each in given):
            for each in given:
                found.pop(each, None)
            found[name] = value
    return found
