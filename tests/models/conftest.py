"""What do the tests of models share? Tokenizers that are trained here, in memory, on a few sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nHow many apples does Ada have?\n\n### Input:\n12 and 7\n\n### Response:\n12 + 7 = 19.",
    "Question: Leo has 98 books and gives 5 to Mia. How many are left?\nAnswer: 98 - 5 = 93. The answer is 93.",
    "0 1 2 3 4 5 6 7 8 9 + - * / = dollars nuts baskets {curly} <angle> user assistant",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TokenizerFactory = Callable[..., "PreTrainedTokenizerBase"]


def _train_byte_level(
    *,
    adds_bos: bool = True,
    adds_eos: bool = False,
    eos: str | None = "</s>",
    chat_template: str | None = None,
) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer (every text has ids) of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds_bos or adds_eos:
        form = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        ids = [("<s>", 1)] * adds_bos + [("</s>", 2)] * adds_eos
        tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    given = {} if eos is None else {"eos_token": eos}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", pad_token="<pad>", **given
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def train_tokenizer() -> TokenizerFactory:
    """Makes a byte-level tokenizer: ``train_tokenizer(adds_bos=, adds_eos=, eos=, chat_template=)``."""
    return _train_byte_level


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerBase":
    """A byte-level tokenizer that adds a beginning of sequence, and has a chat template."""
    return _train_byte_level(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> "PreTrainedTokenizerBase":
    """A SentencePiece BPE tokenizer with byte fallback, read from its ``tokenizer.model`` as Llama's are."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder: Path = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in SENTENCES for line in text.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return LlamaTokenizer.from_pretrained(str(folder))
