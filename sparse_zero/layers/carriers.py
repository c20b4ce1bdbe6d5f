"""Which modules of a sparse model carry values, and what are their values and parameters called?"""

from collections.abc import Iterator

from torch import nn

from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparse_parameter import SparseParameter
from sparse_zero.module_map import VALUES_PREFIX
from sparse_zero.selection.config import Kind

# What has values: a swapped linear, or a parameter on the hook path.
Carrier = SparseLinear | SparseParameter


def carriers(model: nn.Module) -> Iterator[tuple[str, Carrier]]:
    """Every carrier of values in the model, by module name, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear | SparseParameter):
            yield name, module


def parameter_name(name: str, carrier: Carrier) -> str:
    """Fully qualified name of the parameter that the carrier of this module name belongs to."""
    module = name if isinstance(carrier, SparseLinear) else name.rpartition(".")[0]
    return f"{module}.{carrier.attribute}" if module else carrier.attribute


def values_name(name: str, kind: Kind) -> str:
    """Fully qualified name of the values of ``kind`` that the carrier of this module name has."""
    return f"{name}.{VALUES_PREFIX}{kind}"


def split_weight_name(weight: str) -> tuple[str, int | None]:
    """(parameter, number in a stack or None) of a matrix in a selection: the inverse of ``weight_name``."""
    parameter, bracket, number = weight.partition("[")
    return parameter, int(number.removesuffix("]")) if bracket else None
