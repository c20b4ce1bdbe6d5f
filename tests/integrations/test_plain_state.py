"""Does the state of schedulers and others come back from JSON as it was, and is what JSON cannot hold refused?"""

import json
import math
from collections import Counter
from typing import Any

import numpy
import pytest
import torch

import sparse_zero as sz
from sparse_zero.files import parse_json
from sparse_zero.integrations.plain_state import from_plain, to_plain


def test_states_come_back_as_they_were():
    state: dict[str, Any] = {
        "numbers": [1, -2.5, 0.1, True, None, 2**40],
        "betas": (0.9, 0.999),
        "large": [2**63 - 1, 2**63, -(2**63), 2**64 - 1, -(2**200)],
        "by large number": {2**64: "a"},
        "infinite": [math.inf, -math.inf],
        "by step": {3: "a", (1, 2): {"nested": ("b",)}},
        "milestones": Counter({30: 1, 80: 2}),
        "empty": [{}, [], (), ""],
    }
    text = json.dumps(to_plain(state, "it"), allow_nan=False)
    found = from_plain(parse_json(text.encode(), strict=True))
    assert found == state
    assert [type(found[name]) for name in ("betas", "milestones")] == [tuple, Counter]
    assert [type(number) for number in found["numbers"]] == [int, float, float, bool, type(None), int]
    assert math.isnan(from_plain(to_plain(math.nan, "it")))
    assert from_plain(to_plain({"$tuple": [1]}, "it")) == {"$tuple": [1]}, "a key that is a mark is none"
    assert to_plain(torch.tensor(0.5), "it") == 0.5
    assert from_plain(to_plain(numpy.uint64(2**64 - 1), "it")) == 2**64 - 1


def test_every_scheduler_of_torch_comes_back():
    """As it is after some steps; those that wrap others, too."""
    schedulers = torch.optim.lr_scheduler

    def make(kind: str) -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        return {
            "steps": lambda: schedulers.MultiStepLR(optimizer, [1, 3, 3]),
            "cosine": lambda: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
            "one cycle": lambda: schedulers.OneCycleLR(optimizer, 1.0, total_steps=9),
            "cycles": lambda: schedulers.CyclicLR(optimizer, 0.1, 1.0),
            "plateau": lambda: schedulers.ReduceLROnPlateau(optimizer),
            "several": lambda: schedulers.SequentialLR(
                optimizer, [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.5)], [2]
            ),
        }[kind]()

    for kind in ("steps", "cosine", "one cycle", "cycles", "plateau", "several"):
        one, other = make(kind), make(kind)
        for _ in range(3):
            one.optimizer.step()
            one.step(*([1.0] if kind == "plateau" else []))
        state = one.state_dict()
        other.load_state_dict(from_plain(json.loads(json.dumps(to_plain(state, kind), allow_nan=False))))
        assert other.state_dict() == state, kind


@pytest.mark.parametrize("state", [torch.zeros(2), {"a": [object()]}, {1, 2}, b"bytes", lambda: None])
def test_what_json_does_not_hold_is_refused(state):
    with pytest.raises(
        sz.InputError, match=r"the state of the scheduler has a .*, which could be stored as a pickle only"
    ):
        to_plain(state, "the scheduler")


@pytest.mark.parametrize(
    "stored",
    [
        {"$number": "seven"},
        {"$number": "1.5"},
        {"$number": 7},
        {"$number": []},
        {"$number": "inf", "a": 1},
        {"$tuple": 5},
        {"$items": [[1]]},
        {"$items": [[[], 1]]},
        {"$tuple": [], "a": 1},
    ],
)
def test_marks_that_mark_nothing_are_refused(stored):
    with pytest.raises(sz.InputError, match=r"\$(number|tuple|items) stands before something else than it marks"):
        from_plain(stored)
