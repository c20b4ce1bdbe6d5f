"""What is the learning rate at each step? A pure function, so that a resumed run needs only its step number."""

import math

from launcher.training_config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0) of ``num_steps``.

    It rises linearly over ``ceil(warmup_fraction * num_steps)`` steps, whose last has the peak; then it is held,
    or falls linearly or by half a cosine towards ``final_fraction`` of the peak, which step ``num_steps`` would have.
    """
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, num_steps - warmup)
    remaining = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * remaining)
