"""What do values mean under the other placement, and do they belong to this base?"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers, parameter_name, values_name
from sparse_zero.layers.entries import in_placement
from sparse_zero.zero.config import Placement

# What stands in the place of a kind for the entries that re-selections dropped.
RETIRED = "retired"
# Of tensors that have been hashed, with torch's count of their changes: the base's entries stay what they are, and
# every checkpoint asks for their fingerprints again.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def originals_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The base's entries under the values, on the host, by the values' names."""
    return {
        values_name(name, kind): carrier.originals[kind]
        for name, carrier in carriers(model)
        for kind in carrier.values()
    }


def convert_values(
    values: Mapping[str, Tensor], originals: Mapping[str, Tensor], stored: Placement, wanted: Placement
) -> dict[str, Tensor]:
    """Values of one placement in the form of the other, in fp32: delta = inplace - base entry."""
    if stored == wanted:
        return dict(values)
    return {name: in_placement(value, originals[name], stored, wanted) for name, value in values.items()}


def _fingerprint(entries: Tensor) -> str:
    # Hashed where they lie, which leaves Python to other threads.
    return hashlib.sha256(entries.to(torch.float32).contiguous().numpy().astype("<f4", copy=False).data).hexdigest()


def fingerprints(originals: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of the base's entries of one parameter, per kind; wider floats hash alike if they hold equal numbers."""
    found = {}
    for kind, entries in originals.items():
        version, digest = _known.get(entries, (-1, ""))
        if version != entries._version:
            version, digest = entries._version, _fingerprint(entries)
            _known[entries] = (version, digest)
        found[kind] = digest
    return found


def base_entries(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """For each parameter, the base's entries under its values, per kind, and its retired ones; not to be changed."""
    found = {}
    for name, carrier in carriers(model):
        originals: dict[str, Tensor] = {str(kind): entries for kind, entries in carrier.originals.items()}
        if carrier.retired is not None:
            originals[RETIRED] = carrier.retired_originals
        found[parameter_name(name, carrier)] = originals
    return found


def model_fingerprints(model: nn.Module) -> dict[str, dict[str, str]]:
    """The fingerprints of :func:`base_entries`."""
    return {name: fingerprints(originals) for name, originals in base_entries(model).items()}


def check_base(stored: Mapping[str, Mapping[str, str]], found: Mapping[str, Mapping[str, str]], source: object) -> None:
    """Raise unless the base under the model is the one that ``source`` was trained on.

    Raises:
        InputError: names the first weight whose entries differ.
    """
    different = [name for name in stored if dict(stored[name]) != dict(found.get(name, {}))]
    if different:
        raise InputError(
            f"{source} was trained on another base: the selected entries of {different[0]} differ "
            f"({len(different)} of {len(stored)} weights do); load the base it was trained on, in a dtype as wide"
        )
