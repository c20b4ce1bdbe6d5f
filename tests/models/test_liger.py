"""Are Liger's kernels put where they should, and refused where they cannot run?"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import sparse_zero as sz
from models import liger
from models.loss import response_nll
from sparse_zero.errors import InputError
from sparse_zero.selection.regions import WeightSelection
from tests.models.tiny_families import FAMILIES


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in Liger's place, for what is called of it; its kernels run on GPUs only."""
    made = ModuleType("liger_kernel.transformers")
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", made)
    return made


def test_a_cpu_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^training\.kernels is 'liger', .* on cpu: use torch$"):
        liger.check_kernels(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers", raising=False)
    with pytest.raises(InputError, match=r"pip install 'sparse-zero\[liger\]'"):
        liger.check_kernels(torch.device("cuda"))


def test_the_function_of_the_family_gets_the_model(package: ModuleType) -> None:
    calls: list[dict[str, Any]] = []
    package.apply_liger_kernel_to_llama = lambda **given: calls.append(given)  # type: ignore[attr-defined]
    model = FAMILIES["llama"].make()
    liger.use_kernels(model)
    # The loss stays this package's, which calls the model by way of the engine, with its head in chunks.
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert calls[0]["model"] is model
    with pytest.raises(InputError, match="none for model type 'bloom'"):
        liger.use_kernels(FAMILIES["bloom"].make())


def test_a_frozen_head_goes_to_the_fused_loss_and_no_other_does(package: ModuleType) -> None:
    class Fused:
        def __init__(self, *, ignore_index: int, reduction: str) -> None:
            self.settings: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}

        def __call__(self, weight: Any, hidden: Any, targets: Any, bias: Any) -> torch.Tensor:
            # As Liger's, whose order of arguments this is (0.8.5).
            logits = torch.nn.functional.linear(hidden, weight, bias)
            return torch.nn.functional.cross_entropy(logits, targets, **self.settings)

    package.LigerFusedLinearCrossEntropyLoss = Fused  # type: ignore[attr-defined]
    model = FAMILIES["llama"].make()
    tokens = torch.arange(3, 23).view(2, 10)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    batch["labels"][0, :4] = -100
    expected = response_nll(model, batch)
    assert "whole parameter" in str(liger.why_not_fused(model))
    assert torch.equal(response_nll(model, batch, fused=True), expected)
    model.lm_head.requires_grad_(False)
    assert liger.why_not_fused(model) is None
    torch.testing.assert_close(response_nll(model, batch, fused=True), expected)
    model.lm_head.register_parameter("bias", torch.nn.Parameter(torch.zeros(64)))
    assert liger.why_not_fused(model) == "the head is no frozen linear"
    sparse = FAMILIES["llama"].make()
    sz.sparsify(sparse, sz.Selection({"lm_head.weight": WeightSelection(shape=(64, 32), rows=[3])}), "delta")
    sparse.requires_grad_(False)
    assert liger.why_not_fused(sparse) == "the head is no frozen linear"


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["loss", "model"])
def test_on_a_gpu_kernels_compute_the_same(kernels: str) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (extra: liger)")
    model = FAMILIES["llama"].make().cuda()
    model.lm_head.requires_grad_(False)
    tokens = torch.arange(3, 23, device="cuda").view(2, 10)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    expected = response_nll(model, batch)
    (wanted,) = torch.autograd.grad(expected, [model.model.layers[0].self_attn.q_proj.weight])
    if kernels == "model":
        liger.use_kernels(model)
    found = response_nll(model, batch, fused=kernels == "loss")
    (gradient,) = torch.autograd.grad(found, [model.model.layers[0].self_attn.q_proj.weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
