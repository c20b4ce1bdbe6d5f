"""How do records come out of a JSON, JSONL, CSV, TSV or parquet file, a folder, or the hub; and which is plain text?

Parquet files and hub names are read by ``datasets``. JSON and CSV are parsed here, value by value: a columnar
reader infers one type per column, which turns the answers 5 and 2.5 into 5.0 and 2.5, the text "2020-01-01"
into a timestamp and "007" into 7, and shifts the columns of a CSV whose rows are longer than its header.
"""

import csv
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sparse_zero.errors import InputError

DataFormat = Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "text", "hub"]
Record = Mapping[str, Any]

SUFFIXES: dict[str, DataFormat] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
# owner/name, or owner/name:subset where the data set has several configurations.
HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<subset>[\w.-]+))?")


def is_hub_name(source: str, data_format: DataFormat = "auto") -> bool:
    """Whether ``source``, where nothing of that name is, is a data set of the hub; ``data/train.json`` is a file."""
    could_be = data_format in ("auto", "hub") and Path(source).suffix.lower() not in SUFFIXES
    return could_be and HUB_NAME.fullmatch(source) is not None


def read_records(source: str, *, field: str, split: str, data_format: DataFormat = "auto") -> list[Record]:
    """Read every record of one split, in the order of the source.

    Args:
        source: a file; a folder that holds ``<split>.<suffix>`` or ``<split>-*.parquet`` (itself or in
            ``data/``); or, when no such path exists, a hub name ``owner/name`` or ``owner/name:subset``.
            ``~`` is expanded.
        field: name of the setting that gave ``source``, for messages: ``data.train``.
        split: chooses the file of a folder and the split of a hub data set; a single file is one split.
        data_format: how files are parsed, or ``hub``; ``auto`` goes by the suffix.

    Returns:
        At least one record, with the values that the source holds.

    Raises:
        InputError: nothing to read there, an unsupported suffix, malformed content, or no records.
    """
    if files := local_files(source, field=field, split=split, data_format=data_format):
        records = [record for file in files for record in _read_file(file, field, data_format)]
    elif is_hub_name(source, data_format):
        records = _read_hub(source, field, split)
    elif data_format == "hub":
        raise InputError(f"{field} is {source!r}: a hub data set is named owner/name or owner/name:subset")
    else:
        raise InputError(f"{field} is {source!r}: there is no such file or folder; correct the path")
    if not records:
        raise InputError(f"{field} is {source!r}: it holds no records; give data with at least one")
    return records


def text_file(source: str, *, field: str, split: str, data_format: DataFormat = "auto") -> Path | None:
    """The plain text that a source is for one split; None where it holds records, or is not there.

    Arguments and errors as :func:`read_records`, which reads all else.
    """
    files = local_files(source, field=field, split=split, data_format=data_format)
    return files[0] if len(files) == 1 and _kind(files[0], data_format) == "text" else None


def local_files(source: str, *, field: str, split: str, data_format: DataFormat = "auto") -> list[Path]:
    """The files that hold one split of a source; empty where it is not there, or is a hub name.

    Arguments and errors as :func:`read_records`, which reads them.
    """
    path = Path(source).expanduser()
    if data_format == "hub" or not path.exists():
        return []
    return _files_of_split(path, field, split, data_format) if path.is_dir() else [path]


def read_text(path: Path, *, field: str) -> str:
    """The whole of a plain text file in UTF-8, every line break a single one.

    Raises:
        InputError: the file cannot be opened, is not UTF-8, or holds nothing but white space.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{field} is {str(path)!r}: it is not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise InputError(f"{field} is {str(path)!r}: it cannot be opened: {error.strerror or error}") from error
    if not text.strip():
        raise InputError(f"{field} is {str(path)!r}: it holds no text; give a file with some")
    return text


def text_of(value: Any) -> str | None:
    """The text of a scalar (JSON spelling of booleans); None for None and for lists, objects and bytes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, (list, tuple, dict, bytes)):
        return None
    return str(value)


def to_text_records(
    records: Sequence[Record], *, field: str, needed: Sequence[str], source: str
) -> list[dict[str, str]]:
    """Check that every record has the needed fields, and convert the scalars to text; leave out all else.

    Raises:
        InputError: a needed field is absent, null or not a scalar; names the record (counted from 1), the
            field and the fields that are present.
    """
    converted = []
    for number, record in enumerate(records, start=1):
        texts = {name: text for name, value in record.items() if (text := text_of(value)) is not None}
        for name in needed:
            if name not in texts:
                given = record.get(name)
                problem = "has no" if given is None else f"has a {type(given).__name__}, not a text, as its"
                present = ", ".join(map(repr, texts)) or "none"
                raise InputError(
                    f"{field} is {source!r}: record {number} {problem} field {name!r} (fields present: "
                    f"{present}); correct the record, or name the field to read under data.fields"
                )
        converted.append(texts)
    return converted


