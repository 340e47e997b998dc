"""The weights that move: θ = θ₀ + Dᵀ w, in place or through the graph; and the way back, D g."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.subspace.directions import Directions


class TrainableWeights:
    """Chosen parameters of a module, and a copy of where they started: of this rank's shards, where they are sharded.

    Args:
        module: that holds them.
        pattern: of their names.
    """

    def __init__(self, module: nn.Module, pattern: str | Sequence[str]):
        self.module, self.layout = module, Layout.of(module, pattern)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start from where they are."""
        self.start = [_local(parameter).clone() for parameter in self.parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """They themselves."""
        return self.layout.parameters(self.module)

    @torch.no_grad()
    def move(self, directions: Directions, w: Float[Tensor, " dim"]) -> None:
        """Set them to θ₀ + Dᵀ w, one after the other."""
        theta = self.parameters()
        steps = self.layout.adjoint(directions.sketch, directions.expand(_at_least_float32(w)), theta)
        for parameter, start, step in zip(theta, self.start, steps, strict=True):
            _local(parameter).copy_(start + step)

    def moved(self, directions: Directions, w: Float[Tensor, " dim"]) -> list[Tensor]:
        """What they would be at w, as a function of w; n numbers."""
        steps = self.layout.unflatten(directions.rmatvec(_at_least_float32(w)))
        return [(start + step).to(start) for start, step in zip(self.start, steps, strict=True)]

    @torch.no_grad()
    def take_gradient(self, directions: Directions) -> Float[Tensor, " dim"]:
        """D g, of the gradients they have, which are let go of."""
        theta = self.parameters()
        gradients = dict(zip(self.layout.names, (parameter.grad for parameter in theta), strict=True))
        sketched = directions.restrict(self.layout.sketch(directions.sketch, gradients))
        for parameter in theta:
            parameter.grad = None
        return sketched

    def to(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Bring θ₀ where a module's `_apply` brings its parameters."""
        self.start = [fn(tensor) for tensor in self.start]


class FrozenWeights:
    """Parameters that are not trained, and how they were: a module may move its own, as a mean teacher does.

    Args:
        module: that holds them.
        moving: the parameters that w moves, under whatever names.
    """

    def __init__(self, module: nn.Module, moving: Sequence[nn.Parameter]):
        ids, named = {id(parameter) for parameter in moving}, module.named_parameters(remove_duplicate=False)
        self.module, self.moving = module, {name for name, parameter in named if id(parameter) in ids}
        self.start = self._fingerprints()

    @contextmanager
    def cast(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While a module's `_apply` brings them to another type: what was as at the start still is."""
        types = {parameter.dtype for parameter in self.module.parameters()}
        same = self.unchanged() if any(fn(torch.empty(0, dtype=kind)).dtype != kind for kind in types) else set()
        yield
        if same:
            self.start.update({name: found for name, found in self._fingerprints().items() if name in same})

    def unchanged(self) -> set[str]:
        """Names of those that are as at the start."""
        return {name for name, found in self._fingerprints().items() if self.start.get(name) == found}

    def _fingerprints(self) -> dict[str, int]:
        return {
            name: fingerprint([_local(parameter)])
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad and name not in self.moving
        }


def _at_least_float32(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor
