#!/usr/bin/env python3
"""What does a model learn by full fine-tuning, LoRA or another peer, when all else is as in a run of ours?

The config is that of a run, with a section `peer` in the place of `selection`:

    peer:
      method: lora              # full, frozen, lora, dora, rslora, shira, trainable_tokens
      modules: ["*.self_attn.{q,k,v}_proj"]
      fraction: 0.01            # of the model's parameters; or rank: 8
      head: ["classifier.*"]    # trained whole, beside it

Model, data, their order, batches, loss, schedule, ZeRO engine, training loop and evaluation are the launcher's own, and
the run folder has the same files. It is not continued: one that was stopped is trained anew, one that is complete is
left as it is. Several ranks are started as launcher/train.py is, by torchrun for example.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from launcher.train import run
from scripts.accuracy.peer_config import load_peer_config
from scripts.accuracy.peer_method import PeerTraining
from sparse_zero.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other arguments change the config: --training.steps=100, --peer.rank=8.",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run, with a section peer")
    given, overrides = parser.parse_known_args(arguments)
    try:
        config = load_peer_config(given.config, overrides)
        return run(config, method=PeerTraining(config))
    except InputError as error:
        print(f"train_peer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
