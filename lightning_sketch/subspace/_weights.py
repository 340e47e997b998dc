"""The weights that w determines, θ = θ₀ + Dᵀ w, with their gradient D g; and a record of those that stay."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.shards import local
from lightning_sketch.subspace.directions import Directions


class Motion(NamedTuple):
    """How a parameter follows w: along Dᵀ(w + offset) while it is trained, along Dᵀ offset while it is frozen.

    A parameter that is frozen at w₁ and trained again from w₂ on stays where it was: its offset is w₁, then w₁ - w₂.
    """

    trained: bool = True
    offset: Tensor | None = None

    def of(self, w: Tensor) -> Tensor:
        """Return the vector that Dᵀ is multiplied by."""
        if self.offset is None:
            return w if self.trained else torch.zeros_like(w)
        return w + self.offset if self.trained else self.offset.to(w)


class Weights:
    """The parameters that w determines, and θ₀, a copy of their initial values.

    Of sharded parameters, θ₀ is the shard of this rank.

    Args:
        module: The module that has the parameters.
        pattern: A shell-style pattern of their names, or several.
        without: A pattern of the names of parameters that are left out as the head, or several.
        per_layer: Whether each layer's step is multiplied by 1 + a number of its own, the last entries of w (SAID).
    """

    def __init__(
        self, module: nn.Module, pattern: str | Sequence[str], without: str | Sequence[str] | None, per_layer: bool
    ):
        lazy = [name for name, p in module.named_parameters() if is_lazy(p)]
        if lazy:
            raise ValueError(
                f"{lazy[0]} has no shape before the first batch, so a subspace of it cannot be made; run the module on "
                "a batch first."
            )
        self.module, self.layout = module, Layout.of(module, pattern)
        self.head = [] if without is None else Layout.of(module, without).parameters(module)
        if self.head:
            self.layout = self.layout.without(Layout.of(module, without or "*").names)
        layers = [name.rpartition(".")[0] for name in self.layout.names]
        self.layers = [list(dict.fromkeys(layers)).index(layer) for layer in layers] if per_layer else []
        self.motions = [Motion()] * len(self.layout.names)
        self.reset_start()

    @property
    def num_layers(self) -> int:
        """The number of layers with a scale of their own; 0 without such scales."""
        return len(set(self.layers))

    @torch.no_grad()
    def reset_start(self) -> None:
        """Set θ₀ to the current values."""
        self.start = [local(parameter).clone() for parameter in self.parameters()]
        self._marks = self._marked()

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters, in layout order."""
        return self.layout.parameters(self.module)

    @torch.no_grad()
    def assign(self, directions: Directions, w: Float[Tensor, " dim"], frozen: bool = False) -> None:
        """Set the parameters to θ₀ + Dᵀ w, one after the other, so that no vector of length n is formed.

        Args:
            directions: The matrix D.
            w: The coordinates.
            frozen: Whether to write those parameters too that do not move at present.
        """
        theta = self.parameters()
        for i, value in self._values(theta, directions, w, frozen):
            local(theta[i]).copy_(value)
        self._marks = self._marked()

    def values_at(self, directions: Directions, w: Float[Tensor, " dim"]) -> list[Tensor]:
        """Return θ₀ + Dᵀ w as a differentiable function of w; this forms a vector of length n."""
        w, scales = self._split(at_least_float32(w))
        values: list[Tensor] = [*self.start]
        for motion, indices in self._alike():
            steps = self.layout.unflatten(directions.rmatvec(motion.of(w)))
            for i in indices:
                values[i] = (self.start[i] + self._scaled(steps[i], i, scales)).to(self.start[i])
        return values

    @torch.no_grad()
    def gradient(self, directions: Directions, w: Float[Tensor, " dim"]) -> Float[Tensor, " dim"] | None:
        """Return D g for the gradients g of the parameters, (dim,), or None if none has a gradient.

        A frozen parameter has none. All ranks that have shards must call this.
        """
        theta = self.parameters()
        given = [p.grad if motion.trained else None for p, motion in zip(theta, self.motions, strict=True)]
        if all(g is None for g in given):
            return None
        head, scales = self._split(at_least_float32(w))
        scaled = [g if g is None else self._scaled(g, i, scales) for i, g in enumerate(given)]
        named = dict(zip(self.layout.names, scaled, strict=True))
        sketched = directions.restrict(self.layout.sketch(directions.sketch, named))
        if not self.layers:
            return sketched
        of_scales = sketched.new_zeros(self.num_layers)
        steps = self.layout.adjoint(directions.sketch, directions.expand(head), like=theta)
        for i, (g, step) in enumerate(zip(given, steps, strict=True)):
            if g is not None:
                of_scales[self.layers[i]] += (local(g).to(step) * step).sum()
        return torch.cat([sketched, of_scales])

    def drop_gradients(self) -> None:
        """Set the gradients of the parameters to None."""
        for parameter in self.parameters():
            parameter.grad = None

    def follow_flags(self, w: Float[Tensor, " dim"]) -> None:
        """Let parameters that were frozen stay where they are from this w on, and those that were unfrozen move again.

        Raises:
            ValueError: If a layer with a scale of its own is frozen after it has moved.
        """
        made: dict[tuple[int, bool], Motion] = {}
        for i, parameter in enumerate(self.parameters()):
            before = self.motions[i]
            if parameter.requires_grad == before.trained:
                continue
            if self.layers and w.any():
                raise ValueError(
                    f"{self.layout.names[i]} was frozen or unfrozen while training, which structure='layers' cannot "
                    "follow; freeze it before the first step, or leave structure out."
                )
            key = id(before.offset), before.trained
            if key not in made:
                moved = w.detach().clone() if before.trained else -w.detach()
                offset = moved if before.offset is None else before.offset + moved
                made[key] = Motion(parameter.requires_grad, offset if offset.any() else None)
            self.motions[i] = made[key]

    def set_motions(self, motions: Mapping[str, tuple[bool, Tensor | None]]) -> None:
        """Restore how parameters follow w from tuples of trained and offset, by name; without one, in the usual way."""
        offsets: list[Tensor] = []
        self.motions = []
        for name in self.layout.names:
            trained, offset = motions.get(name, (True, None))
            if offset is not None:  # one object for equal ones, by which they are told apart
                offset = next((o for o in offsets if torch.equal(o, offset)), offset.to(self.start[0].device))
                offsets.append(offset)
            self.motions.append(Motion(trained, offset))

    def lengthen(self, factor: float, dim: int) -> None:
        """Multiply what the motions remember of w, and append zeros up to a new dimension."""
        longer = {
            id(o): torch.cat([o * factor, o.new_zeros(dim - len(o))])
            for o in (motion.offset for motion in self.motions)
            if o is not None
        }
        self.motions = [m if m.offset is None else m._replace(offset=longer[id(m.offset)]) for m in self.motions]

    def are_at_start(self, names: Sequence[str]) -> bool:
        """Return whether the parameters of these names are at θ₀."""
        indices = [self.layout.names.index(name) for name in names]
        theta = self.parameters()
        return all(torch.equal(local(theta[i]), self.start[i]) for i in indices)

    def altered(self, directions: Directions, w: Float[Tensor, " dim"]) -> list[str]:
        """Return the names of parameters that have other values than those that they were set to.

        Versions and norms tell which ones may have; these are compared with θ₀ + Dᵀ w.
        """
        now = self._marked()
        if self._marks is None or now is None:
            return []
        if self._marks[0] == now[0] and torch.equal(self._marks[1], now[1]):
            return []
        theta, found = self.parameters(), []
        for i, value in self._values(theta, directions, w, frozen=True):
            actual = local(theta[i])
            if actual.shape != value.shape or not _equal(actual, value.to(actual)):
                found.append(self.layout.names[i])
        if not found:
            self._marks = now
        return found

    def to(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Convert θ₀ by the function that the module's `_apply` converts its parameters by."""
        self.start = [fn(tensor) for tensor in self.start]
        self.motions = [
            m if m.offset is None else m._replace(offset=m.offset.to(self.start[0].device)) for m in self.motions
        ]
        self._marks = None

    def _values(
        self, theta: Sequence[nn.Parameter], directions: Directions, w: Tensor, frozen: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the value θ₀ + Dᵀ w of each parameter that moves, or of all."""
        w, scales = self._split(at_least_float32(w))
        for motion, indices in self._alike():
            if motion.trained or frozen:
                y, chosen = directions.expand(motion.of(w)), set(indices)
                for i, step in enumerate(self.layout.adjoint(directions.sketch, y, like=theta)):
                    if i in chosen:
                        yield i, self.start[i] + self._scaled(step, i, scales)

    def _alike(self) -> list[tuple[Motion, list[int]]]:
        """Return the different motions, each with the indices of the parameters that have it."""
        found: dict[tuple[bool, int], tuple[Motion, list[int]]] = {}
        for i, motion in enumerate(self.motions):
            found.setdefault((motion.trained, id(motion.offset)), (motion, []))[1].append(i)
        return list(found.values())

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates along the directions, and the scales of layers less 1."""
        return w.tensor_split([len(w) - self.num_layers])  # type: ignore[return-value]  # two parts

    def _scaled(self, tensor: Tensor, index: int, scales: Tensor) -> Tensor:
        return tensor * (1 + scales[self.layers[index]]) if self.layers else tensor

    def _marked(self) -> tuple[list[int], Tensor] | None:
        """Return for each parameter what is likely to change if it is written to; None on the meta device.

        It stays on the device, which is waited for where it is compared only.
        """
        theta = [local(parameter).detach() for parameter in self.parameters()]
        if not theta or theta[0].is_meta:
            return None
        versions = [0 if tensor.is_inference() else tensor._version for tensor in theta]
        return versions, torch.stack([norm.double() for norm in torch._foreach_norm(theta)])


class FrozenWeights:
    """The parameters that are not trained, and fingerprints of their initial values.

    A module may change its own frozen parameters, as a mean teacher does; fingerprints tell which ones.

    Args:
        module: The module that has the parameters.
        theta: The parameters that w determines, which are excluded under all their names.
    """

    def __init__(self, module: nn.Module, theta: Sequence[nn.Parameter]):
        ids, named = set(map(id, theta)), module.named_parameters(remove_duplicate=False)
        self.module, self.following = module, {name for name, parameter in named if id(parameter) in ids}
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
            name: fingerprint([local(parameter)])
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad and name not in self.following
        }


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal up to a few roundings of the largest entry, as if added to and back."""
    if torch.equal(one, other):
        return True
    tolerance = 16 * torch.finfo(other.dtype).eps * float(other.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def at_least_float32(w: Tensor) -> Tensor:
    """Return w in float32, or in its own wider type."""
    return w.to(torch.promote_types(w.dtype, torch.float32))
