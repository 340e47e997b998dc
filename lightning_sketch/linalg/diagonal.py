"""The diagonal of an operator from products with vectors of random signs, with an error bar for each entry.

    diag A = E[z ⊙ A z],     z_i = ±1 independent     variance of entry i: sum of A_ij² over j ≠ i

Source: Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix", Applied Numerical Mathematics
57(11), doi:10.1016/j.apnum.2007.01.003.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.operators.base import LinearOperator
from lightning_sketch.operators.random import Key, flip_

_CHUNK = 1 << 18


class Diagonal(NamedTuple):
    """An estimate of the diagonal of an operator, in the operator's type and on its device.

    Attributes:
        values: The estimate of A_ii, (n,).
        sem: The standard error of each entry, (n,), from the spread over the products.
    """

    values: Float[Tensor, " n"]
    sem: Float[Tensor, " n"]

    def __repr__(self) -> str:
        size, error = float(self.values.double().norm()), float(self.sem.double().norm())
        return f"Diagonal of {len(self.values):,} entries, of length {size:.4g} ± {error:.2g}"


def diagonal(operator: LinearOperator, num_matvecs: int = 32, seed: int = 0) -> Diagonal:
    """Estimate the diagonal of a square operator, with a standard error for each entry.

    The mean over products has no bias, and is exact for a diagonal matrix. The error falls as one over the root of
    `num_matvecs`: an entry is known once it is large against the rest of its row, and an operator whose rows are full
    takes many products. It costs `num_matvecs` products, and memory for three vectors of size n besides the product.

    Args:
        operator: A square operator, such as a `Hessian`.
        num_matvecs: The number of products, at least 2.
        seed: The seed of the random signs, which are the same on every device and rank.

    Returns:
        The entries and their standard errors, (n,) each.

    Raises:
        ValueError: If the operator is not square, or `num_matvecs` is below 2.

    >>> from lightning_sketch.operators import CountSketch
    >>> s = CountSketch(n=4, dim=4, seed=0)
    >>> diagonal(s.T @ s, num_matvecs=2).values  # SᵀS is the identity
    tensor([1., 1., 1., 1.])
    """
    m, n = operator.shape
    if m != n:
        raise ValueError(f"a diagonal needs a square operator, got shape {operator.shape}.")
    if num_matvecs < 2:
        raise ValueError(f"need num_matvecs >= 2 to know an error, got {num_matvecs}; 32 is usual.")
    mean, squares, z = (torch.empty(n, dtype=operator.dtype, device=operator.device) for _ in range(3))
    mean.zero_()
    squares.zero_()  # the sum of squared distances from the mean, by Welford's recurrence
    with operator.hold(), torch.no_grad():
        for done in range(1, num_matvecs + 1):
            _fill_with_signs(z, Key(seed, f"diagonal/{done}"))
            z.mul_(operator.matvec(z)).sub_(mean)
            mean.add_(z, alpha=1 / done)
            squares.addcmul_(z, z, value=1 - 1 / done)
    return Diagonal(mean, squares.div_(num_matvecs * (num_matvecs - 1)).sqrt_())


def _fill_with_signs(z: Float[Tensor, " n"], key: Key) -> None:
    """Set each entry to -1 or 1, by chunks, so that no second vector is needed."""
    z.fill_(1)
    for start, piece in zip(range(0, len(z), _CHUNK), z.split(_CHUNK), strict=True):
        flip_(piece, key, start)
