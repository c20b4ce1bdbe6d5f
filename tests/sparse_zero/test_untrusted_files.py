"""Is everything that a file says bounded and checked before it is believed, and are our own files as open as the umask?"""

import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sparse_zero as sz
from sparse_zero.checkpoint import headers
from sparse_zero.checkpoint.folders import check_folder, new_folder
from sparse_zero.errors import InputError
from sparse_zero.fields import FieldError, Fields
from sparse_zero.files import (
    MAX_JSON_DEPTH,
    MAX_TENSORS_HEADER_BYTES,
    atomic_write_json,
    follow_umask,
    parse_json,
    read_bytes,
    read_json,
    read_safetensors,
    read_safetensors_header,
    write_safetensors,
)
from sparse_zero.layers.retired import Retired, RetiredEntries
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection

DIGEST = "0123456789abcdef" * 4


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"b": {"a": 1, "a": 2}}', "'a' stands twice"),
        ("[NaN]", "infinite or NaN"),
        ("[-Infinity]", "infinite or NaN"),
        ("[1e999]", "infinite or NaN"),
        ("[9223372036854775808]", "more than 63 bits"),
        ("[" + "1" * 5000 + "]", "digits"),
        ('["\\ud800"]', "surrogates not allowed"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        (b'["\xff"]', "codec can't decode"),
        ("[" * 65 + "]" * 65, "levels deep"),
        ("[" * 1_000_000, "levels deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "levels deep"),
    ],
)
def test_strict_json_refuses_what_we_never_write(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text, strict=True)


def test_json_of_other_programs_may_have_what_ours_has_not() -> None:
    assert parse_json('{"limit": [0.0, Infinity], "model_max_length": 1000000000000000019884624838656}') == {
        "limit": [0.0, float("inf")],
        "model_max_length": 10**30 + 19884624838656,
    }
    deepest = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert json.dumps(parse_json(deepest)) == deepest
    with pytest.raises(ValueError, match="levels deep"):
        parse_json(f"[{deepest}]")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, max_bytes=8) == {"a": 1}
    with pytest.raises(InputError, match=r"x\.json has 8 bytes, more than the 7"):
        read_json(path, max_bytes=7)
    os.mkfifo(tmp_path / "pipe")  # Would be waited for.
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless", "."):
        with pytest.raises(InputError, match="no regular file"):
            read_bytes(tmp_path / name, 100)
    with pytest.raises(InputError, match="null byte"):
        read_bytes(Path("a\x00b"), 100)


# --- safetensors ------------------------------------------------------------------------------------------------------


