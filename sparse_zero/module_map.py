"""What must be known of a model's family: which matrices there are, their layer, role, and shared inputs?"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Role = Literal["attention", "mlp", "head", "embedding", "other"]
# How a parameter is stored: W[out, in] as in torch.nn.Linear, or W[in, out] as in the Conv1D of GPT-2.
Layout = Literal["out_in", "in_out"]

# Projections that read the same tensor, by the last components of their names; longer groups before their parts.
_SHARED_INPUT_NAMES = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate"}),
    frozenset({"gate_proj", "up_proj"}),
)
# Components of dotted names that tell a role, besides those that contain attn, attention or embed.
_MLP_NAMES = frozenset({"mlp", "ffn", "feed_forward", "experts", "intermediate", "block_sparse_moe", "fc1", "fc2"})
_HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "embed_out", "cls", "qa_outputs"})
# Values that a sparse model registers beside the weights start with this; they are no weights themselves.
VALUES_PREFIX = "values_"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One parameter seen as a matrix W[out, in], or as a stack of them (the experts of one layer)."""

    # What module patterns match: the module's name where the parameter is its ``weight``, else the parameter's.
    name: str
    # Every (module, attribute) that holds the parameter: several where it is tied. The first one names it.
    owners: tuple[tuple[str, str], ...]
    # (out, in) of each matrix, whatever the layout in memory.
    shape: tuple[int, int]
    # Number of matrices in a 3-D parameter; None for a 2-D one.
    num_slices: int | None = None
    layout: Layout = "out_in"
    # Whether its only owner computes Y[..., out] = X[..., in] @ W.T (+ bias), so that X and Y tell the gradient.
    is_product: bool = False
    # Whether the owner is exactly an untied nn.Linear that is called, or one that bitsandbytes has quantized: a
    # SparseLinear can replace it.
    is_linear: bool = False
    # Whether the numbers in memory are not the weight's own (4-bit, 8-bit).
    is_quantized: bool = False

    @property
    def module(self) -> str:
        """Name of the first owner."""
        return self.owners[0][0]

    @property
    def parameter(self) -> str:
        """Fully qualified name of the parameter."""
        return ".".join(part for part in self.owners[0] if part)

    def view(self, stored: Tensor, slice_index: int | None) -> Tensor:
        """[out, in] view of one matrix in a tensor that is stored like the parameter (it, or its gradient)."""
        matrix = stored if slice_index is None else stored[slice_index]
        return matrix if self.layout == "out_in" else matrix.T

    def names(self) -> list[str]:
        """Everything that a module pattern may call it: by any of its owners."""
        return [_pattern_name(module, attribute) for module, attribute in self.owners]


@dataclass(frozen=True, kw_only=True)
class ModuleMap:
    """The parameters of a model that can be trained in part or as a whole, in the order of the model."""

    # Every parameter with two or three dimensions, tied ones once.
    matrices: tuple[Matrix, ...]
    # Names of the parameters with one dimension (biases, norms): trained entirely or not at all.
    vectors: tuple[str, ...] = ()
    # Groups of linears that read the very same input tensor: what backward keeps of it is kept once.
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    # Index of the decoder layer a matrix (by ``Matrix.name``) lies in; absent outside the layers.
    layer_of: Mapping[str, int]
    role_of: Mapping[str, Role]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers: one more than the highest index."""
        return 1 + max(self.layer_of.values(), default=-1)

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the modules that multiply their input with a matrix, heads included."""
        return tuple(
            name for matrix in self.matrices for name in matrix.names()
            if matrix.is_product or (len(matrix.owners) > 1 and self.role_of.get(name) == "head")
        )  # fmt: skip

    def by_parameter(self) -> dict[str, Matrix]:
        """The matrices by the fully qualified names of their parameters."""
        return {matrix.parameter: matrix for matrix in self.matrices}


def weight_name(parameter: str, number: int | None) -> str:
    """Name of a matrix in a selection: the parameter's, followed by ``[3]`` for the fourth of a stack."""
    return parameter if number is None else f"{parameter}[{number}]"


