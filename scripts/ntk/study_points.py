"""What are the kernels of one point of a study (head, shots, seed), and what do they say? Kept in files, by subset."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.ntk import measures
from scripts.ntk.functions import TextFunctions
from scripts.ntk.kernels import compute_kernels
from scripts.ntk.samples import LabelledTexts, few_shot, read_texts, test_samples
from scripts.ntk.study_config import Head, StudyConfig
from scripts.ntk.subsets import FULL, Named, SubsetMaker, named_subsets
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json, read_safetensors, to_json, write_safetensors

_FORMAT = "sparse_zero.ntk_kernels"
# A kernel that no gradient makes: the states that a head reads, which are the kernel of the head's own parameters.
HEAD = "head"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One function and its samples; the kernels of all subsets belong to it."""

    head: Head | None
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        head = f"{self.head}-" if self.head else ""
        return f"{head}{self.shots}-shots-seed-{self.seed}"


def points_of(config: StudyConfig) -> list[Point]:
    """In the order in which they are computed."""
    heads: Sequence[Head | None] = config.heads if config.model.function == "probe" else (None,)
    return [
        Point(head=head, shots=shots, seed=seed) for head in heads for shots in config.shots for seed in config.seeds
    ]


def fingerprint(config: StudyConfig, base_sha256: str, texts: LabelledTexts) -> str:
    """A hash of all that kernels depend on besides the point and the subset; the memory bound is no part of it."""
    data = hashlib.sha256(to_json([dataclasses.asdict(each) for each in (*texts.train, *texts.test)]).encode())
    told = {
        "base": base_sha256,
        "model": {**dataclasses.asdict(config.model), "name_or_path": ""},
        "texts": data.hexdigest(),
        "num_test": config.data.num_test,
        "modules": config.subsets.modules,
        "block_size": config.subsets.block_size,
        "dtype": config.kernel.dtype,
        "sketch": config.kernel.sketch,
    }
    return hashlib.sha256(to_json(told).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PointFiles:
    """A point's kernels [M, N] by subset, and what is told of them."""

    kernels: dict[str, Tensor]
    # labels, num_train, classes, subsets: {name: {num_parameters, notes, sketch}}.
    told: dict[str, Any]


class Study:
    """A study whose files are in a folder.

    Args:
        config: what is studied.
        out: the folder.

    Raises:
        InputError: model or data are not there or do not fit, or the folder has another study's kernels.
    """

    def __init__(self, config: StudyConfig, out: Path) -> None:
        from models.base_identity import base_identity
        from models.source import download, local_folder

        self.config, self.out = config, out
        self.texts = read_texts(config.data)
        self.test = test_samples(self.texts, config.data.num_test)
        for shots in config.shots:
            few_shot(self.texts, shots, config.seeds[0])
        name, field = config.model.name_or_path, "model.name_or_path"
        self._folder = local_folder(name, field=field) or download(
            name, field=field, revision=None, gguf_file=None, weights=True
        )
        self.fingerprint = fingerprint(config, base_identity(self._folder).sha256, self.texts)
        self._functions: TextFunctions | None = None
        for point in points_of(config):
            self._read(point)

    @property
    def functions(self) -> TextFunctions:
        """Loaded when a kernel is missing."""
        if self._functions is None:
            self._functions = TextFunctions(
                self.config.model, self._folder, len(self.texts.classes), self.config.kernel.dtype
            )
        return self._functions

    def _paths(self, point: Point) -> tuple[Path, Path]:
        folder = self.out / "points"
        return folder / f"{point.name}.safetensors", folder / f"{point.name}.json"

    def _read(self, point: Point) -> PointFiles | None:
        path, told_path = self._paths(point)
        if not (path.is_file() and told_path.is_file()):
            return None
        kernels, metadata = read_safetensors(path, _FORMAT)
        if metadata.get("fingerprint") != self.fingerprint:
            raise InputError(
                f"--out is {self.out}, whose {path.name} is of another model, data or setting: give another folder, or "
                "remove it"
            )
        return PointFiles(kernels=kernels, told=read_json(told_path))

    def missing(self, point: Point) -> list[Named]:
        """The subsets of a point whose kernels are not there."""
        found = self._read(point)
        have = set() if found is None else set(found.kernels) & set(found.told["subsets"])
        return [named for named in named_subsets(self.config.subsets) if named.name not in have]

    def compute(self, point: Point, on_work: Callable[[float], None] | None = None) -> None:
        """Compute and keep the kernels that are missing, in one go."""
        missing = self.missing(point)
        if not missing:
            return
        functions = self.functions
        train, others = few_shot(self.texts, point.shots, point.seed)
        samples = [functions.inputs(sample) for sample in (*train, *self.test)]
        labels = [sample.label for sample in train]
        function = functions.function(
            point.head,
            [functions.inputs(sample) for sample in others],
            torch.tensor([sample.label for sample in others]),
            point.seed,
        )
        maker = SubsetMaker(self.config.subsets, function, samples[: len(train)], labels, point.seed)
        made = [maker.make(named) for named in missing]
        kernels = compute_kernels(
            function,
            samples,
            len(train),
            [each.subset for each in made],
            max_bytes=int(self.config.kernel.max_memory_gib * 2**30),
            sketch=self.config.kernel.sketch,
            seed=point.seed,
            on_work=on_work,
        )
        before = self._read(point)
        values = {**(before.kernels if before else {}), **kernels.values}
        told = before.told if before else {"subsets": {}}
        for each in made:
            error = kernels.errors.get(each.named.name)
            told["subsets"][each.named.name] = {
                "num_parameters": each.num_parameters,
                "notes": list(each.notes),
                "sketch": None if error is None else dataclasses.asdict(error),
            }
        with torch.no_grad():
            outputs = torch.stack([function(inputs) for inputs in samples])
            if function.weight is not None:
                states = torch.stack([function.features(inputs) for inputs in samples]).double()
                values[HEAD] = states @ states[: len(train)].T
                told["subsets"][HEAD] = {"num_parameters": states.shape[1] * outputs.shape[1], "notes": []}
        predicted = (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
        told |= {
            "num_train": len(train),
            "labels": [*labels, *(sample.label for sample in self.test)],
            "function_predictions": predicted.tolist(),
            "num_passes": kernels.num_passes,
            "num_parameters_model": sum(parameter.numel() for parameter in functions.base.parameters()),
        }
        path, told_path = self._paths(point)
        # The kernels come last: without them, nothing counts as done.
        atomic_write_json(told_path, told)
        write_safetensors(path, values, {"format": _FORMAT, "fingerprint": self.fingerprint})

    def kernels(self, point: Point) -> PointFiles:
        """The files of a point that has been computed."""
        found = self._read(point)
        assert found is not None
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is measured of every point and subset, with the predictions."""
        for point in points_of(self.config):
            yield from rows_of(point, self.kernels(point), named_subsets(self.config.subsets), len(self.texts.classes))


def rows_of(
    point: Point, files: PointFiles, subsets: Sequence[Named], num_classes: int
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for each subset, and for the head's own kernel where there is one."""
    told, num_train = files.told, files.told["num_train"]
    labels = torch.tensor(told["labels"])
    predictions: dict[str, Tensor] = {}

    def row(named: Named, kernel: Tensor) -> dict[str, Any]:
        full, train = files.kernels[FULL][:num_train], kernel[:num_train]
        fit = measures.ridge_fit(train, labels[:num_train], num_classes)
        predicted = predictions[named.name] = fit.predict(kernel[num_train:])
        about: Mapping[str, Any] = told["subsets"][named.name]
        return {
            "head": point.head,
            "shots": point.shots,
            "seed": point.seed,
            "subset": named.name,
            "kind": named.kind,
            "budget": named.budget,
            "score": named.score,
            "num_parameters": about["num_parameters"],
            "fraction": about["num_parameters"] / told["num_parameters_model"],
            "distance_1": measures.relative_distance(train, full, 1),
            "distance_2": measures.relative_distance(train, full, 2),
            "trace_distance": measures.trace_distance(train, full),
            "scaled_distance": measures.scaled_distance(train, full),
            "scaled_distance_test": measures.scaled_distance(kernel[num_train:], files.kernels[FULL][num_train:]),
            "alignment": measures.alignment(train, full),
            "centred_alignment": measures.centred_alignment(train, full),
            "ridge": fit.ridge,
            "accuracy": float((predicted == labels[num_train:]).double().mean()),
            "agreement": float((predicted == predictions[FULL]).double().mean()),
            "sketch_error_bound": (about.get("sketch") or {}).get("bound"),
            "sketch_error": (about.get("sketch") or {}).get("estimate"),
            "notes": about["notes"],
            "predictions": predicted.tolist(),
        }

    for named in subsets:
        yield row(named, files.kernels[named.name])
    if HEAD in files.kernels:
        yield row(Named(name=HEAD, kind=HEAD), files.kernels[HEAD])
