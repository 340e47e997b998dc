"""A curvature matrix in the coordinates in which an adaptive optimizer takes steps of plain gradient descent.

    D A D,    D = P^-1/2

A    a symmetric operator, such as a Hessian H
P    the positive diagonal by which an optimizer divides its steps: θ' = θ - lr P^-1 m, with m a mean of gradients

In y = P^1/2 θ the step is y' = y - lr P^-1/2 m, along a mean of gradients of the loss as a function of y, whose Hessian
is P^-1/2 H P^-1/2. Its eigenvalues are those of P^-1 H, and are compared with `stability_edge(optimizer).edge`.
"""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.optimizer_state import check_adaptive, divisor, with_optimizers
from lightning_sketch.autodiff.shards import Shards, local, reshard
from lightning_sketch.curvature.operator import CurvatureOperator
from lightning_sketch.operators.base import LinearOperator, UnaryOperator

_FAR = 100.0  # how far above the usual D one is that comes of rounding error: P is 10^4 times smaller


@dataclass(frozen=True, eq=False)
class Preconditioned(UnaryOperator):
    """The symmetric matrix D A D, with a diagonal matrix D. A product costs one with A.

    Its eigenvectors are in the coordinates y = D^-1 θ, and so is `scale * gradient`, the gradient in them.

    Args:
        of: The symmetric operator A, of size n.
        scale: The diagonal of D, (n,), not negative; zero leaves a parameter out. Of a sharded module,
            this rank's part.

    Raises:
        ValueError: If sizes disagree, or a number of `scale` is negative or not finite.

    >>> from lightning_sketch.operators import CountSketch
    >>> s = CountSketch(n=2, dim=2, seed=0)
    >>> Preconditioned(s.T @ s, torch.tensor([1.0, 3.0])).as_matrix().abs()  # SᵀS is the identity
    tensor([[1., 0.],
            [0., 9.]])
    """

    of: LinearOperator
    scale: Float[Tensor, " n"]

    def __post_init__(self):
        if self.of.shape[0] != self.of.shape[1] or self.of.space.size != len(self.scale):
            raise ValueError(f"cannot scale a {self.of.shape} operator by {len(self.scale)} numbers.")
        if self.of.space.anywhere(not bool((self.scale >= 0).all() & self.scale.isfinite().all())):
            raise ValueError("the scale of a preconditioned matrix has a negative or infinite number, or NaN.")

    def __repr__(self) -> str:
        return f"Preconditioned {self.of!r}"

    @classmethod
    def from_optimizer(
        cls,
        operator: CurvatureOperator,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> "Preconditioned":
        """Return P^-1/2 A P^-1/2 with the diagonal P by which an optimizer divides its steps.

        P is sqrt(v) + epsilon of the last step with both bias corrections (1 - β1^t)(sqrt(v / (1 - β2^t)) + epsilon)
        for Adam, see `autodiff.optimizer_state` for others, and 1 for SGD. Param groups of different learning rates
        have P times lr_max / lr, so that eigenvalues are compared with the edge at the largest learning rate.
        Parameters that the optimizer has not moved yet are left out, with a warning. Memory: n numbers.

        Args:
            operator: The curvature matrix.
            optimizers: Adam, AdamW, NAdam, Adamax, RMSprop, Adagrad or SGD of PyTorch that has trained the module, or
                several.
            groups: The param groups with the options that steps use, where they are not the optimizer's own.

        Raises:
            ValueError: If the optimizer divides by no diagonal (Lion, Muon, Shampoo, LBFGS), has not stepped yet, or
                has no positive learning rate.

        Source: Cohen et al. (2022), "Adaptive gradient methods at the edge of stability", arXiv:2207.14484, eqs. (2)
        and (3).

        >>> from lightning_sketch import Hessian, spectrum
        >>> from lightning_sketch.curvature import stability_edge
        >>> module, x = torch.nn.Linear(2, 1), torch.ones(1, 2)
        >>> loss_fn = lambda module, batch: module(batch).square().mean()
        >>> adam = torch.optim.Adam(module.parameters(), lr=1e-3)
        >>> loss_fn(module, x).backward()
        >>> adam.step()
        >>> matrix = Preconditioned.from_optimizer(Hessian(loss_fn, module, [x]), adam)
        >>> ratio = spectrum(matrix, top_k=1, bottom_k=0).lambda_max / stability_edge(adam).edge
        """
        pairs = with_optimizers(optimizers, groups)
        largest = max((float(group["lr"]) for _, group in pairs if "lr" in group), default=0.0)
        if not largest > 0:
            raise ValueError("no param group has a positive learning rate, so that no parameter moves.")
        scales: dict[int, Tensor] = {}
        for optimizer, group in pairs:
            for parameter in group["params"]:
                found = _divisor(optimizer, group, parameter)
                if found is not None:  # a rate of zero leaves its parameters out
                    scales[id(parameter)] = local((float(group["lr"]) / largest / found).sqrt())
        reshard(operator.module)  # the optimizer has the shards
        named = dict(zip(operator.layout.names, operator.layout.parameters(operator.module), strict=True))
        missing = [name for name, parameter in named.items() if id(parameter) not in scales]
        if missing:
            some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            if len(missing) == len(named):
                raise ValueError(
                    f"the optimizer has no state of {some}; train for a step, or load the checkpoint's optimizer."
                )
            warnings.warn(f"the optimizer has never moved {some}, left out of the preconditioned matrix.", stacklevel=2)
        _warn_of_normalized(operator, {name: scales[id(p)] for name, p in named.items() if id(p) in scales})
        diagonal = [scales.get(id(p)) for p in named.values()]
        if isinstance(operator.space, Shards):
            return cls(operator, operator.space.flatten(diagonal))
        like = torch.empty((), dtype=operator.dtype, device=operator.device)
        return cls(operator, operator.layout.flatten(diagonal, like))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of A."""
        return self.of.shape

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return D A D x for each vector x along the last axis."""
        scale = self.scale.to(x)
        return scale * self.of.matvec(scale * x)

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return the same as `matvec`: the matrix is symmetric."""
        return self.matvec(y)

    def last_error(self) -> Tensor | None:
        """Return D times the error of the last product with A."""
        error = self.of.last_error()
        return None if error is None else self.scale.to(error) * error


def _divisor(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Tensor | None:
    """Return P of a parameter with the correction of Adam's first mean, or None if it has not moved yet.

    Raises:
        ValueError: If the optimizer divides by no diagonal.
    """
    if type(optimizer) is torch.optim.SGD:
        return torch.ones_like(parameter, requires_grad=False)
    state = optimizer.state.get(parameter, {})
    check_adaptive(optimizer)
    steps = float(state.get("step", 0))
    if not steps:
        return None
    found = divisor(optimizer, group, state)
    corrected = not isinstance(optimizer, torch.optim.NAdam) and "betas" in group  # NAdam's is in its edge
    return found * (1 - group["betas"][0] ** steps) if corrected else found


def _warn_of_normalized(operator: CurvatureOperator, scales: Mapping[str, Tensor]) -> None:
    """Warn of parameters whose gradient in training is only rounding error, as of a bias in front of a batch norm.

    P is next to nothing there. In training their second derivatives are zero too; in evaluation they are not, and the
    largest eigenvalue is then one that training never meets.
    """
    normalized = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in operator.module.modules())
    if operator.mode != "eval" or not normalized:
        return
    here = {name: scale for name, scale in scales.items() if scale.numel()}  # a rank may have no shard of a parameter
    usual = statistics.median(float(scale.median()) for scale in here.values()) if here else 0.0
    wrong = [name for name, scale in here.items() if float(scale.min()) > _FAR * usual > 0]
    if wrong:
        warnings.warn(
            f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} had next to no gradient in training, as a bias "
            "in front of a batch norm has none, and in mode='eval' such parameters dominate the preconditioned matrix; "
            "use mode='train', or bias=False.",
            stacklevel=3,
        )