def raw(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    as_list = [list(each) if isinstance(each, tuple) else each for each in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


EIGHT = b"\0" * 8
TWO = {"a": tensor(), "b": tensor(offsets=(4, 12))}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\0\0\0", "3 bytes"),
        (raw(b"{}", size=2**63), "header would take 9223372036854775808"),
        (raw(b"{}" + b" " * 100, size=10**6), "header would take 1000000"),
        (raw(b"[]"), "no object"),
        (raw(b"\xff"), "codec"),
        (raw(b"[" * 100_000), "levels deep"),
        (raw({"a": tensor()}, EIGHT + b"\0"), "bytes, where its header needs"),
        (raw({"a": tensor()}, EIGHT[:-1]), "bytes, where its header needs"),
        (raw({"a": {**tensor(), "more": 1}}, EIGHT), "not described by"),
        (raw({"a": [1]}, EIGHT), "not described by"),
        (raw({"a": tensor(dtype="C64", shape=(1,))}, EIGHT), "dtype 'C64'"),
        (raw({"a": tensor(dtype=7)}, EIGHT), "dtype '7'"),
        (raw({"a": tensor(shape=(-2,))}, EIGHT), "no counts"),
        (raw({"a": tensor(shape=(2.0,))}, EIGHT), "no counts"),
        (raw({"a": tensor(shape=(True, 2))}, EIGHT), "no counts"),
        (raw({"a": tensor(shape="22")}, EIGHT), "no counts"),
        (raw({"a": tensor(offsets=(0, 8, 8))}, EIGHT), "no tensor has"),
        (raw({"a": tensor(shape=(2,) + (1,) * 8)}, EIGHT), "no tensor has"),
        (raw({"a": tensor(shape=(2**32, 2**32))}, EIGHT), "no tensor has"),
        (raw({"a": tensor(shape=(0, 2**62, 4), offsets=(0, 0))}), "no tensor has"),
        (raw({"a": tensor(shape=(3,))}, EIGHT), "another size than its bytes"),
        (raw({"a": tensor(shape=(1,), offsets=(8, 4))}, EIGHT), "another size than its bytes"),
        (raw(TWO, EIGHT * 2), "overlap"),
        (raw({"a": tensor(offsets=(4, 12))}, EIGHT * 2), "leave bytes"),
        (raw({"__metadata__": {"format": 1}}), "metadata that are no texts"),
        (raw({"__metadata__": "format"}), "metadata that are no texts"),
        (raw(b'{"a": ' + json.dumps(tensor()).encode() + b', "a": ' + json.dumps(tensor()).encode() + b"}", EIGHT), "twice"),
    ],
)  # fmt: skip
def test_a_safetensors_header_is_checked_before_the_library_reads_it(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.safetensors is no complete safetensors file \(.*{says}"):
        read_safetensors_header(path)
    with pytest.raises(InputError, match="no complete safetensors file"):
        read_safetensors(path, "test")


def test_headers_of_real_files_pass_and_large_ones_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written = {f"t{number}": torch.zeros(number % 3, 2, dtype=torch.bfloat16) for number in range(50)}
    write_safetensors(path, written, {"format": "test"})
    entries, metadata = read_safetensors_header(path)
    assert metadata == {"format": "test"}
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        name: ("BF16", tuple(each.shape)) for name, each in written.items()
    }
    with path.open("wb") as file:  # Sparse: nothing is allocated by the file system, or by us.
        file.write(struct.pack("<Q", MAX_TENSORS_HEADER_BYTES + 1))
        file.truncate(MAX_TENSORS_HEADER_BYTES + 100)
    with pytest.raises(InputError, match="a header of 67108865 bytes, more than"):
        read_safetensors_header(path)


# --- fields and headers -----------------------------------------------------------------------------------------------


def test_fields_are_taken_by_type_and_none_is_left() -> None:
    fields = Fields({"n": True, "low": -1, "s": "x", "f": 2, "list": [1, "2"], "none": None}, "the header")
    for take, says in [
        (lambda: fields.whole("n"), "the header has n True instead of a whole number"),
        (lambda: fields.whole("low"), "low -1 instead of a whole number from 0"),
        (lambda: fields.sha256("s"), "s 'x' instead of 64 hexadecimal digits"),
        (lambda: fields.number("f", 3.0, 4.0), "f 2 instead of a number from 3 to 4"),
        (lambda: fields.texts("list"), "instead of a list of texts"),
        (lambda: fields.mapping("none"), "none None instead of an object"),
        (lambda: fields.anything("gone"), "the header has no gone"),
        (lambda: Fields([], "the header"), r"the header is \[\] instead of an object"),
    ]:
        with pytest.raises(FieldError, match=says):
            take()
    with pytest.raises(FieldError, match=r"field 'x+…, which is unknown"):
        Fields({"x" * 500: 1}, "it").end()


def checkpoint_header(**changes: Any) -> dict[str, Any]:
    content = {
        "format": "sparse_zero.checkpoint",
        "version": 4,
        "optimizer_step": 3,
        "optimizer": {"name": "adamw", "states": ["exp_avg", "exp_avg_sq"]},
        "loss_scale": None,
        "schedule": None,
        "placement": "inplace",
        "base": {"name": "a", "sha256": DIGEST},
        "base_fingerprints": {"q.weight": {"row": DIGEST}},
        "extra": {"step": 3},
        "config": None,
        "rng": None,
        "selection_digest": DIGEST,
        **changes,
    }
    return headers.sealed(content, {"q.values_row": torch.zeros(4)})


SCALE = {"cur_scale": 2.0, "cur_iter": 1, "last_overflow_iter": -1, "cur_hysteresis": 1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 5}, "version 5, not 'sparse_zero.checkpoint' up to 4"),
        ({"version": True}, "version True"),
        ({"format": ["sparse_zero.checkpoint"]}, "format"),
        ({"optimizer_step": -1}, "optimizer_step -1"),
        ({"optimizer_step": 2**60}, "optimizer_step"),
        ({"optimizer_step": 3.0}, "optimizer_step 3.0"),
        ({"optimizer": None}, "optimizer None"),
        ({"optimizer": {"name": "adamw", "states": ["b", "a"]}}, "each name once, sorted"),
        ({"optimizer": {"name": "../x", "states": []}}, "name '../x'"),
        ({"loss_scale": {**SCALE, "cur_scale": 0}}, "cur_scale 0"),
        ({"loss_scale": {**SCALE, "cur_iter": "1"}}, "cur_iter '1'"),
        ({"loss_scale": {"cur_scale": 1}}, "no cur_iter"),
        ({"placement": "outside"}, "placement 'outside' instead of one of inplace, delta"),
        ({"placement": ["inplace"]}, "placement"),
        ({"base": {"name": "a", "sha256": "A" * 64}}, "64 hexadecimal digits"),
        ({"base": {"name": "a", "sha256": DIGEST, "path": "/"}}, "field 'path'"),
        ({"base_fingerprints": {"q.weight": {"diagonal": DIGEST}}}, "field 'diagonal'"),
        ({"base_fingerprints": {"q.weight": DIGEST}}, "instead of an object"),
        ({"extra": []}, r"extra \[\]"),
        ({"config": "yaml"}, "config 'yaml'"),
        ({"rng": {"ranks": 0, "streams": []}}, "ranks 0"),
        ({"selection_digest": ""}, "selection_digest ''"),
        ({"more": 1}, "field 'more'"),
    ],
)
def test_a_checkpoints_header_with_a_wrong_field_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    headers.parse_checkpoint_header(checkpoint_header(loss_scale=SCALE), tmp_path)
    with pytest.raises(InputError, match=says):
        headers.parse_checkpoint_header(checkpoint_header(**changes), tmp_path)


