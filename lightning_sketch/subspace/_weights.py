"""The trainable weights θ = θ₀ + Dᵀ w with their gradient D g, and a record of the frozen ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.subspace.directions import Directions


class TrainableWeights:
    """The parameters that w determines, and θ₀, a copy of their initial values.

    Of sharded parameters, θ₀ is the shard of this rank.

    Args:
        module: The module that has the parameters.
        pattern: A shell-style pattern of their names, or several.
    """

    def __init__(self, module: nn.Module, pattern: str | Sequence[str]):
        self.module, self.layout = module, Layout.of(module, pattern)
        self.reset_start()

    @torch.no_grad()
    def reset_start(self) -> None:
        """Set θ₀ to the current values."""
        self.start = [_local(parameter).clone() for parameter in self.parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters, in layout order."""
        return self.layout.parameters(self.module)

    @torch.no_grad()
    def assign(self, directions: Directions, w: Float[Tensor, " dim"]) -> None:
        """Set the parameters to θ₀ + Dᵀ w, one after the other, so that no vector of length n is formed."""
        theta = self.parameters()
        steps = self.layout.adjoint(directions.sketch, directions.expand(_at_least_float32(w)), like=theta)
        for parameter, start, step in zip(theta, self.start, steps, strict=True):
            _local(parameter).copy_(start + step)

    def values_at(self, directions: Directions, w: Float[Tensor, " dim"]) -> list[Tensor]:
        """Return θ₀ + Dᵀ w as a differentiable function of w; this forms a vector of length n."""
        steps = self.layout.unflatten(directions.rmatvec(_at_least_float32(w)))
        return [(start + step).to(start) for start, step in zip(self.start, steps, strict=True)]

    @torch.no_grad()
    def pop_gradient(self, directions: Directions) -> Float[Tensor, " dim"]:
        """Return D g for the gradients g of the parameters, and set their `.grad` to None."""
        theta = self.parameters()
        gradients = dict(zip(self.layout.names, (parameter.grad for parameter in theta), strict=True))
        sketched = directions.restrict(self.layout.sketch(directions.sketch, gradients))
        for parameter in theta:
            parameter.grad = None
        return sketched

    def to(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Convert θ₀ by the function that the module's `_apply` converts its parameters by."""
        self.start = [fn(tensor) for tensor in self.start]


class FrozenWeights:
    """The parameters that are not trained, and fingerprints of their initial values.

    A module may change its own frozen parameters, as a mean teacher does; fingerprints tell which ones.

    Args:
        module: The module that has the parameters.
        trainable: The parameters that w determines, which are excluded under all their names.
    """

    def __init__(self, module: nn.Module, trainable: Sequence[nn.Parameter]):
        ids, named = {id(parameter) for parameter in trainable}, module.named_parameters(remove_duplicate=False)
        self.module, self.trainable = module, {name for name, parameter in named if id(parameter) in ids}
        self.start = self._fingerprints()

    @contextmanager
    def cast(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Take new fingerprints of unchanged parameters if the module's `_apply` converts dtypes in this context."""
        types = {parameter.dtype for parameter in self.module.parameters()}
        same = self.unchanged() if any(fn(torch.empty(0, dtype=kind)).dtype != kind for kind in types) else set()
        yield
        if same:
            self.start.update({name: found for name, found in self._fingerprints().items() if name in same})

    def unchanged(self) -> set[str]:
        """Return the names of the frozen parameters that have their initial values."""
        return {name for name, found in self._fingerprints().items() if self.start.get(name) == found}

    def _fingerprints(self) -> dict[str, int]:
        return {
            name: fingerprint([_local(parameter)])
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad and name not in self.trainable
        }


def _at_least_float32(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor as it is."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "placements") else tensor
