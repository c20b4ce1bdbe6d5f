"""How does PEFT load, train, merge and save our adapters?

Config = sz.register_peft()
model = PeftModel.from_pretrained(base, "adapter")                      # what sz.save_adapter wrote
model = get_peft_model(base, Config(selection=selection, task_type="CAUSAL_LM"))
model.save_pretrained("adapter")                                        # what sz.load_adapter reads

peft is imported when the method is registered, and nowhere else in the library.
"""

from typing import Any

from sparse_zero.integrations import peft_compat


def register_peft() -> Any:
    """Add the method SPARSE_ZERO to PEFT in this process; once more does nothing.

    From then on ``PeftModel.from_pretrained`` and ``load_adapter`` take folders (and hub repositories) that
    :func:`sparse_zero.save_adapter` wrote, and ``get_peft_model`` takes what this returns. See docs/adapters.md for
    what of PEFT works, and what is refused.

    Returns:
        The class of configs, ``SparseZeroConfig(selection, placement=None, task_type=None, ...)``. ``selection``: a
        :class:`sparse_zero.Selection` or the path of one, to train it; adapters that are loaded bring theirs.
        ``placement``: where the values of a loaded adapter act, inplace or delta; None: as they were trained, delta if
        they are to be trained further or the base is quantized.

    Raises:
        InputError: peft is not installed, or older than the version whose internals were read.
    """
    peft_compat.check_version()
    return peft_compat.register()
