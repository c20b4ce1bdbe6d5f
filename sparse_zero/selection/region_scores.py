"""What did calibration find: the scores of all candidate regions, kept so that other budgets need no other pass?"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.fields import FieldError, Fields, shown
from sparse_zero.files import parse_json, read_safetensors, to_json, write_safetensors
from sparse_zero.module_map import Layout, Matrix
from sparse_zero.selection.budget import mean_magnitudes
from sparse_zero.selection.calibration import Key
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import MATRIX_KINDS, PICKS, Kind, Pick
from sparse_zero.selection.regions import BlockShape, WeightSelection
from sparse_zero.selection.scores import SCORES, checked_scores, resolve_score
from sparse_zero.selection.selection import Selection, check_base_identity

FORMAT = "sparse_zero.scores"
FORMAT_VERSION = 1


class RegionScores:
    """A score for every candidate region, and how they came about; not to be changed after construction.

    Args:
        candidates: what was scored, in the order of :func:`~sparse_zero.selection.candidates.find_candidates`.
        scores: by weight and kind, fp64 on the host in the shape of each candidate's grid; higher is better, -inf
            means never.
        metadata: JSON values: ``config`` (of the selection), ``num_calibration_batches`` (micro-batches seen) and
            ``rules`` (``needs`` and ``size_neutral`` of each score, so that scores can be used where the function
            that made them is not installed).

    Raises:
        InputError: scores that are missing, not asked for, of another shape than the grid, or NaN or +inf.
    """

    def __init__(
        self, candidates: Sequence[Candidates], scores: Mapping[Key, Tensor], metadata: Mapping[str, Any]
    ) -> None:
        self.candidates = list(candidates)
        self.metadata = dict(metadata)
        wanted = [(c.weight, c.kind) for c in self.candidates]
        if len(set(wanted)) != len(wanted) or set(wanted) != set(scores):
            differing = sorted(set(wanted) ^ set(scores)) or sorted({key for key in wanted if wanted.count(key) > 1})
            raise InputError(
                f"scores and candidates differ in {', '.join(f'{kind}s of {name}' for name, kind in differing[:3])}: "
                "give every candidate once, with its scores"
            )
        self.scores: dict[Key, Tensor] = {
            key: checked_scores(scores[key], c) for key, c in zip(wanted, self.candidates, strict=True)
        }
        self._known_units: dict[str, dict[tuple[Kind, BlockShape], tuple[float, float]]] = {}

    def __repr__(self) -> str:
        names = ", ".join(sorted({c.score for c in self.candidates}))
        return f"RegionScores({sum(c.num_regions for c in self.candidates):,} regions, by {names})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: a tensor ``<weight>/<kind>`` each, and a JSON header of the candidates.

        The scores are kept in fp64, so that a selection chosen from the file is the one chosen without it.
        """
        matrices = list(dict.fromkeys(c.matrix for c in self.candidates))
        number_of = {matrix: number for number, matrix in enumerate(matrices)}
        own = [field.name for field in dataclasses.fields(Candidates) if field.name != "matrix"]
        header = {
            "version": FORMAT_VERSION,
            "matrices": [dataclasses.asdict(matrix) for matrix in matrices],
            "candidates": [
                {"matrix": number_of[c.matrix], **{name: getattr(c, name) for name in own}} for c in self.candidates
            ],
            "metadata": self.metadata,
        }
        tensors = {f"{weight}/{kind}": scores for (weight, kind), scores in self.scores.items()}
        header["digest"] = _digest(json.loads(to_json(header)), tensors)
        write_safetensors(Path(path), tensors, {"format": FORMAT, "header": to_json(header)})

    @classmethod
    def load(cls, path: str | Path) -> "RegionScores":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: not such a file, cut off, of another version, or with scores that do not fit its header.
        """
        tensors, file_metadata = read_safetensors(Path(path), FORMAT)
        try:
            content = parse_json(file_metadata.get("header", ""), strict=True)
            header = Fields(content, "the header")
            version = header.anything("version")
            if version == FORMAT_VERSION:
                matrices = [_matrix(entry, number) for number, entry in enumerate(header.listed("matrices"))]
                entries = header.listed("candidates")
                candidates = [_candidates(entry, number, matrices) for number, entry in enumerate(entries)]
                metadata = _checked_metadata(header.mapping("metadata"), {c.score for c in candidates})
                # Files of before have none.
                digest = header.sha256("digest") if header.has("digest") else None
                header.end()
        except ValueError as error:
            raise InputError(f"{path} has a header that cannot be read ({error}): score again") from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has scores in version {shown(version)}, and this is for {FORMAT_VERSION}: score again"
            )
        key_of = {f"{c.weight}/{c.kind}": (c.weight, c.kind) for c in candidates}
        if set(key_of) != set(tensors):
            differing = ", ".join(sorted(set(key_of) ^ set(tensors))[:3])
            raise InputError(f"{path} has a header and scores that differ in {differing}: score again")
        try:
            scores = cls(candidates, {key_of[name]: tensor for name, tensor in tensors.items()}, metadata)
        except InputError as error:
            raise InputError(f"{path} is damaged ({error}): score again") from error
        if digest is not None and digest != _digest(content, tensors):
            raise InputError(f"{path} does not match its own digest: the file was changed; score again")
        return scores

    def needs(self, score: str) -> frozenset[str]:
        """What ``score`` was computed from, see :class:`~sparse_zero.selection.scores.ScoreRule`."""
        recorded = self.metadata.get("rules", {})
        return frozenset(recorded[score]["needs"]) if score in recorded else resolve_score(score).needs

    def is_size_neutral(self, score: str) -> bool:
        """Whether regions of different sizes may be compared by ``score`` as they are."""
        recorded = self.metadata.get("rules", {})
        return bool(recorded[score]["size_neutral"]) if score in recorded else resolve_score(score).size_neutral

    def _units(self, score: str) -> dict[tuple[Kind, BlockShape], tuple[float, float]]:
        """Mean magnitude of a score, and mean number of entries of a region, for every kind and block shape.

        As kinds compete: of a kind that competes, the regions with per_matrix are left out of the mean.
        """
        if score not in self._known_units:
            members: dict[tuple[Kind, BlockShape], list[Candidates]] = {}
            for c in self.candidates:
                if c.score == score:
                    members.setdefault((c.kind, c.block_shape), []).append(c)
            self._known_units[score] = {}
            for shape, own in members.items():
                competing = [c for c in own if c.per_matrix is None]
                entries = sum(c.shape[0] * c.shape[1] for c in own)
                self._known_units[score][shape] = (
                    mean_magnitudes(competing or own, self.scores)[shape],
                    entries / sum(c.num_regions for c in own),
                )
        return self._known_units[score]

    def comparable(self, candidates: Candidates) -> Tensor:
        """Scores of one of the candidates as kinds compete: fp64, in their shape.

        A score that favours a size is divided by its mean magnitude over all regions of the kind and block shape, if
        there are several of these (see :func:`~sparse_zero.selection.budget.normalised`).
        """
        scores = self.scores[candidates.weight, candidates.kind]
        if self.is_size_neutral(candidates.score):
            return scores
        units = self._units(candidates.score)
        return scores if len(units) < 2 else scores / units[candidates.kind, candidates.block_shape][0]

    def mass(self, candidates: Candidates) -> Tensor:
        """Mass of every region of one of the candidates: fp64, in the shape of the scores.

        Its score if that is positive, and 0 otherwise. A size-neutral score is a mean per entry: its mass is multiplied
        by the region's entries, so that the mass of a matrix does not depend on how it is cut. Another score is taken
        as it is; where there are several kinds or block shapes, whose scores are on unlike scales, as kinds compete by
        it (see :meth:`comparable`), times the mean number of entries of such regions. So every kind weighs as much as
        the entries it covers, and the regions that a budget of entries captures most with are those that it chooses.
        """
        mass = self.comparable(candidates).clamp(min=0.0)
        if self.is_size_neutral(candidates.score):
            return mass * candidates.sizes()
        units = self._units(candidates.score)
        return mass if len(units) < 2 else mass * units[candidates.kind, candidates.block_shape][1]

    def share_captured(self, selection: Selection) -> dict[str, Any]:
        """How much of the score of all candidate regions lies in the chosen ones.

        In terms of :meth:`mass`. A region counts when it was chosen itself, also where another kind owns some of its
        entries; entries that several kinds cover count once for each kind.

        Returns:
            ``total``, ``by_kind`` and ``by_weight``: shares in [0, 1] of the mass of all candidates, of those of a
            kind, and of those of a weight (names without a chosen region included, with 0). None where the
            candidates have several scores, whose masses cannot be added, or no mass.

        Raises:
            InputError: the selection's blocks of a weight are not those that were scored.
        """
        groups: dict[str, dict[str, list[Candidates]]] = {"total": {"": []}, "by_kind": {}, "by_weight": {}}
        captured: dict[Key, float] = {}
        masses: dict[Key, float] = {}
        for c in self.candidates:
            groups["total"][""].append(c)
            groups["by_kind"].setdefault(c.kind, []).append(c)
            groups["by_weight"].setdefault(c.weight, []).append(c)
            chosen = selection.weights.get(c.weight)
            flat = _flat_regions(c, chosen) if chosen is not None else torch.empty(0, dtype=torch.int64)
            mass = self.mass(c).reshape(-1)
            masses[c.weight, c.kind], captured[c.weight, c.kind] = float(mass.sum()), float(mass[flat].sum())

        def share(members: Sequence[Candidates]) -> float | None:
            total = sum(masses[c.weight, c.kind] for c in members)
            if len({c.score for c in members}) != 1 or total == 0.0:
                return None
            return sum(captured[c.weight, c.kind] for c in members) / total

        shares = {name: {key: share(members) for key, members in group.items()} for name, group in groups.items()}
        return {"total": shares["total"][""], "by_kind": shares["by_kind"], "by_weight": shares["by_weight"]}


# Rows or columns of a matrix, and matrices in a stack, at most.
_MAX_SIDE, _MAX_SLICES = 2**26, 10**7


def _matrix(content: Any, number: int) -> Matrix:
    """A checked matrix from its JSON form, which knows no tuples; fields that files of before lack have defaults."""
    fields = Fields(content, f"matrix {number} in the header")
    owners = fields.listed("owners")
    is_fine = all(
        isinstance(owner, list) and len(owner) == 2 and all(isinstance(each, str) for each in owner) for owner in owners
    )
    if not owners or not is_fine:
        fields.refuse("owners", owners, "modules with an attribute each")
    height, width = fields.wholes("shape", 2, 1, _MAX_SIDE)
    optional: dict[str, Any] = {}
    if fields.has("layout"):
        optional["layout"] = fields.choice("layout", get_args(Layout))
    for name in ("is_product", "is_linear", "is_quantized"):
        if fields.has(name):
            optional[name] = fields.flag(name)
    if fields.has("num_slices"):
        optional["num_slices"] = fields.whole_or_none("num_slices", 1, _MAX_SLICES)
    matrix = Matrix(
        name=fields.text("name"),
        owners=tuple((module, attribute) for module, attribute in owners),
        shape=(height, width),
        **optional,
    )
    fields.end()
    return matrix


def _candidates(content: Any, number: int, matrices: Sequence[Matrix]) -> Candidates:
    """Checked candidates from their JSON form."""
    fields = Fields(content, f"candidate {number} in the header")
    matrix = matrices[fields.whole("matrix", 0, len(matrices) - 1)]
    kind = cast(Kind, fields.choice("kind", MATRIX_KINDS))
    low, high = (1, _MAX_SIDE) if kind == "block" else (0, 0)
    height, width = fields.wholes("block_shape", 2, low, high)
    if matrix.num_slices is None:
        slice_index = fields.whole_or_none("slice_index", 0, -1)
    else:
        slice_index = fields.whole("slice_index", 0, matrix.num_slices - 1)
    found = Candidates(
        matrix=matrix,
        slice_index=slice_index,
        kind=kind,
        block_shape=(height, width),
        score=fields.text("score"),
        pick=cast(Pick, fields.choice("pick", PICKS)),
        per_matrix=fields.whole_or_none("per_matrix", 1),
    )
    fields.end()
    return found


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a header, without its own digest, and the scores."""
    content = {name: value for name, value in header.items() if name != "digest"}
    sha = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)}".encode())
        sha.update(tensors[name].to(torch.float64).contiguous().numpy().astype("<f8", copy=False).data)
    return sha.hexdigest()


