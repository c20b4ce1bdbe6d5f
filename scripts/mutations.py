"""How can a file of ours be damaged, or made to do harm? One function for each way, all from one seeded generator."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

MANIFEST = "manifest.json"
# What JSON must not hold where something else belongs.
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**70, 10**400, -(10**400), 1.5, float("nan"), float("inf"), 1e308, "",
    "x" * 100_000, "../../outside/canary", "/etc/passwd", "\x00", "\ud800", "\x1b[2J", [], {}, [[[]]], {"a": {"b": 1}},
    "0" * 64, [1] * 1000,
)  # fmt: skip
# Files whose content nothing is compared with: only other programs read them, or people.
FREE = ("adapter_config.json", "summary.json", "metrics.jsonl")
# Beside the checkpoints of a run: a whole file of another run is a valid one.
_ALONE = ("selection.safetensors", "scores.safetensors")
# Names that would lead out of a folder, or that no file can have.
HOSTILE_NAMES = (
    "../outside/canary", "/etc/passwd", "..", ".", "", "a//b", "./masters.safetensors", "..\\outside\\canary", "C:\\x",
    "c:x", "a\x00b", "a\nb", "\ud800", "x" * 300, "/".join("d" * 250 for _ in range(20)),
    "manifest.json/../../outside/canary", "file:///etc/passwd", "~/.ssh/id_rsa", "a/./b", "CON:", " ", "folder/",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Done:
    """What was done to a folder."""

    # In words, for the table.
    what: str
    # Whether the result may be a valid file with other content (numbers of tensors, free fields): nothing can tell it
    # from what somebody else has trained.
    may_be_valid: bool = False


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a mutation works with."""

    random: Random
    # The folder to mutate: a copy.
    folder: Path
    # Others of the same kind, whole: files are taken from there.
    others: tuple[Path, ...]
    # Beside the folder, and not to be touched by any reader.
    outside: Path

    def any_file(self) -> Path:
        """A regular file of the folder, or of a folder in it."""
        return self.random.choice(sorted(path for path in self.folder.rglob("*") if path.is_file()))

    def pick(self, suffix: str = "") -> Path:
        """A file of the folder itself, but for the manifest."""
        found = [path for path in self.folder.glob(f"*{suffix}") if path.is_file() and path.name != MANIFEST]
        return self.random.choice(sorted(found))


Mutation = Callable[[Context], Done]