def _files_of_split(folder: Path, field: str, split: str, data_format: DataFormat) -> list[Path]:
    """The one file, or the parquet shards, of a split in a folder."""
    wanted = [suffix for suffix, kind in SUFFIXES.items() if data_format in ("auto", kind)]
    single = [file for suffix in wanted if (file := folder / f"{split}{suffix}").is_file()]
    shards = [sorted(place.glob(f"{split}-*.parquet")) for place in (folder, folder / "data")]
    candidates = [[file] for file in single] + [found for found in shards if found and ".parquet" in wanted]
    if len(candidates) > 1:
        names = ", ".join(str(found[0].relative_to(folder)) for found in candidates)
        raise InputError(f"{field} is {str(folder)!r}: split {split!r} is there more than once ({names}); name a file")
    if candidates:
        return candidates[0]
    present = sorted(file.name for file in folder.iterdir())
    shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
    raise InputError(
        f"{field} is {str(folder)!r}: the folder has no file for the split {split!r}, such as {split}.json "
        f"(present: {shown or 'nothing'}); name a file, or another split"
    )


def _kind(path: Path, data_format: DataFormat) -> DataFormat | None:
    return SUFFIXES.get(path.suffix.lower()) if data_format == "auto" else data_format


def _read_file(path: Path, field: str, data_format: DataFormat) -> list[Record]:
    kind = _kind(path, data_format)
    if kind == "text":
        raise InputError(
            f"{field} is {str(path)!r}: plain text has no records with fields; give JSON, JSONL, CSV, TSV or parquet"
        )
    readers: dict[str | None, Callable[[Path], list[Record]]] = {
        "json": _read_json,
        "jsonl": _read_jsonl,
        "csv": _read_csv,
        "tsv": _read_tsv,
        "parquet": _read_parquet,
    }
    if kind not in readers:
        raise InputError(
            f"{field} is {str(path)!r}: the suffix {path.suffix!r} is not supported; "
            f"use {', '.join(SUFFIXES)}, or set data.format"
        )
    try:
        records = readers[kind](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{field} is {str(path)!r}: it is not UTF-8 text ({error.reason}); convert it") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"{field} is {str(path)!r}: it cannot be read as {kind}: {_first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{field} is {str(path)!r}: it cannot be opened: {error.strerror or error}") from error
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InputError(
                f"{field} is {str(path)!r}: record {number} is a {type(record).__name__}, not an object with fields"
            )
    return records


def _read_json(path: Path) -> list[Record]:
    """A list of objects; a file of several objects, one a line, is taken as the JSONL that it is."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _parse_lines(text.split("\n"))
        raise
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, list):
        raise ValueError(f"a list of objects is expected at the top, not a {type(content).__name__}")
    return content


def _read_jsonl(path: Path) -> list[Record]:
    return _parse_lines(path.read_text(encoding="utf-8-sig").split("\n"))


def _parse_lines(lines: Sequence[str]) -> list[Record]:
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
            except RecursionError as error:
                raise ValueError(f"line {number}: nested too deeply") from error
    return records


def _read_csv(path: Path) -> list[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError("a column name occurs twice in the header")
        records: list[Record] = []
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} values for {len(header)} columns")
            if row:
                records.append(dict(zip(header, row, strict=True)))
    return records


def _read_tsv(path: Path) -> list[Record]:
    """Lines of values with tabs between them, below a header, as GLUE has them: quotes are characters like others."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    header = lines[0].removesuffix("\r").split("\t")
    if len(set(header)) < len(header):
        raise ValueError("a column name occurs twice in the header (the first line must be one)")
    records: list[Record] = []
    for number, line in enumerate(lines[1:], start=2):
        row = line.removesuffix("\r").split("\t")
        if row == [""]:
            continue
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} values for {len(header)} columns")
        records.append(dict(zip(header, row, strict=True)))
    return records


def _read_parquet(path: Path) -> list[Record]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    with tempfile.TemporaryDirectory() as cache, _no_progress_bars():
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except DatasetGenerationError as error:
            raise ValueError(_first_line(error.__cause__ or error)) from error
        return list(table.to_list())


def _read_hub(name: str, field: str, split: str) -> list[Record]:
    import datasets

    match = HUB_NAME.fullmatch(name)
    assert match is not None, name
    try:
        with _no_progress_bars():
            data_set = datasets.load_dataset(match["path"], match["subset"], split=split)
    except Exception as error:  # the hub client raises errors of several libraries, without a common base
        raise InputError(
            f"{field} is {name!r}: no such file or folder is here, and the split {split!r} of a hub data "
            f"set of that name cannot be read ({type(error).__name__}: {_first_line(error)}); correct the "
            "name or the split, connect to the hub, or download the data and give its path"
        ) from error
    return list(data_set.to_list())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the progress bars of ``datasets`` (every rank reads), and restore the user's setting."""
    import datasets

    were_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()