def _checked_metadata(metadata: dict[str, Any], scores: Collection[str]) -> dict[str, Any]:
    """``metadata``, if they are what this program reads of them.

    Args:
        metadata: from a file.
        scores: names in the file. One that is not recorded must be a built-in one: a file must not have code imported.
    """
    fields = Fields(metadata, "the metadata")
    if fields.has("config"):
        fields.mapping("config")
    if fields.has("num_calibration_batches"):
        fields.whole_or_none("num_calibration_batches")
    if fields.has("base") and (base := fields.mapping_or_none("base")) is not None:
        check_base_identity(base, "the base in the metadata")
    recorded = fields.mapping("rules") if fields.has("rules") else {}
    for name, content in recorded.items():
        rule = Fields(content, f"the rule {shown(name)} in the metadata")
        rule.texts("needs")
        rule.flag("size_neutral")
        rule.end()
    unknown = sorted(set(scores) - set(recorded) - set(SCORES))
    if unknown:
        raise FieldError(f"the metadata have no rule of the score {shown(unknown[0])}")
    return metadata


def _flat_regions(candidates: Candidates, chosen: WeightSelection) -> Tensor:
    """[number] int64: positions in the candidates' flat scores of the regions that ``chosen`` has of their kind."""
    if chosen.shape != candidates.shape:
        raise InputError(
            f"the selection has {candidates.weight} as {chosen.shape}, the scores have {candidates.shape}: "
            "they belong to different models"
        )
    if candidates.kind != "block":
        return chosen.rows if candidates.kind == "row" else chosen.columns
    if len(chosen.blocks) and chosen.block_shape != candidates.block_shape:
        raise InputError(
            f"the selection has blocks of {chosen.block_shape} in {candidates.weight}, the scores have "
            f"{candidates.block_shape}: score blocks of that size"
        )
    return chosen.blocks[:, 0] * candidates.grid[1] + chosen.blocks[:, 1]
