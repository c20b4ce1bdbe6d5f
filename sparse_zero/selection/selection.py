"""What was selected, over the whole model: pure data that is saved, hashed and equal on all ranks."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.fields import MAX_WHOLE, FieldError, Fields, shown
from sparse_zero.files import parse_json, read_safetensors, to_json, write_safetensors
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection

FORMAT = "sparse_zero.selection"
FORMAT_VERSION = 2
# Of a weight, and of a matrix in a stack: "m.weight", "m.experts[3]". Numbers as layers have them have a few digits.
_WEIGHT_NAME, _MAX_DIGITS = re.compile(r"[^\[\]]+(\[(0|[1-9][0-9]{0,6})\])?"), 6
# Rows or columns of a weight: the largest vocabularies have a few hundred thousand.
_MAX_SIDE = 2**26


class Selection:
    """For each weight, by fully qualified name, its chosen regions.

    Args:
        weights: weight name (``model.layers.0.self_attn.q_proj.weight``) to its regions. Weights without
            an owned entry are left out; the order is that of the names.
        metadata: how it came about (scores, budget, margin at the cut); JSON values. Not part of the digest.
    """

    def __init__(self, weights: Mapping[str, WeightSelection], metadata: Mapping[str, Any] | None = None) -> None:
        kept = {name: weights[name] for name in sorted(weights) if weights[name].num_parameters > 0}
        self.weights: Mapping[str, WeightSelection] = MappingProxyType(kept)
        self.metadata: dict[str, Any] = dict(metadata or {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return f"Selection({len(self.weights)} weights, {self.num_parameters:,} parameters, {self.digest()[:12]})"

    @property
    def num_parameters(self) -> int:
        """Trained entries, each counted once."""
        return sum(weight.num_parameters for weight in self.weights.values())

    def num_parameters_by_kind(self) -> dict[Kind, int]:
        """Trained entries owned by each kind that occurs."""
        totals: dict[Kind, int] = {}
        for kind in KINDS:
            total = sum(weight.num_parameters_by_kind().get(kind, 0) for weight in self.weights.values())
            if total:
                totals[kind] = total
        return totals

    def digest(self) -> str:
        """SHA-256 over names, shapes and indices: equal exactly when the same regions are chosen.

        Regions of another kind or size that cover the same entries have another digest.
        """
        sha = hashlib.sha256()
        for name, weight in self.weights.items():
            header = [name, *weight.shape, *weight.block_shape, *(weight.num_regions(kind) for kind in KINDS)]
            sha.update(json.dumps(header).encode())
            for indices in (weight.blocks, weight.rows, weight.columns):
                sha.update(indices.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: int32 indices, and a JSON header of shapes and metadata."""
        tensors = {}
        header: dict[str, Any] = {"version": FORMAT_VERSION, "weights": {}, "metadata": self.metadata}
        for name, weight in self.weights.items():
            header["weights"][name] = {
                "shape": list(weight.shape),
                "block_shape": list(weight.block_shape),
                "whole": weight.whole,
            }
            for part in ("blocks", "rows", "columns"):
                indices = getattr(weight, part)
                if len(indices):
                    tensors[f"{name}/{part}"] = indices.to(torch.int32)
        header["digest"] = self.digest()
        write_safetensors(Path(path), tensors, {"format": FORMAT, "header": to_json(header)})

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: not such a file, cut off, of another version, with a header that is incomplete or does not fit
                its indices, or not matching its own digest.
        """
        path = Path(path)
        tensors, file_metadata = read_safetensors(path, FORMAT)
        try:
            header = Fields(parse_json(file_metadata.get("header", ""), strict=True), "the header")
            version = header.whole("version")
            if version != FORMAT_VERSION:
                remedy = "update sparse-zero" if version > FORMAT_VERSION else "select again"
                raise InputError(
                    f"{path} has selection format version {version}, and this is for {FORMAT_VERSION}: {remedy}"
                )
            digest = header.sha256("digest")
            weights = {name: _weight(name, entry, tensors) for name, entry in header.mapping("weights").items()}
            metadata = _checked_metadata(header.mapping("metadata"))
            header.end()
            if tensors:
                raise FieldError(f"there are indices {shown(next(iter(tensors)))}, which no weight has")
            selection = cls(weights, metadata)
            if len(selection.weights) != len(weights):
                raise FieldError("there is a weight without entries of its own")
        except InputError as error:
            if str(path) in str(error):
                raise
            raise InputError(f"{path} has a header that cannot be read ({error}): select again") from error
        except ValueError as error:
            raise InputError(f"{path} has a header that cannot be read ({error}): select again") from error
        if selection.digest() != digest:
            raise InputError(f"{path} does not match its own digest: the file was changed; select again")
        return selection


def _weight(name: str, content: Any, tensors: dict[str, Tensor]) -> WeightSelection:
    """One weight from its part of the header and its indices, which are taken out of ``tensors``.

    Everything is checked before anything of the size of the weight is made.
    """
    if not _WEIGHT_NAME.fullmatch(name) or any(
        len(part) > _MAX_DIGITS and part.isdecimal() for part in name.split(".")
    ):
        raise FieldError(f"{shown(name)} is no name of a weight")
    where = f"the weight {shown(name)}"
    entry = Fields(content, where)
    shape = entry.wholes("shape", 2, 1, _MAX_SIDE)
    block_shape = entry.wholes("block_shape", 2, 0, _MAX_SIDE)
    whole = entry.flag("whole")
    entry.end()
    found: dict[str, Tensor] = {}
    for part, width in (("blocks", 2), ("rows", None), ("columns", None)):
        indices = tensors.pop(f"{name}/{part}", None)
        if indices is None:
            continue
        is_list = indices.dim() == 2 and indices.shape[1] == 2 if width else indices.dim() == 1
        if not is_list or indices.dtype not in (torch.int32, torch.int64) or not indices.numel():
            raise FieldError(f"{where} has {part} as {indices.dtype} {tuple(indices.shape)}")
        indices = indices.to(torch.int64)
        # Of blocks by row, then column; both are below 2**31.
        order = indices[:, 0] * 2**31 + indices[:, 1] if width else indices
        if bool((indices < 0).any()) or bool((indices >= 2**31).any()) or bool((order.diff() <= 0).any()):
            raise FieldError(f"{where} has {part} that are negative or do not ascend")
        found[part] = indices
    if ("blocks" in found) != (block_shape != (0, 0)):
        raise FieldError(f"{where} has {len(found.get('blocks', ()))} blocks of {block_shape}")
    return WeightSelection(
        shape=(shape[0], shape[1]), block_size=(block_shape[0], block_shape[1]), whole=whole, **found
    )


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """``metadata``, if what this program reads of them is what it writes; others are the caller's own."""
    fields = Fields(metadata, "the metadata")
    for name, high in (("num_layers", 10 ** (_MAX_DIGITS + 1)), ("num_parameters_model", MAX_WHOLE)):
        if fields.has(name):
            fields.whole_or_none(name, 0, high)
    for name in ("config", "share_captured"):
        if fields.has(name):
            fields.mapping_or_none(name)
    if fields.has("base") and (content := fields.mapping_or_none("base")) is not None:
        check_base_identity(content, "the base in the metadata")
    for number, content in enumerate(fields.listed("groups") if fields.has("groups") else ()):
        group = Fields(content, f"group {number} in the metadata")
        group.texts("modules")
        group.whole("left")
        group.whole("allowed")
    return metadata


def check_base_identity(content: Any, where: str) -> None:
    """Raise :class:`~sparse_zero.fields.FieldError` unless ``content`` is the name and the hash of a base."""
    base = Fields(content, where)
    base.text("name")
    base.sha256("sha256")
    base.end()
