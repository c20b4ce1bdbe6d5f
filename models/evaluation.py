"""How well does a model answer held-out problems?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.answers import judge, normalize
from models.loading import pad_token_id
from models.problems import check_room, choices_of, first_problems, longest_of, prompts_of
from models.templates import Template
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from models.data import FieldConfig

KINDS = ("generate", "choice", "classify")
Kind = Literal["generate", "choice", "classify"]
# Called after every batch with the problems that this rank has answered and those that it has in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the test problems are answered."""

    # generate: greedy text, whose answer is compared. choice: the likeliest of the record's options. Neither shows the
    # model anything of the record's output. classify: the class that a classifier gives. None: classify with model.task
    # sequence_classification, else generate.
    kind: Kind | None = None
    # Problems answered at once by one rank (with choice: each with all of its options). Decoding is bound by
    # reading the weights, so more is faster until memory ends.
    batch_size: int = 32
    # Tokens generated per problem at most (generate); enough for a sentence and a number.
    max_new_tokens: int = 64
    # Problems evaluated, over all ranks, from the start of the data; None: all.
    limit: int | None = None
    # Answers to choose from (choice); None: those that the record names, as in "Answer format: true/false".
    options: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"data.evaluation.kind is {self.kind!r}: use one of {', '.join(KINDS)}")
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"data.evaluation.{name} is {value}: it must be at least 1")
        if self.options is not None and len(set(self.options)) < 2:
            raise InputError(f"data.evaluation.options is {self.options!r}: give at least two different answers")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was asked and answered in one problem."""

    index: int  # position in the test data
    instruction: str
    answer: str  # the right one
    prediction: str  # the one read from the text, or the chosen option
    text: str  # what was generated; for a choice the response that was likeliest; of a class its probability
    correct: bool


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The answers to all problems, in the order of the data; the same on every rank."""

    kind: Kind
    predictions: tuple[Prediction, ...]
    # Of a classifier: see models.classification.classification_metrics.
    metrics: Mapping[str, float | None] | None = None

    @property
    def num_problems(self) -> int:
        """Problems answered, by all ranks."""
        return len(self.predictions)

    @property
    def correct(self) -> int:
        """Problems answered correctly."""
        return sum(each.correct for each in self.predictions)

    @property
    def accuracy(self) -> float:
        """Share of the problems that were answered correctly, in [0, 1]."""
        return self.correct / self.num_problems


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    config: EvaluationConfig,
    *,
    template: Template,
    fields: FieldConfig,
    rank: int = 0,
    world_size: int = 1,
    lockstep: bool = False,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Answer the problems as ``config.kind`` says. Collective when torch.distributed is initialised.

    Args:
        model: any causal language model of transformers; its linears may have been replaced.
        tokenizer: the model's.
        records: test records with an instruction and an answer; all ranks pass the same ones.
        config: how.
        template: the form of the prompts, the one of training.
        fields: names of the fields of a record.
        rank: this process's, in [0, world_size).
        world_size: processes that share the problems; each holds the whole model, or ``lockstep`` is set.
        lockstep: every rank makes the same number of forward passes, as weights sharded by ZeRO-3 need.
        progress: called after every batch.

    Raises:
        InputError: there is no problem, a prompt exceeds the model's context, or a choice lacks its options.
    """
    if config.kind == "classify":
        raise ValueError("classify has a function of its own, models.classified_evaluation.evaluate_classify")
    run = evaluate_choice if config.kind == "choice" else evaluate_generate
    return run(
        model,
        tokenizer,
        records,
        config,
        template=template,
        fields=fields,
        rank=rank,
        world_size=world_size,
        lockstep=lockstep,
        progress=progress,
    )


def evaluate_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    config: EvaluationConfig,
    *,
    template: Template,
    fields: FieldConfig,
    rank: int = 0,
    world_size: int = 1,
    lockstep: bool = False,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Exact match on greedily generated answers. Arguments and errors as :func:`evaluate`."""
    from transformers import GenerationConfig

    problems = first_problems(records, config)
    prompt_ids = prompts_of(records, tokenizer, config, template=template, fields=fields)
    lengths = [len(ids) for ids in prompt_ids]
    check_room(model, max(lengths), config.max_new_tokens)
    greedy = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=_stop_ids(model, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
    )
    batches = batches_of_rank(lengths, config.batch_size, rank, world_size, lockstep)
    predictions = []
    with evaluating(model, greedy), without_gradients(lockstep):
        for batch, is_real in with_progress(batches, progress):
            input_ids, mask = _left_padded(
                [prompt_ids[index] for index in batch], pad_token_id(tokenizer), model.device
            )
            output = model.generate(input_ids=input_ids, attention_mask=mask, synced_gpus=lockstep)
            if not is_real:
                continue
            texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                predictions.append(_generated(index, problems[index], text, fields))
    return _gathered("generate", predictions)


