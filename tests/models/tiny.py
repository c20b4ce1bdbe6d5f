"""What does a model folder for the tests look like? A random Llama of some hundred kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.small_bases import Specials, train_tokenizer

CORPUS = (
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nTom has 12 apples and buys 7 more. How many has Tom?\n\n### Response:\n19",
    "### Input:\nAnswer format: answer1/answer2/answer3\nthe correct answer is answer2",
    "Question: Ann sells 25 of 61 pears. How many are left?\nAnswer: 36",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(*, vocab: int = 384, bos: bool = True, pad: bool = True, pairs: bool = False) -> Any:
    """A byte-level BPE tokenizer, trained on four sentences; ids 0 to 3 are unk, bos, eos and pad.

    With ``pairs`` it writes one text or two as RoBERTa's does.
    """
    specials = Specials(single="<s> $A" if bos else None)
    if pairs:
        specials = Specials(single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>")
    tokenizer = train_tokenizer(CORPUS, vocab, specials)
    if not pad:
        tokenizer.pad_token = None
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(
    *,
    tie: bool = False,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 160,
    vocab: int = 384,
    attention_bias: bool = False,
    seed: int = 0,
) -> Any:
    """A random float32 Llama; the seed alone decides its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        attention_bias=attention_bias,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def write_tiny_llama(
    folder: Path,
    *,
    tie: bool = False,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 160,
    vocab: int = 384,
    attention_bias: bool = False,
    bos: bool = True,
    pad: bool = True,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """Write a tiny random Llama and its tokenizer as a plain transformers folder; returns the folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = tiny_llama(
        tie=tie,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        vocab=vocab,
        attention_bias=attention_bias,
        seed=seed,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(vocab=min(vocab, 384), bos=bos, pad=pad).save_pretrained(folder)
    return folder
