"""Train the runs of a JSON file, [[config, overrides], ...], each in a process of its own that has all imports already."""

import json
import multiprocessing
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - before the processes part: importing takes longer than two steps
import transformers  # noqa: F401

from launcher.config import load_config
from launcher.train import run


def train(config: str, overrides: list[str]) -> None:
    """One run, from its config to its adapter."""
    sys.exit(run(load_config(config, overrides)))


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    for each in json.loads(Path(sys.argv[1]).read_text()):
        process = context.Process(target=train, args=each)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{each[0]} ended with {process.exitcode}")
