"""Do all ranks read the same base, data and selection, where every node may have files of its own?

What differs is said before the model is loaded. Of the base, its config and the names and sizes of its weight files are
compared here; the weights themselves are when the engine is made (:mod:`sparse_zero.zero.same_weights`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.config import RunConfig
from models.data import SampleSet
from models.gather import gather_json
from models.loading import ModelConfig, model_folder
from models.weight_files import weight_files
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.files import to_json
from sparse_zero.selection.selection import Selection


def base_outline(source: ModelConfig) -> str:
    """Hash of a base's config, and of the names and sizes of its weight files."""
    folder = model_folder(source)
    settings = folder / "config.json"
    content = settings.read_bytes() if settings.is_file() else b""
    files = sorted(f"{path.name} {path.stat().st_size}" for path in map(Path, weight_files(folder, source.gguf_file)))
    return hashlib.sha256(content + "\n".join(files).encode()).hexdigest()


def samples_digest(samples: SampleSet) -> str:
    """Hash of all token ids and labels: of the records, the template and the tokenizer at once."""
    digest = hashlib.sha256()
    for sample in samples.samples:
        digest.update(sample.numbers())
    return digest.hexdigest()


def records_digest(records: Sequence[Mapping[str, str]]) -> str:
    """Hash of all fields of test problems: the ranks answer a part of them each."""
    return hashlib.sha256(to_json([dict(each) for each in records]).encode("utf-8", "surrogatepass")).hexdigest()


def check_same_input(
    config: RunConfig, source: ModelConfig, read: Mapping[str, SampleSet | Sequence[Mapping[str, str]] | None]
) -> None:
    """Raise on all ranks unless all read the same. Collective.

    Args:
        config: of the run.
        source: what is loaded as the base.
        read: by name of the field, such as ``data.train``: samples, or the problems that are asked; None where there
            are none.

    Raises:
        InputError: names the field and the ranks, or a file that cannot be read.
    """
    mine: dict[str, str | None] = {}
    with failing_together():
        mine["model.name_or_path"] = base_outline(source)
        for field, found in read.items():
            mine[field] = None if found is None else _digest(found)
        mine["selection.file"] = config.selection.file and Selection.load(config.selection.file).digest()
    _check_same(mine)


def check_same_problems(records: Sequence[Mapping[str, str]]) -> None:
    """Raise on all ranks unless all have the same test problems. Collective.

    Raises:
        InputError: names the ranks.
    """
    _check_same({"data.test": records_digest(records)})


def _digest(found: SampleSet | Sequence[Mapping[str, str]]) -> str:
    return samples_digest(found) if isinstance(found, SampleSet) else records_digest(found)


def _check_same(mine: Mapping[str, str | None]) -> None:
    everyone = gather_json(mine)
    for field, value in everyone[0].items():
        others = [str(rank) for rank, each in enumerate(everyone) if each[field] != value]
        if others:
            raise InputError(
                f"{field} is not the same for ranks {', '.join(others)} as for rank 0, though it has the same name: "
                "copy the same files (and the same tokenizer) to every node, or share them"
            )
