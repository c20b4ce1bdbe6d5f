"""Do the imports point only downwards, does importing do nothing, and is no file in the way of another?"""

import ast
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_zero

ROOT = Path(__file__).parents[1]
PACKAGES = ("launcher", "models", "sparse_zero")
# What each package may import of the other two.
ALLOWED = {"launcher": {"models", "sparse_zero"}, "models": {"sparse_zero"}, "sparse_zero": set()}
# sparse_zero is a library for any trainer: these belong to the other two.
FOREIGN_TO_LIBRARY = {
    "datasets",
    "matplotlib",
    "peft",
    "pydantic",
    "rich",
    "tokenizers",
    "transformers",
    "yaml",
}
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
# Modules that only another package calls for, which need not be there.
OPTIONAL = {"sparse_zero.layers.triton_kernels": "triton"}
MODULES = [
    name
    for file in FILES
    if file.name != "__main__.py"
    for name in [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")]
    if name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name])
]


def imported_roots(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_there_are_files_to_check() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(PACKAGES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    others = set(imported_roots(file)) & set(PACKAGES) - {package}
    assert others <= ALLOWED[package]
    assert not {"tests", "scripts"} & set(imported_roots(file))


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if "sparse_zero" in file.parts],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_library_needs_only_torch_and_deepspeed(file: Path) -> None:
    assert not set(imported_roots(file)) & FOREIGN_TO_LIBRARY


def test_no_file_beside_the_worker_hides_another_module() -> None:
    """Started as a script, launcher/train.py has its folder first on sys.path."""
    names = {file.stem for file in (ROOT / "launcher").glob("*.py")}
    names |= {folder.name for folder in (ROOT / "launcher").iterdir() if folder.is_dir()}
    third_party = {"torch", "deepspeed", "numpy", *FOREIGN_TO_LIBRARY}
    assert not names & (set(sys.stdlib_module_names) | third_party | set(PACKAGES))


IMPORT_ALL = """
import importlib, os, sys
before = dict(os.environ)
names = sys.argv[1].split(",")
for name in names:
    importlib.import_module(name)
import torch.distributed
assert not torch.distributed.is_initialized(), "a process group exists"
# Libraries may set variables of their own; none of ours may, and none may go.
changed = {key for key in before if os.environ.get(key) != before[key]}
assert not changed, f"changed {changed}"
assert not [key for key in os.environ if key.startswith("SPARSE_ZERO")]
ours = [name for name in names if name.partition(".")[0] in ("launcher", "models", "sparse_zero")]
assert len(ours) == len(names)
"""


def test_invariant_8_importing_every_module_does_nothing(tmp_path: Path) -> None:
    """Invariant 8: no process group, no environment, no output, no file."""
    script = tmp_path / "script" / "import_all.py"
    script.parent.mkdir()
    script.write_text(IMPORT_ALL, encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run(
        [sys.executable, "-B", str(script), ",".join(MODULES)],
        cwd=elsewhere,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == ""
    assert not list(elsewhere.iterdir())


# An environment that knows who asks it: our own modules must not, while they are imported.
NO_ENVIRONMENT = """
import importlib, os, sys
from pathlib import Path
root = Path(sys.argv[2])
real = os.environ
class Guarded(type(real)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename in (os.__file__, "<frozen os>", "<frozen _collections_abc>"):
            frame = frame.f_back
        file = frame.f_code.co_filename
        if any(file.startswith(str(root / package)) for package in ("launcher", "models", "sparse_zero")):
            raise AssertionError(f"{file} reads {key!r} from the environment when imported")
        return super().__getitem__(key)
real.__class__ = Guarded
for name in sys.argv[1].split(","):
    importlib.import_module(name)
"""


def test_importing_reads_no_environment(tmp_path: Path) -> None:
    script = tmp_path / "guarded.py"
    script.write_text(NO_ENVIRONMENT, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-B", str(script), ",".join(MODULES), str(ROOT)],
        cwd=tmp_path,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr


def test_help_needs_no_heavy_library() -> None:
    """Nor does a mistake in the command line, or in a config, wait for one."""
    code = (
        "import sys; from launcher.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert "sparse-zero COMMAND --help" in result.stdout


def test_public_names_are_imported_when_asked_for() -> None:
    """The table that finds them says what type checkers are told, and every one of them is there."""
    tree = ast.parse((ROOT / "sparse_zero" / "__init__.py").read_text(encoding="utf-8"))
    told = {
        node.module.removeprefix("sparse_zero."): tuple(alias.name for alias in node.names)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sparse_zero.")
    }
    assert told == sparse_zero._HOMES
    assert sorted(name for names in told.values() for name in names) == sorted(
        set(sparse_zero.__all__) - {"__version__"}
    )
    for name in sparse_zero.__all__:
        assert not isinstance(getattr(sparse_zero, name), types.ModuleType)
        # Importing a module of that name would put it in the name's place.
        assert not (ROOT / "sparse_zero" / name).exists()
        assert not (ROOT / "sparse_zero" / f"{name}.py").exists()
    assert set(sparse_zero.__all__) <= set(dir(sparse_zero))
    with pytest.raises(AttributeError, match="no attribute 'selekt'"):
        _ = sparse_zero.selekt  # type: ignore[attr-defined]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
