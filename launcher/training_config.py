"""How long, how fast and in which batches is trained, and what is kept of it?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparse_zero.errors import InputError
from sparse_zero.prefix.config import PrefixCacheConfig
from sparse_zero.zero.optimizers import ModuleOptimizerConfig, OptimizerConfig, OptimizerName, PerKindConfig

# What models and weights call the precision of a run.
DTYPE_OF_PRECISION: Mapping[str, Literal["float32", "bfloat16", "float16"]] = {
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16",
}  # fmt: skip


# What torch's generators and the integers of saved files take.
_SEED_BITS = 63


def check_seed(name: str, seed: int) -> None:
    """Refuse a seed that not everything which is seeded takes.

    Raises:
        InputError: names the setting.
    """
    if not 0 <= seed < 2**_SEED_BITS:
        raise InputError(f"{name} is {seed}: it must lie in 0 to 2^{_SEED_BITS} - 1")


def _check_at_least(section: str, minimum: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (value >= minimum and math.isfinite(value)):
            raise InputError(f"{section}.{name} is {value}: it must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Schedule, batches and optimizer of one run."""

    # Passes over the training data; may be fractional. Exactly one of epochs and steps is set.
    epochs: float | None = None
    # Optimizer steps. Exactly one of epochs and steps is set.
    steps: int | None = None
    # Samples between two optimizer steps, over all ranks. Accumulation follows from it and the world size.
    global_batch_size: int = 16
    # Samples in one forward pass of one rank; bounds the activations' memory, never the result.
    micro_batch_size: int = 4
    # Peak learning rate. SMT uses 1e-5 to 1e-4 at 7B, RoCoFT 1e-3; small models want more.
    learning_rate: float = 1e-4
    # Shape of the learning rate after the warm-up: held, or falling to final_fraction of the peak.
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    # Share of all steps during which the learning rate rises linearly from zero.
    warmup_fraction: float = 0.05
    # Learning rate at the last step, as a share of the peak.
    final_fraction: float = 0.0
    # adamw: torch's. deepspeed_adamw: DeepSpeed's, on the host where states are offloaded. adamw_8bit: states of 8 bits
    # (extra "quant"). lion: one state. adafactor: one state. muon: blocks orthogonalized, AdamW for other kinds.
    optimizer: OptimizerName = "adamw"
    # Learning rate (or factor) and weight decay of single kinds of region.
    per_kind: PerKindConfig = field(default_factory=PerKindConfig)
    # The same of single modules, before what their kinds have; peers may have it, too.
    per_module: tuple[ModuleOptimizerConfig, ...] = ()
    # Decoupled decay of trained entries only: towards zero inplace, towards the base under delta.
    weight_decay: float = 0.0
    # Decay of the running mean of the gradient.
    beta1: float = 0.9
    # Decay of the running mean of the gradient's square. Lion's authors take 0.99.
    beta2: float = 0.999
    # Added to the root of that mean, so that a step stays finite.
    epsilon: float = 1e-8
    # Global L2 norm of the values' gradient above which it is scaled down; None: never.
    max_gradient_norm: float | None = 1.0
    # Recompute activations in backward: less memory, one more forward pass.
    gradient_checkpointing: bool = False
    # Positions, over the rows of a micro-batch, whose logits exist at once: the loss is formed chunk by chunk, and its
    # gradient with it, for the memory of one chunk (256 took no longer on a CPU). null: all at once, for any head.
    loss_chunk: int | None = None
    # liger: Triton kernels of the package of that name (extra "liger") for norms, MLP, rotary positions and the loss of
    # a frozen head; on GPUs only. torch: none.
    kernels: Literal["torch", "liger"] = "torch"
    # What multiplies selected blocks. triton: our Triton kernels, on CUDA; auto: these where Triton is installed, else
    # torch, with a warning. plain: torch, for the kernels have not been timed on a GPU.
    region_kernels: Literal["plain", "auto", "triton"] = "plain"
    # Computation dtype of the engine. fp32 is the choice on CPUs; bf16 on GPUs.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Steps with a non-finite loss or gradient are skipped; after this many in a row the run stops. fp16 skips some
    # at the start, until its loss scale has come down.
    max_nonfinite_steps: int = 10
    # Steps between validations (needs data.validation); None: only after the last step.
    validation_every: int | None = None
    # Compute the layers below the lowest trained one in the first epoch only, and keep what comes out; None: compute
    # them in every step. Takes (tokens x hidden size x bytes of an entry) of a disk or of memory.
    prefix_cache: PrefixCacheConfig | None = None
    # Seed of the data order and of dropout.
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InputError(f"training has epochs={self.epochs} and steps={self.steps}: set exactly one of them")
        _check_at_least("training", 1, steps=self.steps, global_batch_size=self.global_batch_size)
        _check_at_least("training", 1, micro_batch_size=self.micro_batch_size, validation_every=self.validation_every)
        _check_at_least("training", 1, max_nonfinite_steps=self.max_nonfinite_steps, loss_chunk=self.loss_chunk)
        _check_at_least("training", 0, weight_decay=self.weight_decay)
        check_seed("training.seed", self.seed)
        for name in ("epochs", "learning_rate", "epsilon", "max_gradient_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"training.{name} is {value}: it must be a positive number")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"training.{name} is {getattr(self, name)}: it must lie in [0, 1]")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"training.{name} is {getattr(self, name)}: it must lie in [0, 1)")
        if self.kernels == "liger" and self.loss_chunk is not None:
            raise InputError(
                f"training.loss_chunk is {self.loss_chunk} with training.kernels liger, whose loss chooses its own "
                "chunks: leave loss_chunk out, or set kernels to torch"
            )
        if self.micro_batch_size > self.global_batch_size:
            raise InputError(
                f"training.micro_batch_size is {self.micro_batch_size}, more than training.global_batch_size "
                f"{self.global_batch_size}: lower it"
            )

    def optimizer_config(self) -> OptimizerConfig:
        """The library's configuration of the optimizer."""
        return OptimizerConfig(
            name=self.optimizer,
            learning_rate=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            per_kind=self.per_kind,
            per_module=self.per_module,
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and which one a start continues from."""

    # Steps between two checkpoints; None: only when interrupted and at the end.
    every: int | None = None
    # Newest checkpoints kept; older ones are deleted after a new one is complete.
    keep: int = 2
    # validation_loss: also keep the checkpoint with the lowest one, which is written when it is found, whatever "every"
    # says; with other validation data than before, it is looked for anew. none: the newest only.
    keep_best: Literal["none", "validation_loss"] = "none"
    # Write while training goes on, which waits for a copy to the host's memory only (12 bytes for each value, on the
    # rank that writes). False: wait until it is on the disk.
    background: bool = True
    # auto: continue from the newest checkpoint of the run folder that is whole, if there are some; never: refuse to
    # overwrite a run that has some; a path: continue from that checkpoint, and from no other.
    resume: str = "auto"

    def __post_init__(self) -> None:
        _check_at_least("checkpoint", 1, every=self.every, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run writes, and where."""

    # The run folder; created. Relative paths start at the current directory.
    folder: str
    # Whether all nodes see the same run folder. true: refuse to start where they do not; false: they need not, and
    # each then keeps a copy of the checkpoints; auto: as false, with a warning where they do not.
    shared: Literal["auto", True, False] = "auto"
    # Save the adapter (values and selection) at the end.
    adapter: bool = True
    # Save the merged model, a plain Hugging Face folder, at the end.
    merged: bool = False
    # Evaluate data.test before and after training.
    evaluate: bool = False
    # With evaluate: before training, too. Runs that share a base need its answers once.
    evaluate_base: bool = True
    # Draw the report (pictures and one HTML page) at the end; needs the extra "plots".
    report: bool = False
    # Also write the metrics for TensorBoard; needs the extra "tracking".
    tensorboard: bool = False
    # Steps between two rows of metrics.
    log_every: int = 1

    def __post_init__(self) -> None:
        if not self.folder.strip():
            raise InputError("output.folder is empty: name the folder that the run writes to")
        _check_at_least("output", 1, log_every=self.log_every)
