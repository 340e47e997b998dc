"""Multiplies gradients by a preconditioner, L g with Lᵀ L = (P + lambda)⁻¹, block by block of the parameters.

    L G = D * (Uᵀ G V)        D = (E + lambda)^-1/2 elementwise,        lambda = c mean(E)

G       a block of the gradient as a matrix: that of a parameter, or of one of several that are stacked in it
P       of this block U ⊗ V diag(E) (U ⊗ V)ᵀ, where nothing couples it with other blocks
U, V    orthogonal, or the identity; where both are, P is diagonal
c       the damping, relative to the mean eigenvalue of the block

Of a gradient that is a sum of products, l rᵀ, the factors are rotated, (Uᵀ l)(Vᵀ r)ᵀ, and D multiplies the buffer in
which it is formed anyway. L is not symmetric: it does not rotate back, which no inner product sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.operators._precision import full_precision
from lightning_sketch.per_example.factors import Dense, Factor, LowRank, SparseRows


@dataclass(frozen=True, eq=False)
class Block:
    """The preconditioner of a block of a parameter, of rows x columns numbers.

    Args:
        start: Where the block begins in the flat parameter.
        eigenvalues: The eigenvalues E of P, none of them negative.
        left: The orthogonal matrix U, (rows, rows); None for the identity.
        right: The orthogonal matrix V, (columns, columns); None for the identity.
    """

    start: int
    eigenvalues: Float[Tensor, "rows columns"]
    left: Float[Tensor, "rows rows"] | None = None
    right: Float[Tensor, "columns columns"] | None = None

    @property
    def is_diagonal(self) -> bool:
        """Whether P is diagonal."""
        return self.left is None and self.right is None

    def to(self, device: torch.device | str) -> "Block":
        """Return the same block on a device."""
        left, right = (None if basis is None else basis.to(device) for basis in (self.left, self.right))
        return Block(self.start, self.eigenvalues.to(device), left, right)

    @property
    def stop(self) -> int:
        """Where the block ends in the flat parameter."""
        return self.start + self.eigenvalues.numel()

    def scale(self, damping: float, like: Tensor) -> Float[Tensor, "rows columns"]:
        """Return D; zeros where P is zero in the whole block, of which nothing is known."""
        values = self.eigenvalues.to(like)
        total = values + damping * values.mean()
        return total.rsqrt_() if total.any() else total

    def rotate(self, factor: Factor) -> Factor | None:
        """Return Uᵀ G V as a factor, where G is given by one of the block's rows and columns; None if it is not."""
        if isinstance(factor, Dense):
            if (factor.start, factor.values.shape[1]) != (self.start, self.eigenvalues.numel()):
                return None
            matrices = factor.values.unflatten(1, self.eigenvalues.shape)
            values = _times(_times(matrices, self.right).mT, self.left).mT
            return replace(factor, values=values.flatten(1))
        if isinstance(factor, LowRank):
            if (factor.start, factor.left.shape[2], factor.right.shape[2]) != (self.start, *self.eigenvalues.shape):
                return None
            return replace(factor, left=_times(factor.left, self.left), right=_times(factor.right, self.right))
        if self.start or self.eigenvalues.shape != factor.parameter.shape:
            return None
        index, values = factor.index.to(factor.values.device, torch.int64), _times(factor.values, self.right)
        if self.left is None:
            return SparseRows(factor.parameter, index, values)
        return LowRank(factor.parameter, self.left.to(values)[index], values)


def _times(vectors: Tensor, basis: Tensor | None) -> Tensor:
    return vectors if basis is None else vectors @ basis.to(vectors)


Blocks = Mapping[str, Sequence[Block]]