def test_a_header_that_was_changed_does_not_match_its_seal(tmp_path: Path) -> None:
    whole = checkpoint_header()
    assert headers.parse_checkpoint_header(json.loads(json.dumps(whole)), tmp_path).optimizer_step == 3
    for change in ({"optimizer_step": 4}, {"extra": {"step": 4}}, {"masters_sha256": DIGEST}):
        with pytest.raises(InputError, match="does not match its own state_id"):
            headers.parse_checkpoint_header({**whole, **change}, tmp_path)
    for name in whole:
        with pytest.raises(InputError):
            headers.parse_checkpoint_header({key: each for key, each in whole.items() if key != name}, tmp_path)
    with pytest.raises(InputError, match="instead of an object with fields"):
        headers.parse_checkpoint_header([whole], tmp_path)


def test_older_formats_have_their_own_fields(tmp_path: Path) -> None:
    new = ("schedule", "config", "rng", "selection_digest", "masters_sha256", "state_id")
    third = {name: each for name, each in checkpoint_header(version=3).items() if name not in new}
    assert headers.parse_checkpoint_header(third, tmp_path).optimizers == ("adamw",)
    first = {name: each for name, each in third.items() if name not in ("optimizer", "loss_scale")}
    found = headers.parse_checkpoint_header({**first, "version": 1}, tmp_path)
    assert (found.optimizers, found.optimizer_states, found.loss_scale) == (("adamw", "adam"), None, None)
    with pytest.raises(InputError, match="has no optimizer"):
        headers.parse_checkpoint_header(first, tmp_path)
    with pytest.raises(InputError, match="field 'state_id'"):
        headers.parse_checkpoint_header({**third, "state_id": DIGEST}, tmp_path)


# --- folders ----------------------------------------------------------------------------------------------------------

HOSTILE_NAMES = ["/etc/passwd", "..", ".", "", "a/../b", "../b", "a//b", "a\\b", "C:b", "a\x00", "a\n", "x" * 256, "a/"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_in_a_manifest_do_not_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="may lie outside of the folder"):
        headers.parse_manifest({"files": {name: {"bytes": 1, "sha256": DIGEST}}}, tmp_path / "manifest.json")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("content")
        (temporary / "inside").mkdir()
        (temporary / "inside" / "file").write_text("more")
    return tmp_path / "folder"


def to_link(path: Path, target: str | Path) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["file", "inside/file", "manifest.json"])
def test_links_out_of_a_folder_are_not_followed(name: str, written: Path) -> None:
    outside = written.parent / "outside"
    outside.write_bytes((written / name).read_bytes())
    to_link(written / name, outside)
    with pytest.raises(InputError, match="link that leads out of its folder"):
        check_folder(written, "adapter")
    to_link(written / name, written / name)
    with pytest.raises(InputError, match=r"cannot be followed|is no adapter"):
        check_folder(written, "adapter")


def test_links_inside_a_folder_and_of_the_hubs_cache_are_followed(written: Path) -> None:
    (written / "file").rename(written / "other")
    (written / "file").symlink_to("other")
    assert set(check_folder(written, "adapter")) == {"file", "inside/file"}
    repository = written.parent / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    written.rename(snapshot)
    (repository / "blobs").mkdir()
    for name in ("file", "manifest.json"):
        blob = repository / "blobs" / name
        blob.write_bytes((snapshot / name).read_bytes())
        to_link(snapshot / name, f"../../blobs/{name}")
    assert set(check_folder(snapshot, "adapter")) == {"file", "inside/file"}
    to_link(snapshot / "file", "../../../blobs")
    with pytest.raises(InputError, match="leads out"):
        check_folder(snapshot, "adapter")


