"""The weights that training started from, kept until there is data to measure them on."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class InitialWeights:
    """A copy of a module's parameters and buffers."""

    def __init__(self, module: nn.Module):
        self.values = [tensor.detach().clone() for tensor in _state(module)]

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The module with these weights; after that with its own, the very same tensors."""
        now = [tensor.data for tensor in _state(module)]
        try:
            _set(module, self.values)
            yield
        finally:
            _set(module, now)


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _set(module: nn.Module, values: list[Tensor]) -> None:
    for tensor, value in zip(_state(module), values, strict=True):
        tensor.data = value