@runtime_checkable
class GradientMap(Protocol):
    """A linear map of gradients, which a row is taken after."""

    def factor(self, factor: Factor) -> Factor:
        """Return the factor of the mapped gradients of the examples."""

    def gradients(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return the mapped gradients of the parameters, by name."""


class Preconditioned:
    """A function of gradients of known parameters, given as factors or whole.

    Args:
        blocks: The blocks of each parameter, which cover it.
        damping: The damping c.
        parameters: The parameters, by name.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> by = Preconditioned({"weight": [Block(0, torch.tensor([[1.0, 3.0]]))]}, 0.5, {"weight": layer.weight})
    >>> by.gradients({"weight": torch.tensor([[2.0, 2.0]])})  # divided by the roots of 1 + 1 and 3 + 1
    {'weight': tensor([[1.4142, 1.0000]])}
    """

    def __init__(self, blocks: Blocks, damping: float, parameters: Mapping[str, nn.Parameter]):
        self.blocks, self.damping = blocks, damping
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def factor(self, factor: Factor) -> Factor:
        """Return the factor of L g, given that of g."""
        blocks = self.blocks[self._names[id(factor.parameter)]]
        for block in blocks:
            whole = (
                len(blocks) == 1 and block.is_diagonal
            )  # then any part of it, in any shape, is an elementwise product
            rotated = factor if whole else block.rotate(factor)
            if rotated is not None:
                return _scaled(rotated, block.scale(self.damping, numbers(rotated)), block.start)
        return Dense(factor.parameter, self._flat(blocks, Dense(factor.parameter, formed(factor))))

    def gradients(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return L g of each parameter, by name; None stays None."""
        return {name: None if g is None else self._whole(name, g) for name, g in gradients.items()}

    def _whole(self, name: str, gradient: Tensor) -> Tensor:
        flat = gradient.to_dense().reshape(1, -1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        with full_precision(flat.device):
            return self._flat(self.blocks[name], Dense(nn.Parameter(gradient, requires_grad=False), flat)).view(
                gradient.shape
            )

    def _flat(self, blocks: Sequence[Block], whole: Dense) -> Float[Tensor, "examples numbers"]:
        found = torch.empty_like(whole.values)
        for block in blocks:
            part = slice(block.start, block.stop)
            rotated = cast(Dense, block.rotate(replace(whole, values=whole.values[:, part], start=block.start)))
            found[:, part] = rotated.values * block.scale(self.damping, found).flatten()
        return found


def numbers(factor: Factor) -> Tensor:
    """Return a tensor that has the examples, the type and the device of the factor's numbers."""
    return factor.left if isinstance(factor, LowRank) else factor.values


def _scaled(factor: Factor, scale: Tensor, start: int) -> Factor:
    """Return a factor of gradients times numbers, elementwise; these are the parameter's from `start` on."""
    flat = scale.reshape(-1)
    if isinstance(factor, SparseRows):
        rows = flat.view(len(factor.parameter), -1)[factor.index.to(flat.device, torch.int64)]
        return replace(factor, values=factor.values * rows)
    first = factor.start - start
    if isinstance(factor, Dense):
        return replace(factor, values=factor.values * flat[first : first + factor.values.shape[1]])
    shape = factor.left.shape[2], factor.right.shape[2]
    return replace(factor, scale=flat[first : first + shape[0] * shape[1]].view(shape))


def formed(factor: Factor) -> Float[Tensor, "examples numbers"]:
    """Return the gradients of a parameter that a factor stands for, formed whole, flat for each example."""
    flat = numbers(factor).new_zeros(len(numbers(factor)), factor.parameter.numel())
    if isinstance(factor, SparseRows):
        table = flat.view(len(flat), len(factor.parameter), -1)
        index = factor.index.to(flat.device, torch.int64)
        table.scatter_add_(1, index[..., None].expand_as(factor.values), factor.values)
        return flat
    if isinstance(factor, Dense):
        values = factor.values
    else:
        values = factor.left.mT @ factor.right
        values = (values if factor.scale is None else values * factor.scale).flatten(1)
    flat[:, factor.start : factor.start + values.shape[1]] = values
    return flat