def test_what_is_read_must_be_listed_and_the_rest_may_lie_beside(written: Path) -> None:
    (written / "README.md").write_text("a card")
    (written / "retired").write_text("not listed")
    check_folder(written, "adapter", reads=("file", "gone"))
    with pytest.raises(InputError, match="does not list retired"):
        check_folder(written, "adapter", reads=("file", "retired"))


# --- tensors ----------------------------------------------------------------------------------------------------------


def a_selection() -> Selection:
    return Selection(
        {
            "m.q.weight": WeightSelection(shape=(4, 6), rows=[1], block_size=2, blocks=[[0, 0], [1, 2]]),
            "m.up[1]": WeightSelection(shape=(3, 3), columns=[0]),
            "m.norm.weight": WeightSelection(shape=(5, 1), whole=True),
        }
    )


def its_values() -> dict[str, torch.Tensor]:
    lengths = {
        "m.q.values_block": 8, "m.q.values_row": 4, "m.sparse_up.values_column": 3, "m.norm.sparse_weight.values_whole": 5,
    }  # fmt: skip
    return {name: torch.zeros(length) for name, length in lengths.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.pop("m.q.values_row"), "no values m.q.values_row"),
        (lambda values: values.pop("m.norm.sparse_weight.values_whole"), "no values m.norm.sparse_weight.values_whole"),
        (lambda values: values.update({"m.v.values_row": torch.zeros(4)}), "'m.v.values_row', which its selection"),
        (lambda values: values.update({"m.q.values_row": torch.zeros(5)}), r"\(5,\), and its selection asks for"),
        (lambda values: values.update({"m.q.values_row": torch.zeros(4, 1)}), r"\(4, 1\), and"),
        (lambda values: values.update({"m.q.values_row": torch.zeros(4, dtype=torch.int32)}), "torch.int32"),
        (lambda values: values.update({"m.q.sparse_weight.values_row": values.pop("m.q.values_row")}), "no values"),
    ],
)
def test_values_are_exactly_those_that_the_selection_asks_for(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, tmp_path: Path
) -> None:
    values = its_values()
    headers.check_values(values, a_selection(), tmp_path, dtypes=(torch.float32,))
    change(values)
    with pytest.raises(InputError, match=says):
        headers.check_values(values, a_selection(), tmp_path, dtypes=(torch.float32,))


def test_states_are_exactly_those_that_the_header_names(tmp_path: Path) -> None:
    masters = its_values()
    states = {"exp_avg": dict(masters), "exp_avg_sq": dict(masters)}
    header = headers.parse_checkpoint_header(checkpoint_header(), tmp_path)
    headers.check_states(states, masters, header, tmp_path)
    at_zero = headers.parse_checkpoint_header(checkpoint_header(optimizer_step=0), tmp_path)
    first = next(iter(masters))
    for wrong, of, says in [
        ({"exp_avg": masters}, header, r"has the states \['exp_avg'\]"),
        (states, at_zero, "after 0 optimizer steps"),
        ({**states, "exp_avg": {**masters, "x": masters[first]}}, header, "exp_avg of 'x', which has no values"),
        ({**states, "exp_avg": {**masters, first: torch.zeros(1)}}, header, "exp_avg of m.q.values_block as"),
        ({name: {first: masters[first]} for name in states}, header, "no state of"),
    ]:
        with pytest.raises(InputError, match=says):
            headers.check_states(wrong, masters, of, tmp_path)


def test_fingerprints_of_the_base_cannot_be_left_out(tmp_path: Path) -> None:
    entries = {"m.q.weight": RetiredEntries(positions=torch.tensor([23]), numbers=torch.ones(1))}
    retired = Retired(placement="delta", entries=entries)
    whole = {
        "m.q.weight": {"block": DIGEST, "row": DIGEST, "retired": DIGEST},
        "m.up": {"column": DIGEST},
        "m.norm.weight": {"whole": DIGEST},
    }
    headers.check_fingerprints(whole, a_selection(), retired, tmp_path)
    for wrong in (
        {},
        {**whole, "m.q.weight": {"block": DIGEST, "row": DIGEST}},
        {**whole, "m.up": {}},
        {**whole, "other.weight": {"row": DIGEST}},
    ):
        with pytest.raises(InputError, match="fingerprints of the base"):
            headers.check_fingerprints(wrong, a_selection(), retired, tmp_path)


