"""How does the state of a scheduler or a scaler, which others would pickle, stand in JSON and come back unchanged?

Numbers, texts, lists and dictionaries stand as they are. What JSON does not tell apart is marked: tuples, dictionaries
whose keys are no texts, counters, numbers that are not finite; and whole numbers beyond 63 bits, which strict readers
refuse.
"""

import math
import numbers
from collections import Counter
from typing import Any

from torch import Tensor

from sparse_zero.errors import InputError

_TUPLE, _ITEMS, _COUNTER, _NUMBER = "$tuple", "$items", "$counter", "$number"
_MARKS = (_TUPLE, _ITEMS, _COUNTER, _NUMBER)
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
# JSON's whole numbers stay below it, as sparse_zero.files reads them.
_END_OF_INTEGERS = 2**63


def to_plain(value: Any, what: str) -> Any:
    """``value`` in JSON's types, from which :func:`from_plain` makes it again.

    Args:
        value: of numbers, texts, None, tensors of one number (which become numbers), and containers of those.
        what: it is the state of, for errors.

    Raises:
        InputError: something in it is of another type.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        whole = int(value)
        return whole if abs(whole) < _END_OF_INTEGERS else {_NUMBER: str(whole)}
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else {_NUMBER: str(number)}
    if isinstance(value, tuple):
        return {_TUPLE: [to_plain(entry, what) for entry in value]}
    if isinstance(value, list):
        return [to_plain(entry, what) for entry in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and key not in _MARKS for key in value) and not isinstance(value, Counter):
            return {key: to_plain(entry, what) for key, entry in value.items()}
        mark = _COUNTER if isinstance(value, Counter) else _ITEMS
        return {mark: [[to_plain(key, what), to_plain(entry, what)] for key, entry in value.items()]}
    raise InputError(
        f"the state of {what} has a {type(value).__name__}, which could be stored as a pickle only: use one whose "
        "state_dict() has numbers, texts and containers of them"
    )


def from_plain(value: Any) -> Any:
    """What :func:`to_plain` was given.

    Raises:
        InputError: a mark stands where :func:`to_plain` puts none.
    """
    if isinstance(value, list):
        return [from_plain(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    mark = next((name for name in _MARKS if name in value), None)
    if mark is None:
        return {key: from_plain(entry) for key, entry in value.items()}
    try:
        (content,) = value.values()
        if mark == _NUMBER:
            if not isinstance(content, str):
                raise TypeError("no text")
            return _NOT_FINITE[content] if content in _NOT_FINITE else int(content)
        if mark == _TUPLE:
            return tuple(from_plain(entry) for entry in content)
        items = {from_plain(key): from_plain(entry) for key, entry in content}
    except (TypeError, ValueError) as error:
        raise InputError(f"{mark} stands before something else than it marks: use another checkpoint") from error
    return Counter(items) if mark == _COUNTER else items
