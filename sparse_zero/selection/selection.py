"""What was selected, over the whole model: pure data that is saved, hashed and equal on all ranks."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sparse_zero.errors import InputError
from sparse_zero.files import read_safetensors, write_safetensors
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection

FORMAT = "sparse_zero.selection"
FORMAT_VERSION = 2


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
        write_safetensors(Path(path), tensors, {"format": FORMAT, "header": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: not such a file, cut off, of another version, with a header that is incomplete or does not fit
                its indices, or not matching its own digest.
        """
        tensors, file_metadata = read_safetensors(Path(path), FORMAT)
        try:
            header = json.loads(file_metadata["header"])
            version = int(header["version"])
            if version == FORMAT_VERSION:
                digest = header["digest"]
                weights = {
                    name: WeightSelection(
                        shape=(int(entry["shape"][0]), int(entry["shape"][1])),
                        block_size=(int(entry["block_shape"][0]), int(entry["block_shape"][1])),
                        whole=bool(entry["whole"]),
                        **{
                            part: tensors[key]
                            for part in ("blocks", "rows", "columns")
                            if (key := f"{name}/{part}") in tensors
                        },
                    )
                    for name, entry in header["weights"].items()
                }
                selection = cls(weights, header["metadata"])
        # RuntimeError: indices of another shape than regions have.
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path} has a header that cannot be read ({error!r}): select again") from error
        if version != FORMAT_VERSION:
            remedy = "update sparse-zero" if version > FORMAT_VERSION else "select again"
            raise InputError(
                f"{path} has selection format version {version}, and this is for {FORMAT_VERSION}: {remedy}"
            )
        if selection.digest() != digest:
            raise InputError(f"{path} does not match its own digest: the file was changed; select again")
        return selection
