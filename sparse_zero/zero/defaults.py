"""With which settings does DeepSpeed hold little more than training a selection needs?"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_zero.module_map import VALUES_PREFIX, parameter_shape
from sparse_zero.zero.compat import full_numel


def _sizes(model: nn.Module) -> tuple[list[int], list[int], int]:
    """Entries of each matrix (or stack of them) and vector of the base, ascending, and of all values together."""
    matrices: list[int] = []
    vectors: list[int] = []
    trained = 0
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith(VALUES_PREFIX):
            trained += full_numel(parameter)
        else:
            (matrices if len(parameter_shape(parameter)) > 1 else vectors).append(full_numel(parameter))
    return sorted(matrices), sorted(vectors), trained


def bucket_default(model: nn.Module) -> dict[str, int]:
    """``reduce_bucket_size``: room for the gradients of all values.

    DeepSpeed's own is 5e8 entries, which it allocates in one piece, on a GPU a gigabyte in bf16.
    """
    trained = _sizes(model)[2]
    # More than there are: each of the values is padded to a multiple of the ranks.
    return {"reduce_bucket_size": min(trained + trained // 100 + 65_536, 500_000_000)}


def stage3_defaults(model: nn.Module) -> dict[str, int]:
    """Settings of DeepSpeed's ``zero_optimization`` with which stage 3 gathers no more at once than it must.

    DeepSpeed's own are for models of many billions: on smaller ones nothing that forward has gathered is given back
    before backward needs it again, so that every rank ends up with the whole base beside its shards. Here every weight
    is gathered for forward and once more for backward, which is twice the traffic.

    Args:
        model: sparsified or plain, whole or sharded.

    Returns:
        Entries of parameters: ``stage3_prefetch_bucket_size`` (the median matrix: about one ahead of the one in use),
        ``stage3_max_live_parameters`` (the largest parameter, and two matrices), ``stage3_max_reuse_distance`` (one
        matrix: what forward ends with and backward begins with stays), and ``stage3_param_persistence_threshold`` (the
        largest vector: norms and biases stay whole). None is above DeepSpeed's own default.
    """
    matrices, vectors, _ = _sizes(model)
    matrix = matrices[len(matrices) // 2] if matrices else 0
    largest = max([*matrices[-1:], *vectors[-1:]], default=0)
    return {
        "stage3_prefetch_bucket_size": min(matrix, 50_000_000),
        "stage3_max_live_parameters": min(largest + 2 * matrix, 1_000_000_000),
        "stage3_max_reuse_distance": min(matrix, 1_000_000_000),
        "stage3_param_persistence_threshold": min(max(vectors, default=0), 100_000),
    }


def with_defaults(model: nn.Module, section: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization`` with these defaults for what it leaves open, or says "auto" to.

    Args:
        model: sparsified or plain, whole or sharded.
        section: as the user gives it; it is not changed, and what it sets stays.
    """
    stage, found = int(section.get("stage", 0)), dict(section)
    defaults = {**(bucket_default(model) if stage else {}), **(stage3_defaults(model) if stage == 3 else {})}
    for name, value in defaults.items():
        # DeepSpeed takes both names.
        given = [each for each in (name, name.removeprefix("stage3_")) if each in found]
        if all(found[each] == "auto" for each in given):
            for each in given:
                found.pop(each, None)
            found[name] = value
    return found
