"""How is an optional dependency imported, and what is said when it is missing?"""

import importlib
from types import ModuleType

from sparse_zero.errors import InputError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise :class:`InputError` naming the extra that installs it.

    Args:
        module: dotted module name, for example ``matplotlib.pyplot``.
        extra: the extra of ``setup.py`` that contains it, for example ``plots``.
        purpose: what it is needed for, as the end of the sentence "… is needed to …".
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise InputError(
            f"the package {error.name!r} is needed to {purpose}: pip install 'sparse-zero[{extra}]'"
        ) from error
