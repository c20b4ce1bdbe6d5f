"""How is a small model of a given family made from nothing: random weights, and a tokenizer that belongs to it?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Ids of the special tokens of every tokenizer made here.
UNKNOWN, BEGIN, END, PAD = range(4)
# Of the generated text that a tokenizer is trained on.
_NUM_CHARACTERS = 60_000


@dataclass(frozen=True, kw_only=True)
class Specials:
    """What a family calls its special tokens, by their ids, and where they stand."""

    # Of ids 0 to 3, and of those that follow.
    tokens: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<pad>")
    # Around one text and two; $A and $B are the texts. None: nothing is added.
    single: str | None = "<s> $A"
    pair: str | None = None
    mask: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes the small models of one model type."""

    specials: Specials = field(default_factory=Specials)
    # An encoder is written as published ones are, with the head that predicts masked tokens.
    encodes: bool = False
    # Settings of the config beyond the sizes.
    settings: Mapping[str, Any] = field(default_factory=dict)
    # Positions that the embedding has beyond those of tokens.
    more_positions: int = 0


# As published models of these families have them: bloom and gpt_neox add no beginning of sequence.
_ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "bloom": Family(specials=Specials(single=None)),
    "gpt_neox": Family(specials=Specials(single=None)),
    "bert": Family(
        specials=Specials(
            tokens=("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"),
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            mask="[MASK]",
        ),
        encodes=True,
        settings=_ENCODER,
    ),
    "roberta": Family(
        specials=Specials(
            tokens=("<unk>", "<s>", "</s>", "<pad>", "<mask>"),
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            mask="<mask>",
        ),
        encodes=True,
        settings={**_ENCODER, "type_vocab_size": 1},
        # Positions are counted from behind the id of padding.
        more_positions=PAD + 1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a small model is."""

    hidden: int = 64
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    vocab: int = 512
    positions: int = 512

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "layers", "heads", "vocab", "positions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden % self.heads:
            raise InputError(f"hidden is {self.hidden}, which {self.heads} heads do not divide: give a multiple")
        if self.hidden // self.heads % 2:
            raise InputError(
                f"hidden is {self.hidden} and heads is {self.heads}: a head of {self.hidden // self.heads} has no "
                "halves, which rotary positions need; give an even one"
            )
        if self.vocab < 264:
            raise InputError(f"vocab is {self.vocab}: 256 bytes and the special tokens need at least 264")


def train_tokenizer(
    texts: Iterable[str], vocab: int, specials: Specials, *, split_digits: bool = True
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer: every text has ids, and comes back as it was.

    Args:
        texts: trained on; equal texts give equal tokenizers.
        vocab: tokens at most; short texts give fewer.
        specials: of the family.
        split_digits: every digit a token of its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_of])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(specials.tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if specials.single is not None:
        ids = [(token, number) for number, token in enumerate(specials.tokens)]
        backend.post_processor = processors.TemplateProcessing(
            single=specials.single, pair=specials.pair, special_tokens=ids
        )
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), specials.tokens, strict=False))
    if specials.mask is not None:
        names |= {"mask_token": specials.mask, "cls_token": specials.tokens[BEGIN], "sep_token": specials.tokens[END]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_small_model(family: str, sizes: Sizes, seed: int) -> PreTrainedModel:
    """A random model in fp32; the seed alone decides its weights.

    Raises:
        InputError: the family is not known here.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    known = find_family(family)
    config = AutoConfig.for_model(
        family,
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.positions + known.more_positions,
        unk_token_id=UNKNOWN,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
        **known.settings,
    )
    kind = AutoModelForMaskedLM if known.encodes else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind.from_config(config).float().eval()
    return model


def find_family(name: str) -> Family:
    """The family of this model type.

    Raises:
        InputError: it is not known here.
    """
    if name not in FAMILIES:
        raise InputError(f"family is {name!r}: choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def write_small_base(family: str, folder: Path, sizes: Sizes, seed: int) -> int:
    """Write a random model of a family with its tokenizer, as a plain folder of transformers; its parameters.

    Raises:
        InputError: the family is not known, or the folder holds something, or cannot be written.
    """
    from models.generated_text import generate_documents

    known = find_family(family)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"folder is {str(folder)!r}, which is not empty: name a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder is {str(folder)!r}: it cannot be made ({error.strerror}); name another") from error
    model = make_small_model(family, sizes, seed)
    tokenizer = train_tokenizer(generate_documents(_NUM_CHARACTERS, seed), sizes.vocab, known.specials)
    tokenizer.model_max_length = sizes.positions
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
