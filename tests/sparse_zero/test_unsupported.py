"""Which settings of DeepSpeed, and which parameters of a model, are refused by name before anything is changed?"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sparse_zero as sz
from sparse_zero.zero.engine import attach
from sparse_zero.zero.unsupported import check_settings

NO_NORM = {"compute_grad_norm": False}
NO_CHECK = {"enabled": True, "check_grad_overflow": False}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("zero", "others", "message"),
    [
        (NO_NORM, {}, r"zero_optimization\.compute_grad_norm .* is false in fp32"),
        (NO_NORM, {"bf16": {"enabled": False}}, r"zero_optimization\.compute_grad_norm .* is false in fp32"),
        ({}, {"bf16": NO_CHECK}, r"bf16\.check_grad_overflow is false at zero stage"),
        ({}, {"bfloat16": NO_CHECK}, r"bf16\.check_grad_overflow is false at zero stage"),
    ],
)
def test_steps_of_gradients_that_are_not_finite_must_be_found(stage, zero, others, message):
    settings = {"zero_optimization": {"stage": stage, **zero}, **others}
    with pytest.raises(sz.InputError, match=message):
        check_settings(settings, "inplace")
    # An engine that others made.
    model = nn.Sequential(nn.Linear(4, 4))
    sz.sparsify(model, sz.Selection({"0.weight": sz.WeightSelection(shape=(4, 4), rows=[1])}))
    engine = SimpleNamespace(
        module=model,
        optimizer=SimpleNamespace(),
        sequence_parallel_size=1,
        _config=SimpleNamespace(_param_dict=settings),
    )
    with pytest.raises(sz.InputError, match=message):
        attach(engine)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_optimization": {"stage": 2, **NO_NORM}, "bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 2}, "bf16": {**NO_CHECK, "enabled": False}},
        {"zero_optimization": {"stage": 3}, "bf16": NO_CHECK},
        {"zero_optimization": {"stage": 2}},
    ],
)
def test_settings_under_which_they_are_found_are_not_refused(settings):
    check_settings(settings, "inplace")


class _Model(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16, **kwargs)
        self.linear = nn.Linear(16, 32)


@pytest.mark.parametrize("placement", ["inplace", "delta"])
@pytest.mark.parametrize("weight", ["linear.weight", "embedding.weight"])
def test_a_parameter_that_is_not_contiguous_is_refused_by_name(weight, placement):
    model = _Model()
    parameter = model.get_parameter(weight)
    parameter.data = parameter.data.T.contiguous().T
    selection = sz.Selection({weight: sz.WeightSelection(shape=(32, 16), blocks=[[0, 1]], block_size=12)})
    with pytest.raises(sz.InputError, match=f"{weight} is not contiguous"):
        sz.sparsify(model, selection, placement)
    assert all(parameter.requires_grad for parameter in model.parameters())
    # What the message says helps.
    parameter.data = parameter.data.contiguous()
    sz.sparsify(model, selection, placement)
    (values,) = sz.trainable_parameters(model).values()
    with torch.no_grad():
        values.add_(1.0)
    before = parameter.detach().clone()
    sz.write_back(model)
    assert int((parameter != before).sum()) == (0 if placement == "delta" else selection.num_parameters)


def test_an_embedding_with_sparse_gradients_is_refused_by_name():
    model = _Model(sparse=True)
    selection = sz.Selection({"embedding.weight": sz.WeightSelection(shape=(32, 16), rows=[1, 2])})
    with pytest.raises(sz.InputError, match="embedding is an embedding with sparse=True"):
        sz.sparsify(model, selection)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.embedding.sparse = False
    sz.sparsify(model, selection)
    model.embedding(torch.tensor([1, 2, 3])).sum().backward()
