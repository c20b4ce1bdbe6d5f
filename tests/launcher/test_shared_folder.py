"""Are ranks told apart by the folders that they see, and does every folder get what a start needs?"""

import json
import shutil

from tests.distributed.spawn import run_ranks
from tests.models.tiny import write_tiny_llama


def test_ranks_that_see_one_folder_have_one_keeper_and_the_newest_checkpoint_travels(tmp_path):
    write_tiny_llama(tmp_path / "model", layers=1)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    report = run_ranks("tests.launcher.shared_folder_workers:share", 3, folder=str(tmp_path))
    assert report["together"] == [0]
    assert report["keepers"] == [0, 2]
    assert report["keeps"] == [True, False, True]
    assert report["left"] == []
    for said in report["refused"]:
        assert "output.shared is true, but output.folder" in said
        assert "of ranks 2 is not that of rank 0" in said
    for said in report["kept"]:
        assert "keep_weights_in" in said
    assert report["input"][0] == [""] * 3
    for field, said in zip(
        ["data.train", "model.name_or_path", "data.test", "data.test"],
        [*report["input"][1:], report["problems"]],
        strict=True,
    ):
        assert len(set(said)) == 1
        assert f"{field} is not the same for ranks 2 as for rank 0" in said[0]
    # The damaged one is left to the start, which names it.
    assert report["have"] == [["step-000003", "step-000005"], ["step-000005", "step-000009"]]
    assert report["equal"] == report["files"]
    assert report["again"]
    assert report["read"] == {"step": 5}
