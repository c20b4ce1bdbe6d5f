"""Which function of a sample is it whose gradient makes the kernel? A model, and a head or a prompt's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scripts.ntk.measures import ridge_fit
from scripts.ntk.samples import LabelledText
from scripts.ntk.study_config import FunctionConfig, Head
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

# What the model is called with: tensors of one sample, [1, tokens].
Inputs = dict[str, Tensor]


class SampleFunction(nn.Module):
    """f(inputs) [C] of one sample: C is 1 for two classes, whose difference it is, else one output per class.

    Args:
        base: whose parameters the kernel is of.
        weight: [C, features] of a linear head that is no part of it, or None.
        tokens: [classes] of the answers, whose logits are taken, or None.
        mask_token: at whose place they are taken; None: at the last token.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        weight: Tensor | None = None,
        tokens: Tensor | None = None,
        mask_token: int | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.tokens, self.mask_token = tokens, mask_token
        self.weight: Tensor | None
        self.register_buffer("weight", weight)

    def features(self, inputs: Inputs) -> Tensor:
        """[features]: the last states, averaged over the tokens."""
        states: Tensor = self.base(**inputs).last_hidden_state
        return states[0].mean(0)

    def forward(self, inputs: Inputs) -> Tensor:
        """[C] outputs of one sample."""
        if self.weight is not None:
            return self.weight @ self.features(inputs)
        if self.tokens is None:
            logits = self.base(**inputs).logits[0]
        elif self.mask_token is None:
            # Of the last token alone: the others' logits would take the memory of a vocabulary each.
            logits = self.base(**inputs, logits_to_keep=1).logits[0, -1, self.tokens]
        else:
            place = int((inputs["input_ids"][0] == self.mask_token).nonzero()[0, 0])
            logits = self.base(**inputs).logits[0, place, self.tokens]
        return logits[1:] - logits[:1] if len(logits) == 2 else logits

    def loss(self, inputs: Inputs, label: int) -> Tensor:
        """Cross entropy; of two classes with the difference as logit."""
        outputs = self(inputs)
        logits = torch.cat([torch.zeros_like(outputs), outputs]) if len(outputs) == 1 else outputs
        return nn.functional.cross_entropy(logits, torch.tensor(label))


def fitted_head(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[C, features] by ridge regression, chosen by leave-one-out; rows of length one.

    Args:
        features: [N, features] of the training samples.
        labels: [N] class numbers.
        num_classes: of which two make one row.
    """
    centred = features.double() - features.double().mean(0)
    fit = ridge_fit(centred @ centred.T, labels, num_classes)
    return _rows_of_length_one(fit.weights.T @ centred).to(features.dtype)


def random_head(num_features: int, num_classes: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[C, features] of random directions; rows of length one."""
    generator = torch.Generator().manual_seed(seed)
    return _rows_of_length_one(torch.randn(num_classes, num_features, generator=generator)).to(dtype)


def _rows_of_length_one(of_classes: Tensor) -> Tensor:
    rows = of_classes[1:] - of_classes[:1] if len(of_classes) == 2 else of_classes
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no table of missing weights, which are looked at here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class TextFunctions:
    """A loaded model and its tokenizer, and the functions that a study asks of them.

    Raises:
        InputError: the model, its head, its tokenizer or a word of the answers is not there.
    """

    def __init__(self, config: FunctionConfig, folder: Path, num_classes: int, dtype: str) -> None:
        import transformers

        self.config, self.num_classes = config, num_classes
        if config.answers and len(config.answers) != num_classes:
            raise InputError(f"model.answers has {len(config.answers)} words for {num_classes} classes: give one each")
        kinds = {
            "probe": transformers.AutoModel,
            "sequence_classification": transformers.AutoModelForSequenceClassification,
            "causal_lm": transformers.AutoModelForCausalLM,
            "masked_lm": transformers.AutoModelForMaskedLM,
        }
        try:
            with _quiet():
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
                # Per-sample gradients ask for an attention of plain products, which any transform understands.
                self.base, info = kinds[config.function].from_pretrained(
                    folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
                )
        except (OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise InputError(
                f"model.name_or_path is {config.name_or_path!r}, which is no {config.function}: {line}"
            ) from error
        needed = (name for name in info["missing_keys"] if "pooler" not in name or config.function != "probe")
        missing = sorted(needed)
        if missing:
            raise InputError(
                f"model.function is {config.function}: {folder} has no {missing[0]}; choose another function, such as "
                "probe, or train the head first"
            )
        if config.function == "probe" and getattr(self.base, "pooler", None) is not None:
            self.base.pooler = None  # It takes no part in the states' mean.
        if config.function == "sequence_classification" and self.base.config.num_labels != num_classes:
            raise InputError(
                f"{folder} has {self.base.config.num_labels} labels, and the data {num_classes}: use others"
            )
        self.base.eval().requires_grad_(False)
        self.tokens = self._answer_tokens() if config.answers else None
        self.mask_token: int | None = None
        if config.function == "masked_lm":
            self.mask_token = self.tokenizer.mask_token_id
            if self.mask_token is None:
                raise InputError(f"model.function is masked_lm, and the tokenizer of {folder} has no mask token")

    def _answer_tokens(self) -> Tensor:
        tokens = []
        for answer in self.config.answers:
            found = self.tokenizer.encode(answer, add_special_tokens=False)
            if len(found) != 1:
                raise InputError(f"model.answers has {answer!r}, which is {len(found)} tokens: give words of one token")
            tokens.append(found[0])
        if len(set(tokens)) != len(tokens):
            raise InputError(f"model.answers is {list(self.config.answers)}, of which two are the same token")
        return torch.tensor(tokens)

    def inputs(self, sample: LabelledText) -> Inputs:
        """The tensors of a sample, without padding."""
        config = self.config
        if config.answers:
            around = config.template.replace("{text}", "").replace("{second}", "")
            room = config.max_length - len(self.tokenizer.encode(around.replace("{mask}", "")))
            texts = [text for text in (sample.text, sample.second) if text is not None]
            cut = [self._cut(text, max(1, room // len(texts) - 2)) for text in texts]
            prompt = config.template.replace("{mask}", self.tokenizer.mask_token or "").replace("{text}", cut[0])
            pair = [prompt.replace("{second}", cut[-1])]
        else:
            pair = [sample.text] if sample.second is None else [sample.text, sample.second]
        encoded = self.tokenizer(*pair, truncation=True, max_length=config.max_length, return_tensors="pt")
        # No mask: a sample stands alone, and nothing of it is padding.
        return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}

    def _cut(self, text: str, num_tokens: int) -> str:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return text if len(tokens) <= num_tokens else str(self.tokenizer.decode(tokens[:num_tokens]))

    def function(self, head: Head | None, samples: Sequence[Inputs], labels: Tensor, seed: int) -> SampleFunction:
        """The function; ``samples`` and ``labels`` are those that a fitted head is fitted on."""
        if self.config.function != "probe":
            return SampleFunction(self.base, tokens=self.tokens, mask_token=self.mask_token)
        plain = SampleFunction(self.base)
        with torch.no_grad():
            features = torch.stack([plain.features(inputs) for inputs in samples])
        if head == "fitted":
            return SampleFunction(self.base, weight=fitted_head(features, labels, self.num_classes))
        weight = random_head(features.shape[1], self.num_classes, seed, features.dtype)
        return SampleFunction(self.base, weight=weight)