# --- selections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, h: t.update({"m.q.weight/rows": torch.tensor([-1], dtype=torch.int32)}), "negative"),
        (lambda t, h: t.update({"m.q.weight/rows": torch.tensor([4], dtype=torch.int32)}), "reach outside"),
        (lambda t, h: t.update({"m.q.weight/rows": torch.tensor([1, 1], dtype=torch.int32)}), "do not ascend"),
        (lambda t, h: t.update({"m.q.weight/rows": torch.tensor([2, 1], dtype=torch.int32)}), "do not ascend"),
        (lambda t, h: t.update({"m.q.weight/rows": torch.tensor([2**40])}), "do not ascend|negative"),
        (lambda t, h: t.update({"m.q.weight/rows": torch.tensor(1, dtype=torch.int32)}), "has rows as torch.int32"),
        (lambda t, h: t.update({"m.q.weight/rows": torch.tensor([1.5])}), "has rows as torch.float32"),
        (lambda t, h: t.update({"m.q.weight/blocks": torch.tensor([0, 0, 1, 2])}), "has blocks as"),
        (lambda t, h: t.update({"m.v.weight/rows": torch.tensor([0])}), "which no weight has"),
        (lambda t, h: h["weights"]["m.q.weight"].update(shape=[2**40, 2**40]), "shape"),
        (lambda t, h: h["weights"]["m.q.weight"].update(shape=[0, 6]), "shape"),
        (lambda t, h: h["weights"]["m.q.weight"].update(shape=[4.0, 6]), "shape"),
        (lambda t, h: h["weights"]["m.q.weight"].update(block_shape=[0, 0]), "2 blocks of"),
        (lambda t, h: h["weights"]["m.norm.weight"].update(whole=1), "whole 1 instead of true or false"),
        (lambda t, h: h["weights"].update({"m.up[x]": h["weights"].pop("m.up[1]")}), "is no name of a weight"),
        (lambda t, h: h["weights"].update({"m.up[01]": h["weights"].pop("m.up[1]")}), "is no name of a weight"),
        (lambda t, h: h["weights"].update({"layers.9999999999.q": h["weights"]["m.norm.weight"]}), "is no name"),
        (lambda t, h: h["weights"].update({"empty": {"shape": [2, 2], "block_shape": [0, 0], "whole": False}}), "own"),
        (lambda t, h: h["metadata"].update(num_layers=10**12), "num_layers"),
        (lambda t, h: h["metadata"].update(base={"name": "a"}), "no sha256"),
        (lambda t, h: h["metadata"].update(groups=[{"modules": "q"}]), "modules 'q'"),
        (lambda t, h: h.update(digest="0" * 64), "does not match its own digest"),
        (lambda t, h: h.update(more=1), "field 'more'"),
    ],
)
def test_a_hostile_selection_is_refused_before_anything_of_its_size_is_made(
    change: Callable[[dict[str, Any], dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "selection.safetensors"
    a_selection().save(path)
    assert Selection.load(path) == a_selection()
    tensors, metadata = read_safetensors(path, "sparse_zero.selection")
    header = json.loads(metadata["header"])
    change(tensors, header)
    write_safetensors(path, tensors, {**metadata, "header": json.dumps(header)})
    with pytest.raises(InputError, match=says) as caught:
        Selection.load(path)
    assert str(path) in str(caught.value)


# --- modes ------------------------------------------------------------------------------------------------------------


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask_whatever_writes_the_files(mask: int, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with umask(mask):
        sz.sparsify(model, Selection({"0.weight": WeightSelection(shape=(4, 4), rows=[1])}))
        sz.save_adapter(model, tmp_path / "adapter")
        atomic_write_json(tmp_path / "x.json", {})
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
        with new_folder(tmp_path / "merged", manifest=False) as temporary:
            (temporary / "inside").mkdir(mode=0o700)
            save_file({"a": torch.zeros(1)}, temporary / "inside" / "model.safetensors")
            (temporary / "script").touch()
            (temporary / "script").chmod(0o700)
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").touch(0o600)
        follow_umask(tmp_path / "made")
    found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*")}
    assert {"adapter/selection.safetensors", "adapter/manifest.json", "merged/inside/model.safetensors"} <= set(found)
    assert not [name for name in found if ".tmp" in name or ".mode" in name]
    for name, path in found.items():
        wanted = 0o777 if path.is_dir() or name == "merged/script" else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~mask, name
