"""What the end-to-end tests of the launcher start from."""

import pytest

from models.word_problems import write_word_problems
from tests.models.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with its tokenizer, and few word problems."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny_llama(folder / "model", tie=True)
    write_word_problems(folder / "data", 40, 8, 10, seed=0)
    return folder
