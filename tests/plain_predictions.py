"""What does a model folder answer when plain transformers loads it, without this package?"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, max_new_tokens, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
texts = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
assert not any(name.split(".")[0] in ("sparse_zero", "launcher", "models") for name in sys.modules)
print(json.dumps([type(model).__name__, texts]))
"""


def plain_predictions(folder: Path, prompts: Sequence[str], max_new_tokens: int) -> tuple[str, list[str]]:
    """(class of the model, greedy answers), from another process that cannot import this package's checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), str(max_new_tokens), json.dumps(list(prompts))],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    name, texts = json.loads(done.stdout.splitlines()[-1])
    return name, texts
