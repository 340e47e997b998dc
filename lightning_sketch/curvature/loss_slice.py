"""The loss on a line or a plane through the present parameters, and its largest rise in a small box around them.

    L(θ + a d_1)  or  L(θ + a d_1 + b d_2)           a, b on a grid
    max of (L(θ + y) - L(θ)) / (1 + L(θ)) · 100      |y_i| <= ε (|θ_i| + 1)

Random directions are normalized by filters: each filter of d (a row of a matrix, an output channel of a convolution)
gets the length of the same filter of θ; biases and the scales of normalization layers do not move. Else the scale that
ReLU and normalization layers leave free would decide how flat the picture looks.

Sources: Li, Xu, Taylor, Studer & Goldstein (2018), "Visualizing the loss landscape of neural nets", arXiv:1712.09913,
section 4; Keskar et al. (2017), "On large-batch training for deep learning", arXiv:1609.04836, metric 2.1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch import plots
from lightning_sketch._arguments import kind_of
from lightning_sketch.autodiff.functional import swap_tensors
from lightning_sketch.autodiff.shards import Shards
from lightning_sketch.curvature.operator import CurvatureOperator
from lightning_sketch.operators.random import Key, normals, signs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POWER_STEPS = 3  # gradients that turn a random direction to one in which the loss rises fast


@dataclass(frozen=True, eq=False)
class LossSlice:
    """The loss on a grid of points around the parameters θ; tensors in float64 on the CPU.

    Attributes:
        coordinates: The grid of each axis, a multiple of the direction, (points,).
        losses: L(θ + a d_1), (points,), or L(θ + a d_1 + b d_2), (points, points), in row a and column b; in loss
            units, NaN or infinite where the loss is.
        names: The name of each direction.
        loss: L(θ).
    """

    coordinates: Float[Tensor, " points"]
    losses: Float[Tensor, "..."]
    names: tuple[str, ...]
    loss: float

    def __repr__(self) -> str:
        size = " x ".join(str(length) for length in self.losses.shape)
        low, high = float(self.losses.min()), float(self.losses.max())
        along = " and ".join(self.names)
        return f"LossSlice of {size} points along {along}: {low:.4g} to {high:.4g}, {self.loss:.4g} in the middle"

    def plot(self) -> "Figure":
        """Draw the losses as a line, or as contours in two dimensions.

        Returns:
            A matplotlib Figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plots.loss_slice(self.coordinates.tolist(), self.losses.tolist(), names=self.names, loss=self.loss)


def loss_slice(
    operator: CurvatureOperator,
    directions: int | Float[Tensor, "k n"] = 2,
    points: int = 21,
    *,
    distance: float = 1.0,
    seed: int = 0,
) -> LossSlice:
    """Compute the mean loss of the operator's batches on a grid along one or two directions.

    The module's parameters are never written to. It costs `points` forward passes over all batches along one
    direction, points² along two, and one gradient; memory for a copy of the parameters and the directions.

    Args:
        operator: A `Hessian`, `GGN` or `EmpiricalFisher`, of which module, parameters, batches and loss are taken.
        directions: 1 or 2 for so many random ones, normalized by filters; or one or two vectors as rows, (k, n), such
            as `sp.eigenvectors(h, 2).vectors`, which are used as they are.
        points: The number of points of each axis, at least 2; θ itself is one of them if it is odd.
        distance: Where the grid ends on either side, as a multiple of the directions: for random ones 1 moves each
            filter by its own length, for vectors of length one it is a length in the space of parameters.
        seed: The seed of random directions, which are the same on every device and rank.

    Raises:
        ValueError: If a number is out of range, vectors have another shape, no parameter is a matrix or a convolution
            that random directions could move, or the loss uses a parameter without its module.

    >>> from lightning_sketch import Hessian
    >>> module = torch.nn.Linear(2, 1, bias=False).requires_grad_()
    >>> h = Hessian(lambda module, batch: module(batch).square().mean(), module, [torch.eye(2)])
    >>> loss_slice(h, directions=1, points=3, distance=2.0).losses.shape
    torch.Size([3])
    """
    if not isinstance(operator, CurvatureOperator):
        raise TypeError(
            f"loss_slice takes an operator, got {kind_of(operator)}; pass Hessian(loss_fn, module, batches)."
        )
    count = directions if isinstance(directions, int) else len(directions)
    if count not in (1, 2):
        raise ValueError(f"a slice has 1 or 2 directions, got {count}; leave directions out for two random ones.")
    if not isinstance(directions, int) and directions.shape[1] != operator.layout.n:
        raise ValueError(
            f"directions are vectors of size {operator.layout.n} as rows, got shape {tuple(directions.shape)}; pass "
            "sp.eigenvectors(operator, 2).vectors."
        )
    if points < 2 or not distance > 0:
        raise ValueError(f"need points >= 2 and distance > 0, got {points} and {distance}; 21 and 1 are usual.")
    _refuse_shards(operator, "loss_slice")
    with operator.hold(), torch.no_grad():
        here = operator.loss()
        _check_all_through_module(operator)
        if isinstance(directions, int):
            rows = [_by_filters(operator, seed, i) for i in range(count)]
            names = tuple(f"random direction {i + 1}" for i in range(count))
        else:
            rows = [row.to(operator.device, operator.dtype) for row in directions]
            names = tuple(f"direction {i + 1}" for i in range(count))
        grid = (torch.arange(points, dtype=torch.float64) - (points - 1) / 2) * (2 * distance / (points - 1))
        losses = []
        for a in grid.tolist():
            if count == 1:
                losses.append(_loss_at(operator, a * rows[0]))
            else:
                losses += [_loss_at(operator, a * rows[0] + b * rows[1]) for b in grid.tolist()]
    return LossSlice(grid, torch.tensor(losses, dtype=torch.float64).reshape((points,) * count), names, here)


