"""Which random numbers would a rank have drawn next, and how does it draw them after a resume?

The streams are torch's on the host and on this rank's GPU, NumPy's and Python's global ones. Every rank has its own,
so that they belong to a number of ranks. Stored as ``random.safetensors``: one [ranks, bytes] uint8 tensor a stream.
"""

import random
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparse_zero.collectives import collective_device, rank_and_world_size
from sparse_zero.errors import InputError

# Python's generator: 624 words, the place in them, and whether and which normal number is left over. NumPy's is the
# same Mersenne twister.
_PYTHON, _NUMPY = struct.Struct("<625I?d"), struct.Struct("<624II?d")


class RandomStatesWarning(UserWarning):
    """Random numbers are not those that the run would have drawn without the interruption."""


def _python_state() -> bytes:
    _, words, left_over = random.getstate()
    return _PYTHON.pack(*words, left_over is not None, left_over or 0.0)


def _parse_python(state: bytes) -> tuple[Any, ...]:
    *words, has_normal, normal = _PYTHON.unpack(state)
    parsed = (3, tuple(words), normal if has_normal else None)
    random.Random().setstate(parsed)
    return parsed


def _numpy_state() -> bytes:
    _, words, place, has_normal, normal = np.random.get_state()
    return _NUMPY.pack(*map(int, words), int(place), bool(has_normal), float(normal))


def _parse_numpy(state: bytes) -> tuple[Any, ...]:
    *words, place, has_normal, normal = _NUMPY.unpack(state)
    if place > len(words):  # NumPy would read beyond them.
        raise ValueError(f"place {place} of {len(words)}")
    return ("MT19937", np.array(words, dtype=np.uint32), place, int(has_normal), normal)


def _parse_torch(state: Tensor) -> Tensor:
    torch.Generator().set_state(state)
    return state


def _states() -> dict[str, Tensor]:
    """The states of this rank: 1-D uint8 on the host, as long on every rank."""
    found = {
        "python": torch.frombuffer(bytearray(_python_state()), dtype=torch.uint8),
        "numpy": torch.frombuffer(bytearray(_numpy_state()), dtype=torch.uint8),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def gather_random_states(*, keep: bool) -> dict[str, Tensor]:
    """The states of all ranks, [ranks, bytes] uint8 by stream; nothing on ranks with ``keep`` False. Collective."""
    states = _states()
    if not dist.is_initialized():
        return {name: state[None] for name, state in states.items()} if keep else {}
    mine = torch.cat(list(states.values())).to(collective_device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    if not keep:
        return {}
    parts = torch.stack(everyone).cpu().split([len(state) for state in states.values()], dim=1)
    return {name: part.contiguous() for name, part in zip(states, parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class RandomStates:
    """The states of one rank, checked; None: not stored."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: Tensor
    cuda: Tensor | None


def states_of_rank(states: Mapping[str, Tensor], source: object) -> RandomStates | None:
    """What this rank goes on with of :func:`gather_random_states`, if there were as many ranks; else None.

    Args:
        states: as stored; empty: none were.
        source: where, for errors.

    Raises:
        InputError: they are none of these generators'.
    """
    if not states:
        return None
    rank, world_size = rank_and_world_size()
    mine = _states()
    for name in ("python", "numpy", "torch"):
        if name not in states:
            raise InputError(f"{source} has no states of {name}: use another copy")
    num_ranks = len(states["torch"]) if states["torch"].dim() else 0
    for name, state in states.items():
        # A GPU's state may be read where there is none.
        shape = (num_ranks, len(mine[name])) if name in mine else (num_ranks, *state.shape[1:])
        if name not in (*mine, "cuda") or state.dtype != torch.uint8 or state.shape != shape:
            raise InputError(f"{source} has {name} as {state.dtype} {tuple(state.shape)}: use another copy")
    if num_ranks != world_size:
        if rank == 0:
            warnings.warn(
                f"the checkpoint has the random states of {num_ranks} ranks, and here are {world_size}: what is drawn "
                "at random from now on (dropout) is not what would have been drawn",
                RandomStatesWarning,
                stacklevel=3,
            )
        return None
    # Of memory of their own: torch reads a part of a tensor from the beginning of the whole.
    own = {name: state[rank].clone() for name, state in states.items()}
    try:
        return RandomStates(
            python=_parse_python(bytes(own["python"].numpy())),
            numpy=_parse_numpy(bytes(own["numpy"].numpy())),
            torch=_parse_torch(own["torch"]),
            cuda=own.get("cuda"),
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{source} has a state that is none of its generator's ({error}): use another copy") from error


def set_random_states(states: RandomStates) -> None:
    """Go on with the streams of a checkpoint."""
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch)
    if states.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states.cuda)
