"""Which records are as long as real ones, and can be learned?

The lengths are those of GSM8K's 7,473 training problems, in tokens of SmolLM2's tokenizer: log-normal, with medians of
57 tokens for a question and 114 for an answer. With them, batches of 4, 8 and 16 samples that are padded to their
longest are full to 0.72, 0.62 and 0.56; real ones to 0.71, 0.63 and 0.56. The text is that of the arithmetic word
problems: some questions in a row, and their answers, again from the first one where they are too short.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

from models.word_problems import write_word_problems

# Mean and standard deviation of the logarithms of the lengths, and how these go together.
QUESTION, ANSWER, CORRELATION = (4.038, 0.345), (4.736, 0.421), 0.548


def draw_lengths(number: int, seed: int) -> np.ndarray:
    """[number, 2] int64: tokens of questions and of answers."""
    means = [QUESTION[0], ANSWER[0]]
    shared = CORRELATION * QUESTION[1] * ANSWER[1]
    covariance = [[QUESTION[1] ** 2, shared], [shared, ANSWER[1] ** 2]]
    drawn = np.random.default_rng(seed).multivariate_normal(means, covariance, number)
    return np.exp(drawn).round().astype(np.int64)


def write_records(
    folder: Path, num_train: int, num_validation: int, *, count_tokens: Callable[[str], int], seed: int
) -> None:
    """Write ``train.json`` and ``validation.json`` of records with ``instruction`` and ``output``.

    Args:
        folder: created.
        num_train: training records.
        num_validation: others, of other problems.
        count_tokens: how long a text is.
        seed: of the problems and of the lengths.
    """
    needed = 8 * max(num_train, num_validation)
    write_word_problems(folder / "problems", min(needed, 4000), 400, 4, seed=seed)
    for split, number, seed_of_split in (("train", num_train, seed), ("validation", num_validation, seed + 1)):
        problems = json.loads((folder / "problems" / f"{split}.json").read_text())
        texts = [(problem["instruction"], problem["output"]) for problem in problems]
        counts = {text: count_tokens(text) for pair in texts for text in pair}
        supply = cycle(texts)
        records = []
        for question_tokens, answer_tokens in draw_lengths(number, seed_of_split):
            questions: list[str] = []
            answers: list[str] = []
            while not questions or sum(map(counts.__getitem__, questions)) + 12 < question_tokens:
                question, answer = next(supply)
                questions.append(question)
                answers.append(answer)
            told: list[str] = []
            again = cycle(answers)
            while not told or sum(map(counts.__getitem__, told)) + 10 < answer_tokens:
                told.append(next(again))
            records.append({"instruction": " ".join(questions), "output": " ".join(told)})
        (folder / f"{split}.json").write_text(json.dumps(records))
