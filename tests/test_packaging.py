"""Does the wheel hold what it should, install, and run from anywhere; and do the versions fit together?"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
IGNORED = ("__pycache__", ".egg-info", ".git", ".venv")


def run(*command: str, cwd: Path, pythonpath: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for package in ("launcher", "models", "sparse_zero", "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns(*IGNORED))
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*build, "--wheel-dir", str(out), str(copy), cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it."""
    target = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target)]
    run(*install, str(wheel), cwd=target)
    return target


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(ROOT))
        for package in ("launcher", "models", "sparse_zero")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and (file.suffix == ".py" or file.name == "py.typed")
    }
    assert code == expected
    assert {f"{package}/py.typed" for package in ("launcher", "models", "sparse_zero")} <= code
    assert any(name.endswith("LICENSE") for name in names)


def test_metadata(wheel: Path, installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    metadata = distribution.metadata
    assert metadata["Name"] == "sparse-zero"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    version = re.search(r'__version__ = "(.+)"', (ROOT / "sparse_zero" / "__init__.py").read_text(encoding="utf-8"))
    assert version is not None
    assert metadata["Version"] == version[1]
    assert wheel.name == f"sparse_zero-{version[1]}-py3-none-any.whl"
    assert set(metadata.get_all("Provides-Extra") or []) == {
        "dev",
        "liger",
        "peft",
        "plots",
        "quant",
        "studies",
        "tracking",
        "trl",
    }


def test_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "sparse-zero")
    assert "sparse-zero COMMAND --help" in run(sys.executable, command, "--help", cwd=tmp_path, pythonpath=installed)
    code = (
        "from launcher.starting.command_line import script_file as f; import sparse_zero; "
        "print(sparse_zero.__file__, f('launcher.train'), f('launcher.starting.start_rank'), sep='\\n')"
    )
    start = installed / "launcher" / "starting" / "start_rank.py"
    lines = run(sys.executable, "-c", code, cwd=tmp_path, pythonpath=installed).splitlines()
    assert lines == [
        str(installed / "sparse_zero" / "__init__.py"),
        str(installed / "launcher" / "train.py"),
        str(start),
    ]


def requirements() -> list[Requirement]:
    """What setup.py asks for, extras included, read without installing."""
    code = (
        "import json, setuptools\n"
        "found = {}\n"
        "setuptools.setup = lambda **given: found.update(given)\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': 'setup'})\n"
        "print(json.dumps([*found['install_requires'], *sum(found['extras_require'].values(), [])]))\n"
    )
    return [Requirement(text) for text in json.loads(run(sys.executable, "-c", code, cwd=ROOT))]


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins: dict[str, Version] = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"{line!r} pins no plain version"
            pins[normalized(match[1])] = Version(match[2])
    return pins


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_has_a_tested_version_that_fits() -> None:
    pins = constraints()
    asked = requirements()
    assert len(asked) > 15
    for requirement in asked:
        assert pins[normalized(requirement.name)] in requirement.specifier, requirement


def test_tests_run_with_the_tested_versions() -> None:
    """A pin that nothing ran with says nothing. torch may be another: scripts/install.sh keeps a present one."""
    different = {}
    for name, pin in constraints().items():
        try:
            version = Version(importlib.metadata.version(name)).public
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
        if name != "torch" and version != str(pin):
            different[name] = (version, str(pin))
    assert not different


def test_scripts_are_valid_and_executable() -> None:
    scripts = [ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
    assert {"install.sh", "run", "test.sh"} <= {script.name for script in scripts}
    for script in scripts:
        run("bash", "-n", str(script), cwd=ROOT)
        assert os.access(script, os.X_OK), script
        assert "set -euo pipefail" in script.read_text(encoding="utf-8"), script
