"""How does a run of the launcher train its model by another method: full fine-tuning, a head alone, or one of PEFT's?

The launcher's run does all the rest: it loads, shuffles, evaluates, schedules and writes as it does for selections.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.memory.measuring import RunMemory
from launcher.memory.notes import MemoryNotes
from launcher.methods import save_plain
from launcher.preparing import Prepared
from launcher.world import World
from models.data import Sample
from models.peer_models import add_adapters
from scripts.accuracy.peer_config import ADAPTERS, PeerConfig, PeerRunConfig
from scripts.accuracy.peer_plan import PeerPlan, plan_peer
from sparse_zero.checkpoint.checkpoint import Checkpoint
from sparse_zero.checkpoint.folders import new_folder
from sparse_zero.collectives import failing_together
from sparse_zero.files import write_safetensors
from sparse_zero.memory.simulation.peers import peer_engine
from sparse_zero.module_map import ModuleMap
from sparse_zero.optional import require
from sparse_zero.zero.communication import step_communication
from sparse_zero.zero.optimizers import check_modules
from sparse_zero.zero.unsupported import offload_device

# Trained parameters that are in no file of PEFT.
HEAD_FILE = "head.safetensors"


def frequent_tokens(samples: Iterable[Sample], number: int, vocabulary: int) -> list[int]:
    """The most frequent tokens of the training data, in the order of their ids; those that do not occur come last."""
    counts = Counter(token for sample in samples for token in sample.input_ids)
    return sorted(sorted(range(vocabulary), key=lambda token: (-counts[token], token))[:number])


class PeerTraining:
    """Trains what :class:`PeerConfig` names. A :class:`launcher.methods.Method`.

    Args:
        config: of the run.
    """

    has_checkpoints = has_forecasts = False

    def __init__(self, config: PeerRunConfig) -> None:
        self._config: PeerConfig = config.peer
        self._plan: PeerPlan | None = None
        # PEFT's, of a method of it.
        self._wrapper: Any = None
        self._trained_bytes = 0

    @property
    def plan(self) -> PeerPlan:
        """What is trained; known once there is a model."""
        assert self._plan is not None
        return self._plan

    def check_model(
        self, config: RunConfig, model: Any, family: ModuleMap, checkpoint: Checkpoint | None, *, sharded: bool
    ) -> None:
        """Find what is to be trained, and PEFT."""
        if self._config.method in ADAPTERS:
            require("peft", extra="peft", purpose=f"train adapters ({self._config.method})")
        self._plan = plan_peer(self._config, model, family)
        check_modules(config.training.optimizer_config(), [name for name, _ in model.named_parameters()])

    def choose(self, prepared: Prepared, world: World, memory: RunMemory, notes: MemoryNotes | None) -> int:
        """Freeze the rest, and add the adapters; the trained parameters, the head's among them."""
        plan, model, seed = self.plan, prepared.model, prepared.config.training.seed
        model.requires_grad_(False)
        if plan.method in ADAPTERS:
            self._wrapper = self._with_adapters(prepared, seed)
        named = dict(model.named_parameters())
        for name in (*plan.parameters, *(() if self._head_is_pefts else plan.head)):
            named[name].requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        number = sum(parameter.numel() for parameter in trained)
        assert number == plan.num_trained + plan.num_head, (number, plan)
        self._trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        if world.is_main:
            print(self._describe(), file=sys.stderr, flush=True)
        return number

    @property
    def _head_is_pefts(self) -> bool:
        """Whether PEFT has the head as modules_to_save."""
        return self.plan.method in ADAPTERS and self.plan.method != "trainable_tokens"

    def _with_adapters(self, prepared: Prepared, seed: int) -> Any:
        plan, tokens = self.plan, [0]
        if plan.method == "trainable_tokens":
            vocabulary = prepared.model.get_input_embeddings().num_embeddings
            tokens = frequent_tokens(prepared.train.samples, plan.rank, vocabulary)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return add_adapters(
                prepared.model,
                plan.method,  # type: ignore[arg-type]
                rank=plan.rank,
                targets=plan.targets,
                alpha_over_rank=self._config.alpha_over_rank,
                tokens=tokens,
                whole=plan.head_modules if self._head_is_pefts else (),
                seed=seed,
            )

    def _describe(self) -> str:
        plan = self.plan
        rank = (
            {"trainable_tokens": f", {plan.rank} tokens"}.get(plan.method, f", rank {plan.rank}") if plan.rank else ""
        )
        head = f"; and a head of {plan.num_head:,}" if plan.num_head else ""
        return f"peer {plan.method}{rank}: {plan.num_trained:,} parameters{head}"

    def make_engine(self, prepared: Prepared, world: World, memory: RunMemory) -> Any:
        """DeepSpeed's own, under the same settings; None where nothing is trained."""
        if not self._trained_bytes:
            return None
        settings = deepspeed_config(prepared.config, world.world_size)
        memory.start(prepared.model)
        with memory.engine():
            engine = peer_engine(
                prepared.model,
                settings,
                prepared.config.training.optimizer_config(),
                offloaded=offload_device(settings, "offload_optimizer") is not None,
            )
            memory.made(engine)
        return engine

    def counts(self, engine: Any) -> dict[str, int]:
        """With the head, and how many of them are the head's."""
        plan = self.plan
        counts = {"trained": plan.num_trained + plan.num_head, "retired": 0, "head": plan.num_head}
        return {**counts, "rank": plan.rank} if plan.rank else counts

    def communication(self, engine: Any) -> dict[str, int]:
        """Of all that is trained."""
        if engine is None:
            return step_communication(stage=2, world_size=1, num_values=0)
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        return step_communication(
            stage=engine.zero_optimization_stage(),
            world_size=engine.world_size,
            num_values=sum(parameter.numel() for parameter in trained),
            values_itemsize=trained[0].element_size(),
            gradients_itemsize=engine.communication_data_type.itemsize,
            accumulation=engine.gradient_accumulation_steps(),
        )

    def save_adapter(self, prepared: Prepared, engine: Any) -> None:
        """PEFT's own files, and the head where they do not have it. Full fine-tuning has its merged model only."""
        plan = self.plan
        with failing_together():
            if torch.distributed.get_rank() or plan.method == "full" or not self._trained_bytes:
                return
            with new_folder(prepared.folder.adapter, manifest=False) as folder:
                if self._wrapper is not None:
                    # Not the embedding, which no peer trains as a whole.
                    self._wrapper.save_pretrained(folder, save_embedding_layers=False)
                    (folder / "README.md").unlink(missing_ok=True)  # A form to be filled in.
                if plan.head and not self._head_is_pefts:
                    named = dict(prepared.model.named_parameters())
                    head = {name: named[name].detach().cpu().contiguous() for name in plan.head}
                    write_safetensors(folder / HEAD_FILE, head, {"format": "pt"})

    def adapter_bytes(self, prepared: Prepared) -> int:
        """Of the adapter's files; of full fine-tuning, of the parameters that are trained: no form is smaller."""
        if self.plan.method == "full":
            return self._trained_bytes
        return prepared.folder.size_of(prepared.folder.adapter)

    def tuned_model(self, prepared: Prepared, engine: Any) -> Any:
        """The plain model, with the adapters merged into its weights."""
        model = prepared.model if self._wrapper is None else self._wrapper.merge_and_unload()
        return model

    def save_merged(self, prepared: Prepared, world: World, model: Any) -> None:
        """Write the plain model."""
        save_plain(prepared, world, model)