def keskar_sharpness(
    operator: CurvatureOperator, epsilon: float = 1e-3, num_steps: int = 10, *, seed: int = 0
) -> float:
    """Return Keskar's sharpness: the largest rise of the loss in a small box, as a percentage of 1 + L(θ).

    It is a lower bound of the maximum over |y_i| <= ε (|θ_i| + 1), by projected gradient ascent: three steps of the
    power method inside a tenth of the box, which find a direction also where the gradient is zero, then steps along the
    signs of the gradient, each entry from twice its side of the box down to nothing. It costs `num_steps` + 4 gradients
    and `num_steps` + 1 losses.

    For three small classifiers and ε from 5e-4 to 1e-2 it reached 99 % or more of the best of eight ascents with other
    steps. At the exact minimum of quadratic losses of nine parameters, the hardest case, it found 90 % of the true
    maximum on average, and 68 % at worst of 80 losses.

    Args:
        operator: A `Hessian`, `GGN` or `EmpiricalFisher`, of which module, parameters, batches and loss are taken.
        epsilon: The size ε of the box; 1e-3 and 5e-4 in the paper.
        num_steps: The number of steps.
        seed: The seed of the random direction that it starts from.

    Returns:
        100 (max L(θ + y) - L(θ)) / (1 + L(θ)), at least 0, without a unit; NaN if L(θ) <= -1.

    Raises:
        ValueError: If a number is not positive, or the loss uses a parameter without its module.

    >>> from lightning_sketch import Hessian
    >>> module = torch.nn.Linear(1, 1, bias=False)
    >>> torch.nn.init.zeros_(module.weight).shape
    torch.Size([1, 1])
    >>> h = Hessian(lambda module, batch: module(batch).square().mean(), module, [torch.ones(1, 1)])
    >>> round(keskar_sharpness(h, epsilon=0.1), 3)  # 100 · 0.1²
    1.0
    """
    if not epsilon > 0 or num_steps < 1:
        raise ValueError(f"need epsilon > 0 and num_steps >= 1, got {epsilon} and {num_steps}; 1e-3 and 10 are usual.")
    _refuse_shards(operator, "keskar_sharpness")
    with operator.hold(), torch.no_grad():
        here = highest = operator.loss()
        _check_all_through_module(operator)
        like = torch.empty((), dtype=operator.dtype, device=operator.device)
        side = operator.layout.flatten([p.detach() for p in operator.parameters], like).abs_().add_(1).mul_(epsilon)
        y = signs(Key(seed, "keskar"), 0, len(side), side.dtype, side.device).mul_(side).mul_(0.1)
        for _ in range(_POWER_STEPS):
            uphill = _gradient_at(operator, y).mul_(side)
            if largest := float(uphill.abs().max()):
                y = uphill.mul_(side).mul_(0.1 / largest)
        for step in range(num_steps):
            uphill = _gradient_at(operator, y).sign_()
            y.addcmul_(uphill, side, value=2 * (1 - step / num_steps)).clamp_(-side, side)
            highest = max(highest, _loss_at(operator, y))
    return 100 * (highest - here) / (1 + here) if here > -1 else math.nan


def _refuse_shards(operator: CurvatureOperator, name: str) -> None:
    if isinstance(operator.space, Shards):
        raise ValueError(
            f"{name} moves whole parameters, and those of this module are sharded; load a checkpoint into one process, "
            "or use spectrum and critical_learning_rate, which work on shards."
        )


@contextmanager
def _moved(operator: CurvatureOperator, y: Float[Tensor, " n"]) -> Iterator[None]:
    """Let the operator compute losses and gradients at θ + y, inside its `hold`, on copies of the parameters."""
    held = operator.parameters
    parts = operator.layout.unflatten(y)
    moved = [torch.add(p.detach(), part).requires_grad_() for p, part in zip(held, parts, strict=True)]
    with swap_tensors(operator.module, held, moved):
        operator.parameters = moved
        try:
            yield
        finally:
            operator.parameters = held


def _loss_at(operator: CurvatureOperator, y: Float[Tensor, " n"]) -> float:
    with _moved(operator, y):
        return operator.loss()


def _gradient_at(operator: CurvatureOperator, y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    with _moved(operator, y):
        return operator.gradient()


def _check_all_through_module(operator: CurvatureOperator) -> None:
    """Refuse a loss that uses a parameter by a closure or the like, so that it would not see it move."""
    held = operator.parameters
    with _moved(operator, torch.zeros(operator.layout.n, dtype=operator.dtype, device=operator.device)):
        operator.parameters = held  # of which the loss at copies of them is no function
        if operator.gradient().any():
            raise ValueError(
                "the loss uses a parameter without its module, by a closure or an attribute such as a tuple or dict, "
                "so that it cannot be computed at other values. Use parameters through modules."
            )


def _by_filters(operator: CurvatureOperator, seed: int, index: int) -> Float[Tensor, " n"]:
    """Return a random direction, each filter as long as that of the parameters; zero for vectors and scalars."""
    n = operator.layout.n
    direction = normals(Key(seed, f"loss slice/{index}"), 0, n, operator.dtype, operator.device)
    for part, parameter in zip(operator.layout.unflatten(direction), operator.parameters, strict=True):
        if parameter.ndim < 2:
            part.zero_()
            continue
        filters, of = part.flatten(1), parameter.detach().flatten(1)
        part.mul_((of.norm(dim=1) / filters.norm(dim=1)).view(-1, *[1] * (part.ndim - 1)))
    if not direction.any():
        raise ValueError(
            "random directions move matrices and convolutions only, and there are none among the parameters "
            f"{', '.join(operator.layout.names[:5])}; pass directions as vectors."
        )
    return direction