def evaluate_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    config: EvaluationConfig,
    *,
    template: Template,
    fields: FieldConfig,
    rank: int = 0,
    world_size: int = 1,
    lockstep: bool = False,
    progress: Progress | None = None,
) -> EvaluationResult:
    """The option whose response the model finds likeliest, given the prompt (summed log-probabilities).

    The response of an option is worded as most outputs of the data are ("the correct answer is answer2"), with the
    option in the place of the answer. A record that says more than that, such as how the problem is solved, answers
    with the option alone, and so does one without an output: nothing of its own solution is ever given to the model.
    Arguments and errors as :func:`evaluate`.
    """
    problems = first_problems(records, config)
    choices = choices_of(records, tokenizer, config, template=template, fields=fields)
    lengths = [longest_of(choice) for choice in choices]
    check_room(model, max(lengths))
    batches = batches_of_rank(lengths, config.batch_size, rank, world_size, lockstep)
    predictions = []
    with evaluating(model, None), without_gradients(lockstep):
        for batch, is_real in with_progress(batches, progress):
            rows = [(option.prompt_ids, option.response_ids) for index in batch for option in choices[index]]
            scores = _log_likelihoods(model, rows, pad_token_id(tokenizer))
            for index in batch if is_real else ():
                own, scores = scores[: len(choices[index])], scores[len(choices[index]) :]
                if any(math.isnan(score) for score in own):
                    # A model that has diverged prefers none of them.
                    predictions.append(_chosen(index, problems[index], "", "", fields))
                    continue
                best = choices[index][own.index(max(own))]
                predictions.append(_chosen(index, problems[index], best.option, best.response, fields))
    return _gathered("choice", predictions)


def write_result(path: Path, result: EvaluationResult) -> None:
    """Write a result with every prediction as JSON; the file appears complete or not at all."""
    totals: dict[str, Any] = {
        "kind": result.kind,
        "accuracy": result.accuracy,
        "num_problems": result.num_problems,
        "correct": result.correct,
    }
    if result.metrics is not None:
        totals["metrics"] = dict(result.metrics)
    atomic_write_json(path, totals | {"predictions": [asdict(each) for each in result.predictions]})


def _generated(index: int, record: Mapping[str, str], text: str, fields: FieldConfig) -> Prediction:
    answer = record[fields.answer]
    prediction, correct = judge(text, answer)
    return Prediction(
        index=index,
        instruction=record[fields.instruction],
        answer=answer,
        prediction=prediction,
        text=text.strip(),
        correct=correct,
    )


def _chosen(index: int, record: Mapping[str, str], option: str, text: str, fields: FieldConfig) -> Prediction:
    answer = record[fields.answer]
    return Prediction(
        index=index,
        instruction=record[fields.instruction],
        answer=answer,
        prediction=option,
        text=text,
        correct=normalize(option) == normalize(answer),
    )


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Chat models end a turn with further tokens, which only their generation config names.
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = own if isinstance(own, list) else [own]
    return sorted({int(each) for each in [*own, tokenizer.eos_token_id] if each is not None})


def batches_of_rank(
    lengths: Sequence[int], batch_size: int, rank: int, world_size: int, lockstep: bool
) -> list[tuple[list[int], bool]]:
    """Batches of problems, and whether they count. Longest first: memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    mine = order[rank::world_size]
    batches = [(mine[start : start + batch_size], True) for start in range(0, len(mine), batch_size)]
    if lockstep:
        num_batches = -(-len(order[::world_size]) // batch_size)
        batches += [(order[-1:], False)] * (num_batches - len(batches))
    return batches


def with_progress(
    batches: Sequence[tuple[list[int], bool]], progress: Progress | None
) -> Iterator[tuple[list[int], bool]]:
    total = sum(len(batch) for batch, is_real in batches if is_real)
    done = 0
    for batch, is_real in batches:
        yield batch, is_real
        done += len(batch) if is_real else 0
        if progress is not None:
            progress(done, total)


def _left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [rows, longest]."""
    import torch

    longest = max(len(row) for row in rows)
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _log_likelihoods(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    """log p(response | prompt) of every row, summed over the response's tokens, in float32."""
    import torch

    input_ids, mask = _left_padded([[*prompt, *response] for prompt, response in rows], pad_id, model.device)
    longest = max(len(response) for _, response in rows)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if "position_ids" in accepted:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:  # left padding puts all responses at the end: no logits elsewhere
        options["logits_to_keep"] = longest + 1
    logits = model(input_ids=input_ids, attention_mask=mask, **options).logits[:, -longest - 1 : -1].float()
    targets = input_ids[:, -longest:]
    token_scores = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    lengths = torch.tensor([len(response) for _, response in rows], device=targets.device)
    is_response = torch.arange(longest, 0, -1, device=targets.device) <= lengths.unsqueeze(1)
    return [float(score) for score in token_scores.where(is_response, 0.0).double().sum(1)]


def without_gradients(lockstep: bool) -> AbstractContextManager[None]:
    import torch

    # Weights gathered in inference mode could not be saved for a backward later.
    return torch.no_grad() if lockstep else torch.inference_mode()


@contextmanager
def evaluating(model: PreTrainedModel, generation_config: Any) -> Iterator[None]:
    """Evaluation mode, and our generation settings alone: a model's own (penalties, ...) would be added."""
    # Classifiers have none.
    was_training, own = model.training, getattr(model, "generation_config", None)
    model.eval()
    if generation_config is not None:
        model.generation_config = generation_config
    try:
        yield
    finally:
        if generation_config is not None:
            model.generation_config = own
        model.train(was_training)


def _gathered(kind: Kind, predictions: Sequence[Prediction]) -> EvaluationResult:
    from models.gather import gather_json  # heavy: torch

    of_ranks = gather_json([asdict(each) for each in predictions])
    merged = sorted((Prediction(**each) for part in of_ranks for each in part), key=lambda each: each.index)
    return EvaluationResult(kind=kind, predictions=tuple(merged))
