"""What the spawned ranks do in the test of run folders that are not shared: a folder of its own for each pair of ranks."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sparse_zero as sz
from launcher.config import parse_config
from launcher.run_folder import RunFolder
from launcher.same_input import check_same_input, check_same_problems
from launcher.shared_folder import find_folders, share_newest
from launcher.world import World
from models.data import SampleSet, TokenizedSample
from models.gather import gather_json
from models.loading import ModelConfig
from sparse_zero.errors import InputError
from tests.distributed.workers import make_engine, make_model
from tests.sparse_zero.helpers import mixed_selection


def _config(folder: Path, shared: Any, **selection: Any) -> Any:
    return parse_config(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": "d.json"},
            "selection": {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}], **selection},
            "training": {"steps": 1},
            "zero": {},
            "output": {"folder": str(folder), "shared": shared},
        }
    )


def _said(work: Any) -> str:
    try:
        work()
    except InputError as error:
        return str(error)
    except RuntimeError as error:
        return type(error).__name__
    return ""


def share(folder: str) -> dict[str, Any]:
    """Find the folders, refuse what is to be refused, and share checkpoints; all ranks' results."""
    rank, root = dist.get_rank(), Path(folder)
    node = root / f"node{rank // 2}"
    node.mkdir(exist_ok=True)
    dist.barrier()
    world = World(
        rank=rank, world_size=dist.get_world_size(), local_rank=rank % 2, device=torch.device("cpu"), launcher="test"
    )
    report: dict[str, Any] = {"together": find_folders(_config(root / "run", True), world).keepers}
    found = find_folders(_config(node / "deeper" / "run", False), world)
    report["keepers"], report["keeps"] = found.keepers, gather_json(found.keeps_folder)
    report["left"] = [path.name for path in root.rglob(".*")]
    report["refused"] = gather_json(_said(lambda: find_folders(_config(node / "run", True), world)))
    full = {"calibration_weights": "full", "full_calibration": {"keep_weights_in": str(node / "kept")}}
    report["kept"] = gather_json(_said(lambda: find_folders(_config(node / "run", False, **full), world)))

    report["input"] = []
    for different in ("nothing", "data.train", "model.name_or_path", "data.test"):
        source = ModelConfig(
            name_or_path=str(root / ("other" if different.startswith("model") and rank == 2 else "model"))
        )
        token = 5 if different == "data.train" and rank == 2 else 4
        sample = SampleSet([TokenizedSample([3, token], [-100, 4])], 0, 0)
        problems = [{"instruction": "1 + 1?", "output": "3" if different == "data.test" and rank == 2 else "2"}]
        told = {"data.train": sample, "data.validation": None, "data.test": problems}
        report["input"].append(gather_json(_said(lambda: check_same_input(_config(node, True), source, told))))  # noqa: B023

    report["problems"] = gather_json(_said(lambda: check_same_problems([{"output": str(rank // 2)}])))

    model = make_model()
    sz.sparsify(model, mixed_selection(model))
    engine = make_engine(model, 2, 1, 1)
    for step in (3, 5):
        sz.save_checkpoint(engine, root / "saved" / f"step-{step:06d}", extra={"step": step})
    folders = RunFolder(node / "run")
    # Node 0 has an older one than node 1, whose newest is damaged, and node 1 has another one of the older's name.
    if rank == 0:
        shutil.copytree(root / "saved" / "step-000003", folders.checkpoint(3))
    if rank == 2:
        shutil.copytree(root / "saved" / "step-000005", folders.checkpoint(5))
        shutil.copytree(root / "saved" / "step-000005", folders.checkpoint(9))
        (folders.checkpoint(9) / "masters.safetensors").write_bytes(b"cut off")
    dist.barrier()
    share_newest(folders, found)
    dist.barrier()
    report["have"] = [
        sorted(path.name for path in (root / name / "run" / "checkpoints").iterdir()) for name in ("node0", "node1")
    ]
    copies = [root / name / "run" / "checkpoints" / "step-000005" for name in ("node0", "node1")]
    report["equal"] = [
        path.name for path in sorted(copies[0].iterdir()) if path.read_bytes() == (copies[1] / path.name).read_bytes()
    ]
    report["files"] = sorted(path.name for path in (root / "saved" / "step-000005").iterdir())
    before = {path: path.stat().st_mtime_ns for path in copies[0].iterdir()}
    dist.barrier()
    share_newest(folders, found)
    report["again"] = before == {path: path.stat().st_mtime_ns for path in copies[0].iterdir()}
    report["read"] = sz.read_checkpoint(copies[0]).extra
    return report
