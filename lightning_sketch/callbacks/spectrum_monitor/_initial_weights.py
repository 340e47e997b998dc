"""The weights that training started from, kept until there is data to measure them on."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class InitialWeights:
    """A copy of a module's parameters and buffers."""

    def __init__(self, module: nn.Module):
        self.values = {name: tensor.detach().clone() for name, tensor in _state(module).items()}

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The module with these weights; after that with its own, the very same tensors."""
        state = _state(module)  # a buffer made since then stays as it is
        now = {name: tensor.data for name, tensor in state.items() if name in self.values}
        try:
            for name in now:
                state[name].data = self.values[name]
            yield
        finally:
            for name, value in now.items():
                state[name].data = value


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