def layer_index(name: str) -> int | None:
    """The first integer component of a dotted module name: 3 for ``model.layers.3.mlp.up_proj``."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def role_from_name(name: str) -> Role:
    """Attention, MLP, head or embedding, judged by the components of a dotted module name."""
    components = name.lower().split(".")
    if any("attn" in part or "attention" in part for part in components):
        return "attention"
    # The second half of BERT's MLP is called output, beside the attention's own.
    if _MLP_NAMES.intersection(components) or (layer_index(name) is not None and "output" in components):
        return "mlp"
    if _HEAD_NAMES.intersection(components):
        return "head"
    if any("embed" in part or part in ("wte", "wpe") for part in components):
        return "embedding"
    return "other"


def parameter_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 holds it in shards."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _pattern_name(module: str, attribute: str) -> str:
    return module if attribute == "weight" and module else ".".join(part for part in (module, attribute) if part)


def _owners(model: nn.Module) -> dict[int, list[tuple[str, str, nn.Module, nn.Parameter]]]:
    """By identity of each parameter: the modules and attributes that hold it, in the order of the model."""
    found: dict[int, list[tuple[str, str, nn.Module, nn.Parameter]]] = defaultdict(list)
    for name, module in model.named_modules():
        # Recurrent layers read their parameters from a list of their own, which none can be put into.
        if isinstance(module, nn.RNNBase):
            continue
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not attribute.startswith(VALUES_PREFIX):
                found[id(parameter)].append((name, attribute, module, parameter))
    return found


def _is_stored_transposed(module: nn.Module, stored: tuple[int, ...]) -> bool:
    """Whether a stack of experts has its matrices as [in, out]."""
    if len(stored) != 3:
        return False
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None:
        return False
    # [hidden, 2 x intermediate] and [intermediate, hidden]: the other way round these sides do not fit.
    (*_, up_first, up_last), (*_, down_first, down_last) = parameter_shape(up), parameter_shape(down)
    return up_first == down_last and up_last == 2 * down_first


def _is_quantized(parameter: nn.Parameter) -> bool:
    """Whether the numbers in memory are codes: integers, or floats of one byte that a scale belongs to."""
    # Those of bitsandbytes become codes when they are moved to their device.
    will_be = type(parameter).__module__.partition(".")[0] == "bitsandbytes"
    return will_be or not parameter.is_floating_point() or parameter.element_size() < 2


def _read_by_kernels(model: nn.Module) -> set[str]:
    """Names of the linears whose weights another module hands to functions: those of a state-space mixer."""
    mixers = (name for name, module in model.named_modules() if "A_log" in module._parameters)
    return {f"{name}.{child}" for name in mixers for child, _ in model.get_submodule(name).named_children()}


def _as_matrix(places: list[tuple[str, str, nn.Module, nn.Parameter]], read_by_kernels: set[str]) -> Matrix | None:
    from sparse_zero.layers.quantized import is_quantized_by_bitsandbytes
    from sparse_zero.layers.quantized_linear import QuantizedLinear
    from sparse_zero.layers.sparse_linear import SparseLinear

    name, attribute, module, parameter = places[0]
    stored = parameter_shape(parameter)
    single = len(places) == 1
    # A module whose parameters are read through values has a class derived from its own.
    plain = getattr(type(module), "_plain_class", type(module))
    # The names of classes, for neither transformers nor bitsandbytes is imported here.
    is_conv1d = attribute == "weight" and type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    is_of_linear = attribute == "weight" and isinstance(module, nn.Linear | QuantizedLinear | SparseLinear)
    is_quantized = _is_quantized(parameter)
    layout: Layout = "in_out" if is_conv1d or _is_stored_transposed(module, stored) else "out_in"
    if is_of_linear:
        features = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        is_quantized = is_quantized or stored != features
        stored = features
    # A subclass of nn.Linear that computes something else (a router, say) tells no gradient by what comes out of it.
    computes_product = is_conv1d or (
        is_of_linear
        and (is_quantized or isinstance(module, SparseLinear) or plain.forward is nn.Linear.forward)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    )
    if len(stored) not in (2, 3):
        return None
    *stack, first, second = stored
    return Matrix(
        name=_pattern_name(name, attribute),
        owners=tuple((place[0], place[1]) for place in places),
        shape=(first, second) if layout == "out_in" else (second, first),
        num_slices=stack[0] if stack else None,
        layout=layout,
        is_product=single and computes_product and name not in read_by_kernels,
        is_linear=single
        and attribute == "weight"
        and (plain is nn.Linear or plain is QuantizedLinear or is_quantized_by_bitsandbytes(module))
        and is_quantized == (plain is not nn.Linear)
        and name not in read_by_kernels,
        is_quantized=is_quantized,
    )


def default_module_map(model: nn.Module) -> ModuleMap:
    """The map that names and classes alone tell; right for Llama-like models."""
    owners, read_by_kernels = list(_owners(model).values()), _read_by_kernels(model)
    matrices = tuple(matrix for places in owners if (matrix := _as_matrix(places, read_by_kernels)) is not None)
    siblings: dict[tuple[str, int], list[str]] = defaultdict(list)
    for matrix in matrices:
        found = (
            (matrix.name.removesuffix(ending), number)
            for number, shared in enumerate(_SHARED_INPUT_NAMES)
            for ending in shared
            if f".{matrix.name}".endswith(f".{ending}")
        )
        group = next(found, None)
        if matrix.is_product and group is not None:
            siblings[group].append(matrix.name)
    names = [name for matrix in matrices for name in matrix.names()]
    return ModuleMap(
        matrices=matrices,
        vectors=tuple(
            ".".join(part for part in places[0][:2] if part)
            for places in owners
            if len(parameter_shape(places[0][3])) == 1
        ),
        shared_inputs=tuple(tuple(group) for group in siblings.values() if len(group) > 1),
        layer_of={name: index for name in names if (index := layer_index(name)) is not None},
        role_of={name: role_from_name(name) for name in names},
    )
