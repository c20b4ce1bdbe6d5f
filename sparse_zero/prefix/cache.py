"""When are the lowest layers computed, when are they read from disk, and what of it is stored?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_zero.collectives import collective_device
from sparse_zero.errors import InputError
from sparse_zero.prefix.config import StoredDtype
from sparse_zero.prefix.encoding import decode, encode
from sparse_zero.prefix.layers import PrefixLayers, from_tokens, to_tokens
from sparse_zero.prefix.store import SampleStore


class PrefixCache:
    """Hidden states of training samples, taken from the forward passes of one epoch and given to those of later ones.

    The forward pass of a micro-batch whose samples are all known starts above the layers; any other is an ordinary
    one, whose hidden states are stored. So no forward pass is made for the cache, and a device's peak of memory is
    that of the first epoch: later steps hold less.

    Args:
        layers: that are left out.
        store: of the samples' bytes.
        lengths: tokens of each sample.
        stored: form of the bytes.
        compute: dtype of the hidden states in the model.
        is_packed: whether a micro-batch is one row of samples, instead of a padded row for each.
        together: whether all ranks leave the layers out, or none, in each micro-batch: at ZeRO stage 3, which gathers
            weights among all.
    """

    def __init__(
        self,
        layers: PrefixLayers,
        store: SampleStore,
        lengths: Sequence[int],
        *,
        stored: StoredDtype,
        compute: torch.dtype,
        is_packed: bool,
        together: bool,
    ) -> None:
        self.layers, self.store = layers, store
        self._lengths, self._stored, self._compute = lengths, stored, compute
        self._is_packed, self._together = is_packed, together
        # Samples since take_counts: left out, computed, stored.
        self._counts = [0, 0, 0]
        store.refresh()

    @contextmanager
    def forward(self, indices: Sequence[int], input_ids: Tensor) -> Iterator[None]:
        """For one forward pass in training, in the block. Collective where ranks act together.

        Args:
            indices: the samples of the micro-batch; none for a stand-in that no label is read of.
            input_ids: int64 [B, L] as the model gets them.
        """
        hidden_BLH = self._known(indices, input_ids)
        if hidden_BLH is not None:
            self._counts[0] += len(indices)
            with self.layers.skipped(hidden_BLH):
                yield
            return
        with self.layers.captured() as captured:
            yield
        self._counts[1] += len(indices)
        if captured and indices:
            self._store(indices, captured[0].detach())

    def _known(self, indices: Sequence[int], input_ids: Tensor) -> Tensor | None:
        """What the layers would return, if it is known (to all ranks, where they act together)."""
        found = self.store.read(indices) if self.layers.can_skip else None
        knows = found is not None
        if self._together and dist.is_initialized():
            flag = torch.tensor(int(knows), device=collective_device())
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            knows = bool(flag)
        if not knows or found is None:
            return None
        states_SH = decode(found.to(input_ids.device), self._stored, self._compute)
        if not indices:
            # A stand-in: any finite numbers do.
            return states_SH.new_zeros(*input_ids.shape, states_SH.shape[1])
        lengths = [self._lengths[index] for index in indices]
        return from_tokens(states_SH, lengths, None if self._is_packed else input_ids.shape[1])

    def _store(self, indices: Sequence[int], hidden_BLH: Tensor) -> None:
        if hidden_BLH.dtype != self._compute:
            raise InputError(
                f"training.prefix_cache is set, but the model hands {hidden_BLH.dtype} from layer to layer, and its "
                f"weights are {self._compute}: leave training.prefix_cache out"
            )
        states = to_tokens(hidden_BLH, [self._lengths[index] for index in indices], is_packed=self._is_packed)
        wanted = [number for number, index in enumerate(indices) if self.store.is_wanted(index)]
        if not wanted:
            return
        # One copy to the host for all.
        rows = encode(torch.cat([states[number] for number in wanted]), self._stored).cpu()
        own = rows.split([len(states[number]) for number in wanted])
        self._counts[2] += self.store.write(dict(zip((indices[number] for number in wanted), own, strict=True)))

    def take_counts(self) -> list[int]:
        """Samples of this rank since the last call: [left out, computed, stored]."""
        taken, self._counts = self._counts, [0, 0, 0]
        return taken
