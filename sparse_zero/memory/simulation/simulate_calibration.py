"""How much memory will calibration hold, found by running its real code without data?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparse_zero.memory.simulation.recorder import tag_model
from sparse_zero.memory.simulation.simulate_training import Part, Simulated, on_device
from sparse_zero.module_map import ModuleMap
from sparse_zero.selection import accumulators, calibration, full_calibration, select
from sparse_zero.selection.config import SelectionConfig
from sparse_zero.zero.inference import sharded_forward

PHASE = "calibration"


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of a question that tensors without numbers cannot answer."""


@contextmanager
def _all_is_well() -> Iterator[None]:
    """No rank fails, all agree, every matrix is reached by a gradient; how much this host has is not asked."""
    with ExitStack() as stack:
        for module in (select, calibration, accumulators, full_calibration):
            stack.enter_context(patch.object(module, "failing_together", nullcontext))
        for module, name in (
            (calibration, "check_equal_on_all_ranks"),
            (calibration, "check_reached"),
            (accumulators, "_available_memory"),
        ):
            stack.enter_context(patch.object(module, name, _nothing))
        stack.enter_context(patch.object(accumulators, "_ranks_on_this_host", lambda: 1))
        yield


def calibrating(
    config: SelectionConfig,
    module_map: ModuleMap,
    make_batch: Callable[[], Mapping[str, Any]],
    loss_fn: Callable[[Any, Mapping[str, Any]], Tensor],
    *,
    settings: Mapping[str, Any],
) -> Part:
    """The part that scores all candidates: ``config.calibration_batches`` micro-batches over all ranks.

    What is chosen by the scores is not simulated: it takes less than they do, on the host.

    Args:
        config: with a score that reads data.
        module_map: of the model.
        make_batch: one micro-batch, made of tensors.
        loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a micro-batch.
        settings: DeepSpeed's config, of the run.
    """

    def calibrate(simulated: Simulated) -> None:
        recorder, model = simulated.recorder, simulated.model
        is_tagged = False

        def loss(called: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            nonlocal is_tagged
            if not is_tagged:
                # An engine has laid them out anew.
                tag_model(recorder, model)
                is_tagged = True
            recorder.role(PHASE, "forward")
            found = loss_fn(called, batch)
            recorder.role(PHASE, "backward")
            return found

        hook = register_optimizer_step_pre_hook(lambda *args: recorder.role(PHASE, "step"))
        batches = (on_device(make_batch()) for _ in range(config.calibration_batches))
        try:
            with recorder.phase(PHASE), _all_is_well(), recorder.modules_of(model), sharded_forward(model, settings):
                select.score_regions(model, batches, config, loss, module_map=module_map)
        finally:
            hook.remove()

    return calibrate
