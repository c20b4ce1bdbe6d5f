"""How does a linear that nothing is trained of keep nothing of its input under ZeRO-3?"""

from torch import Tensor, nn

from sparse_zero.layers.functional import PLAIN, sparse_linear
from sparse_zero.zero import compat


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` with a frozen weight in shards.

    torch's own keeps the weight only, but a view of it, which holds the gathered memory until backward; so DeepSpeed
    puts a function in its place that keeps the weight itself, and the input as well, which no frozen weight needs.
    """

    # What the module is without an engine; read by the map of modules, and when an engine is detached.
    _plain_class = nn.Linear
    UNTIL_DETACHED = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return sparse_linear(input, self.weight, self.bias, None, None, None, PLAIN)


def freeze_linears(model: nn.Module) -> None:
    """Make every plain linear with a frozen weight in shards a :class:`FrozenLinear`, until its engine is detached."""
    for module in model.modules():
        # A subclass may compute something else.
        if type(module) is nn.Linear and compat.is_sharded(module.weight) and not module.weight.requires_grad:
            module.__class__ = FrozenLinear
