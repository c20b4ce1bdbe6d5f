"""Do the lines of docs/integrations.md and docs/precision.md run as they stand?"""

import json
import re
from pathlib import Path

import pytest

from tests.distributed.spawn import run_ranks
from tests.models.tiny import write_tiny_llama

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "integrations.md"


def snippets() -> dict[str, str]:
    """Python code by the heading that it stands under."""
    found = re.findall(r"^## (\w+)\n.*?^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return dict(found)


def test_the_lines_of_the_page_run(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'sparse-zero[trl]'")
    code = snippets()
    assert list(code) == ["Trainer", "SFTTrainer", "accelerate"]
    write_tiny_llama(tmp_path / "base", layers=2)
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    run_ranks("tests.integrations.workers:run_snippets", 1, folder=str(tmp_path), snippets=list(code.values()))
    for adapter in ("out/adapter", "out/checkpoint-2/adapter", "sft/adapter", "state/adapter", "adapter"):
        assert (tmp_path / adapter / "adapter.json").is_file(), adapter
    assert (tmp_path / "state" / "checkpoint.json").is_file()
    assert not (tmp_path / "out" / "checkpoint-2" / "config.json").exists()


def test_an_optimizer_is_made_as_the_page_says():
    (code,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "precision.md").read_text(encoding="utf-8"), re.M | re.S)
    assert run_ranks("tests.integrations.workers:run_optimizer_snippet", 1, code=code) == "AdamW"