def fix_manifest(folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write the manifest that fits to the files as they are: its hashes find nothing any more."""
    entries = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries | (extra or {})}), encoding="utf-8")


def seal(folder: Path) -> None:
    """Write the ``state_id`` that fits to the header of a checkpoint into all of its files, as its writer does."""
    path = folder / "checkpoint.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(header, dict):
        return
    header.pop("state_id", None)
    header["state_id"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(header), encoding="utf-8")
    for each in folder.glob("*.safetensors"):
        inner, data = split(each)
        if "state_id" in inner.get("__metadata__", {}):
            inner["__metadata__"]["state_id"] = header["state_id"]
            join(each, inner, data)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header, content[8 + size :]


def join(path: Path, header: Any, data: bytes, size: int | None = None) -> None:
    """Write a safetensors file; ``size`` is what it says of its header, by default the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def a_place(random: Random, value: Any) -> tuple[Any, ...]:
    """The path of something inside a JSON value: a few steps down, every field of an object equally likely."""
    here: tuple[Any, ...] = ()
    while isinstance(value, dict | list) and value and (not here or random.random() < 0.6):
        key = random.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        here, value = (*here, key), value[key]
    return here


def change(random: Random, value: Any) -> str:
    """Change something in a JSON object, in place: another value, a field less, a field more, another name."""
    place = a_place(random, value)
    target = value
    for key in place[:-1]:
        target = target[key]
    last, way = place[-1], random.choice(("value", "value", "value", "remove", "add", "rename"))
    if way == "remove":
        del target[last]
    elif way == "add" and isinstance(target, dict):
        target[random.choice(("added", "__class__", "../x"))] = random.choice(HOSTILE)
    elif way == "rename" and isinstance(target, dict):
        target[f"{last}_"] = target.pop(last)
    else:
        target[last] = hostile = random.choice(HOSTILE)
        return f"{'.'.join(map(str, place))} = {hostile!r:.40}"
    return f"{way} {'.'.join(map(str, place))}"


def write_json(path: Path, value: Any) -> None:
    """As any JSON writer would, NaN and lone surrogates included."""
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


# --- without the manifest's knowledge: its hashes find it -----------------------------------------------------------


def flip(context: Context) -> Done:
    """One bit of any file, the manifest among them."""
    path = context.any_file()
    content = bytearray(path.read_bytes())
    at = context.random.randrange(len(content))
    content[at] ^= 1 << context.random.randrange(8)
    path.write_bytes(content)
    return Done(what=f"bit of {path.name} at {at}", may_be_valid=path.name in FREE[1:])


def truncate(context: Context) -> Done:
    """Any file ends early."""
    path = context.any_file()
    length = context.random.randrange(path.stat().st_size)
    os.truncate(path, length)
    return Done(what=f"{path.name} cut to {length}", may_be_valid=path.name == "metrics.jsonl")


def append(context: Context) -> Done:
    """Any file goes on after its end."""
    path = context.any_file()
    path.write_bytes(path.read_bytes() + context.random.randbytes(context.random.choice((1, 8, 4096))))
    return Done(what=f"bytes after {path.name}", may_be_valid=path.name == "metrics.jsonl")


def remove(context: Context) -> Done:
    """Any file is gone."""
    path = context.any_file()
    path.unlink()
    return Done(what=f"without {path.name}", may_be_valid=path.name == "metrics.jsonl")


def swap(context: Context) -> Done:
    """Any file is that of another folder."""
    path = context.any_file()
    other = context.random.choice(context.others) / path.relative_to(context.folder)
    if other.is_file():
        path.write_bytes(other.read_bytes())
    is_alone = path.parent == context.folder and not (context.folder / MANIFEST).exists()
    return Done(
        what=f"{path.name} of another", may_be_valid=path.name in FREE[1:] or (is_alone and path.name in _ALONE)
    )


def link(context: Context) -> Done:
    """Any file is a link: to the same content elsewhere, a device, itself, a folder; or a pipe, or a folder."""
    path = context.any_file()
    way = context.random.choice(("outside", "zero", "itself", "folder", "gone", "pipe", "directory", "password"))
    copy = context.outside / "copy"
    copy.write_bytes(path.read_bytes())
    path.unlink()
    targets: dict[str, str | Path] = {
        "outside": copy,
        "zero": "/dev/zero",
        "itself": path,
        "folder": context.outside,
        "gone": context.outside / "none",
        "password": "/etc/passwd",
    }
    if way == "pipe":
        os.mkfifo(path)
    elif way == "directory":
        path.mkdir()
    else:
        path.symlink_to(targets[way])
    return Done(what=f"{path.name} is {way}")


# --- with a manifest that fits --------------------------------------------------------------------------------------


def fixed(mutation: Mutation) -> Mutation:
    """``mutation``, and the manifest recomputed after it."""

    def mutate(context: Context) -> Done:
        done = mutation(context)
        fix_manifest(context.folder)
        return done

    return mutate


def flip_known(context: Context) -> Done:
    """One bit of a file: of the numbers of a tensor, it is another valid file."""
    path = context.pick()
    content = bytearray(path.read_bytes())
    at = context.random.randrange(len(content))
    content[at] ^= 1 << context.random.randrange(8)
    path.write_bytes(content)
    start = 8 + struct.unpack("<Q", content[:8])[0] if path.suffix == ".safetensors" else len(content)
    return Done(what=f"bit of {path.name} at {at}", may_be_valid=at >= start)


def swap_known(context: Context) -> Done:
    """A file of another folder: never right, unless it is the same."""
    path = context.pick()
    other = context.random.choice(context.others)
    if (other / path.name).is_file():
        path.write_bytes((other / path.name).read_bytes())
    return Done(what=f"{path.name} of another", may_be_valid=path.name in FREE or is_whole(context.folder, other))


def is_whole(folder: Path, other: Path) -> bool:
    """Whether a folder has become the other one: what they differed in was this one file."""
    names = {path.name for each in (folder, other) for path in each.iterdir()} - {MANIFEST, *FREE}
    return all(
        (folder / name).is_file()
        and (other / name).is_file()
        and (folder / name).read_bytes() == (other / name).read_bytes()
        for name in names
    )


def add_known(context: Context) -> Done:
    """A file more, of another folder, that is not among ours."""
    here = {path.name for path in context.folder.iterdir()}
    found = [path for other in context.others for path in other.iterdir() if path.name not in here]
    path = context.random.choice(found) if found else context.outside / "canary"
    (context.folder / path.name).write_bytes(path.read_bytes())
    return Done(what=f"{path.name} added")


def header_size(context: Context) -> Done:
    """A safetensors file says that its header has another size."""
    path = context.pick(".safetensors")
    header, data = split(path)
    size = context.random.choice((0, 1, 2**20, 10**8, 2**31, 2**40, 2**63, 2**64 - 1))
    join(path, header, data, size)
    return Done(what=f"{path.name}: header of {size}")


def header_content(context: Context) -> Done:
    """The header of a safetensors file has something else in it: dtypes, shapes, offsets, names, metadata."""
    path = context.pick(".safetensors")
    header, data = split(path)
    what = change(context.random, header)
    join(path, header, data)
    return Done(what=f"{path.name}: {what}")


def header_text(context: Context) -> Done:
    """The header of a safetensors file is no JSON as one expects it."""
    path = context.pick(".safetensors")
    header, data = split(path)
    text = json.dumps(header).encode()
    name = next(key for key in header if key != "__metadata__")
    ways = {
        "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "lists": b"[" * 1_000_000,
        "twice": text[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(header[name]).encode() + b"}",
        "list": b"[" + text + b"]",
        "null": b"null",
        "no UTF-8": b"\xff" * len(text),
        "many": json.dumps(
            {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20000)}
        ).encode(),
        "empty": b"",
        "huge shape": json.dumps({name: {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}).encode(),
        "product": json.dumps({name: {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}).encode(),
    }
    way = context.random.choice(sorted(ways))
    join(path, ways[way], data)
    return Done(what=f"{path.name}: header {way}")


def dtype(context: Context) -> Done:
    """A tensor has as many bytes, and another dtype or shape."""
    path = context.pick(".safetensors")
    header, data = split(path)
    name = context.random.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    number = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
    ways = [
        *(("I32", [number]), ("F32", [number, 1]), ("U8", [number * 4]), ("F16", [number * 2]), ("F32", [1, number])),
        *(("I64", [number // 2]), ("F64", [number // 2]), ("BOOL", [number * 4]), ("C64", [number // 2])),
    ]
    before = (entry["dtype"], entry["shape"])
    entry["dtype"], entry["shape"] = context.random.choice([way for way in ways if way != before])
    join(path, header, data)
    return Done(what=f"{path.name}: {name[-30:]} as {entry['dtype']} {entry['shape']}")


def tensor_name(context: Context) -> Done:
    """A tensor has another's name, or one that no model has; or two have exchanged theirs."""
    path = context.pick(".safetensors")
    header, data = split(path)
    names = [key for key in header if key != "__metadata__"]
    first, second = context.random.choice(names), context.random.choice(names)
    if context.random.random() < 0.5 and first != second:
        header[first], header[second] = header[second], header[first]
        is_alike = (
            header[first]["shape"] == header[second]["shape"] and header[first]["dtype"] == header[second]["dtype"]
        )
        join(path, header, data)
        return Done(what=f"{path.name}: {first[-20:]} and {second[-20:]} exchanged", may_be_valid=is_alike)
    header[context.random.choice((f"{first}_", "../x", "", first.upper(), first.replace(".", "/", 1)))] = header.pop(
        first
    )
    join(path, header, data)
    return Done(what=f"{path.name}: {first[-30:]} renamed")


def indices(context: Context) -> Done:
    """Indices of the selection are negative, too large, doubled, unsorted; its digest fits where it can."""
    path = context.folder / "selection.safetensors"
    header, data = split(path)
    name = context.random.choice([key for key in header if key != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    numbers = list(struct.unpack(f"<{(end - begin) // 4}i", data[begin:end]))
    way = context.random.choice(("negative", "large", "same", "reversed"))
    changed = {
        "negative": [-n - 1 for n in numbers],
        "large": [2**31 - 1] * len(numbers),
        "same": numbers[:1] * len(numbers),
        "reversed": numbers[::-1],
    }[way]
    if changed == numbers:
        changed = [-1] * len(numbers)
    join(path, header, data[:begin] + struct.pack(f"<{len(numbers)}i", *changed) + data[end:])
    return Done(what=f"{name[-30:]} {way}")


def selection_header(context: Context) -> Done:
    """The selection's own header has something else in it."""
    path = context.folder / "selection.safetensors"
    header, data = split(path)
    inner = json.loads(header["__metadata__"]["header"])
    if context.random.random() < 0.5:
        weight = inner["weights"].pop(context.random.choice(sorted(inner["weights"])))
        name = context.random.choice(
            ("a[x]", "a[1", "a[99999999999999999999]", "a[-1]", "layers.9999999999.q.weight", "", "a[01]")
        )
        inner["weights"][name] = weight
        what = f"name {name}"
    else:
        part = context.random.choice(("weights", "weights", "version", "digest"))
        what = change(context.random, inner[part]) if part == "weights" else f"{part} changed"
        if part != "weights":
            inner[part] = context.random.choice(HOSTILE)
    header["__metadata__"]["header"] = json.dumps(inner)
    join(path, header, data)
    return Done(what=f"selection: {what}")


def json_content(context: Context) -> Done:
    """A JSON file has something else in it."""
    path = context.pick(".json")
    value = json.loads(path.read_text(encoding="utf-8"))
    what = change(context.random, value)
    write_json(path, value)
    return Done(what=f"{path.name}: {what}", may_be_valid=path.name in FREE)


def json_text(context: Context) -> Done:
    """A JSON file is deeper or larger than any of ours, or has a key twice."""
    path = context.pick(".json")
    text = path.read_bytes().strip()
    ways = {
        "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "lists": b"[" * 500 + b"]" * 500,
        "twice": text[:-1] + b',"format": "sparse_zero.checkpoint", "format": "x"}',
        "digits": b'{"format": 1' + b"0" * 10_000 + b"}",
        "NaN": b'{"format": NaN}',
        "no UTF-8": text + b"\xff",
        "list": b"[" + text + b"]",
        "text": b'"checkpoint"',
        "nothing": b"",
    }
    way = context.random.choice(sorted(ways))
    path.write_bytes(ways[way])
    return Done(what=f"{path.name}: {way}", may_be_valid=path.name in FREE)


def resealed(context: Context) -> Done:
    """The header of a checkpoint has something else in it, and its seal fits again: types and ranges are left."""
    path = context.folder / "checkpoint.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    what = change(context.random, value)
    write_json(path, value)
    with suppress(ValueError):  # What cannot be sealed is left as it is.
        seal(context.folder)
    return Done(what=f"resealed: {what}", may_be_valid=True)


def manifest_name(context: Context) -> Done:
    """The manifest names a file outside, with its right size and hash, or one that cannot exist."""
    path = context.outside / "canary"
    entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    name = context.random.choice(HOSTILE_NAMES)
    manifest = json.loads((context.folder / MANIFEST).read_text(encoding="utf-8"))
    write_json(context.folder / MANIFEST, {"files": {**manifest["files"], name: entry}})
    return Done(what=f"manifest names {name!r:.40}")


def manifest_content(context: Context) -> Done:
    """The manifest has something else in it."""
    manifest = json.loads((context.folder / MANIFEST).read_text(encoding="utf-8"))
    what = change(context.random, manifest)
    write_json(context.folder / MANIFEST, manifest)
    return Done(what=f"manifest: {what}")


def unlisted(context: Context) -> Done:
    """A file that is read is not listed any more, and changed."""
    path = context.pick()
    manifest = json.loads((context.folder / MANIFEST).read_text(encoding="utf-8"))
    del manifest["files"][path.name]
    write_json(context.folder / MANIFEST, manifest)
    return Done(what=f"{path.name} unlisted")


def other_names(context: Context) -> Done:
    """Folders beside the checkpoints have names that look like theirs, or lead elsewhere; the pointer, too."""
    checkpoints = context.folder / "checkpoints"
    way = context.random.choice(("pointer", "number", "link", "empty", "file", "leftover", "large", "digits"))
    if way == "pointer":
        hostile = context.random.choice(
            (b"../../outside\n", b"/etc\n", b"\x00", b"x" * 10**6, b"step-9", b"\xff\xfe", b"")
        )
        (checkpoints / "latest").write_bytes(hostile)
    elif way == "link":
        (checkpoints / "step-000009").symlink_to(context.outside)
    elif way == "file":
        (checkpoints / "step-000009").write_text("no folder")
    else:
        names = {
            "number": "step-9",
            "empty": "step-000009",
            "leftover": ".step-000004.1.tmp",
            "large": f"step-{'9' * 200}",
            "digits": "step-٣",
        }
        (checkpoints / names[way]).mkdir()
        if way != "empty":
            (checkpoints / names[way] / MANIFEST).write_text("{}")
    return Done(what=f"checkpoints: {way}")


OF_ANY: dict[str, Mutation] = {
    "bit flipped": flip,
    "cut off": truncate,
    "bytes appended": append,
    "file removed": remove,
    "file swapped": swap,
    "link, pipe, folder": link,
}
OF_FOLDERS: dict[str, Mutation] = {
    "bit flipped, manifest fixed": fixed(flip_known),
    "cut off, manifest fixed": fixed(truncate),
    "bytes appended, manifest fixed": fixed(append),
    "file removed, manifest fixed": fixed(remove),
    "file swapped, manifest fixed": fixed(swap_known),
    "file added, manifest fixed": fixed(add_known),
    "header's size, manifest fixed": fixed(header_size),
    "header's content, manifest fixed": fixed(header_content),
    "header's text, manifest fixed": fixed(header_text),
    "dtype or shape, manifest fixed": fixed(dtype),
    "tensor's name, manifest fixed": fixed(tensor_name),
    "indices, manifest fixed": fixed(indices),
    "selection's header, manifest fixed": fixed(selection_header),
    "JSON's content, manifest fixed": fixed(json_content),
    "JSON's text, manifest fixed": fixed(json_text),
    "manifest's names": manifest_name,
    "manifest's content": manifest_content,
    "file unlisted": unlisted,
}
OF_CHECKPOINTS: dict[str, Mutation] = {"header resealed, manifest fixed": fixed(resealed)}
# Of what lies in a run folder beside the checkpoints, without a manifest.
OF_RUNS: dict[str, Mutation] = {
    "names and pointer": other_names,
    "header's size": header_size,
    "header's content": header_content,
    "header's text": header_text,
    "dtype or shape": dtype,
    "tensor's name": tensor_name,
    "indices": indices,
    "selection's header": selection_header,
    "JSON's content": json_content,
    "JSON's text": json_text,
}
