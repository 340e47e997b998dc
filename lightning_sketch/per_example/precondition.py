"""Multiplies gradients by a preconditioner, L g with Lᵀ L = (P + lambda)⁻¹, block by block of the parameters.

    L G = D * (Uᵀ G V)        D = (E + lambda)^-1/2 elementwise,        lambda = c mean(E)

G       a block of the gradient as a matrix: that of a parameter, or of one of several that are stacked in it; of a
        layer with a bias it has a column more, the bias's gradient (a row more where a layer's matrix is transposed)
P       of this block (U ⊗ V) diag(E) (U ⊗ V)ᵀ, where nothing couples it with other blocks
U, V    orthogonal, or the identity; where both are, P is diagonal
c       the damping, relative to the mean eigenvalue of the block

Of a gradient that is a sum of products, l rᵀ, the factors are rotated, (Uᵀ l)(Vᵀ r)ᵀ, and D multiplies the buffer in
which it is formed anyway. L is not symmetric: it does not rotate back, which no inner product sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.operators._precision import full_precision
from lightning_sketch.per_example.factors import Dense, Factor, LowRank, SparseRows, separate


@dataclass(frozen=True)
class JointBias:
    """The bias whose gradient is one more column of a block, or row.

    Args:
        name: The name of the bias.
        side: The side of the block's matrix that has the layer's outputs: "left" if the bias is one more column.
        start: Where its numbers begin in the flat bias.
    """

    name: str
    side: Literal["left", "right"] = "left"
    start: int = 0


@dataclass(frozen=True, eq=False)
class Block:
    """The preconditioner of a block of a parameter, of rows x columns numbers, with those of a bias.

    Args:
        start: Where the block begins in the flat parameter.
        eigenvalues: The eigenvalues E of P, none of them negative.
        left: The orthogonal matrix U, (rows, rows); None for the identity.
        right: The orthogonal matrix V, (columns, columns); None for the identity.
        bias: The bias that is the last column, or row, of the block; None for none.
    """

    start: int
    eigenvalues: Float[Tensor, "rows columns"]
    left: Float[Tensor, "rows rows"] | None = None
    right: Float[Tensor, "columns columns"] | None = None
    bias: JointBias | None = None

    @property
    def is_diagonal(self) -> bool:
        """Whether P is diagonal."""
        return self.left is None and self.right is None

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns of the parameter alone."""
        rows, columns = self.eigenvalues.shape
        side = None if self.bias is None else self.bias.side
        return rows - (side == "right"), columns - (side == "left")

    @property
    def stop(self) -> int:
        """Where the block ends in the flat parameter."""
        return self.start + self.shape[0] * self.shape[1]

    def to(self, device: torch.device | str) -> "Block":
        """Return the same block on a device."""
        left, right = (None if basis is None else basis.to(device) for basis in (self.left, self.right))
        return replace(self, eigenvalues=self.eigenvalues.to(device), left=left, right=right)

    def scale(self, damping: float, like: Tensor) -> Float[Tensor, "rows columns"]:
        """Return D; zeros where P is zero in the whole block, of which nothing is known."""
        values = self.eigenvalues.to(like)
        total = values + damping * values.mean()
        return total.rsqrt_() if total.any() else total

    def rotate(self, factor: Factor) -> Factor | None:
        """Return Uᵀ G V as a factor of a matrix with the bias; None if the factor is not one of the block.

        A factor of products has the bias's gradient if it has a `bias`, else this is zero; other factors must be given
        whole if the block has a bias: `Dense` values of rows x columns numbers, the bias included.
        """
        if isinstance(factor, Dense):
            if (factor.start, factor.values.shape[1]) != (self.start, self.eigenvalues.numel()):
                return None
            matrices = factor.values.unflatten(1, self.eigenvalues.shape)
            values = _times(_times(matrices, self.right).mT, self.left).mT
            return replace(factor, values=values.flatten(1))
        if isinstance(factor, LowRank):
            if (factor.start, factor.left.shape[2], factor.right.shape[2]) != (self.start, *self.shape):
                return None
            side = None if self.bias is None else self.bias.side
            one = float(factor.bias is not None)
            left = _times(factor.left, self.left, one if side == "right" else None)
            right = _times(factor.right, self.right, one if side == "left" else None)
            return replace(factor, left=left, right=right, bias=None)
        if self.start or self.bias is not None or self.shape != factor.parameter.shape:
            return None
        index, values = factor.index.to(factor.values.device, torch.int64), _times(factor.values, self.right)
        if self.left is None:
            return SparseRows(factor.parameter, index, values)
        return LowRank(factor.parameter, self.left.to(values)[index], values)

    def joined(self, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "examples numbers"]:
        """Return the flat block of flat gradients of the parameter, (examples, all numbers), and of its bias."""
        own = weight[:, self.start : self.stop]
        if self.bias is None:
            return own
        rows, columns = self.shape
        size = rows if self.bias.side == "left" else columns
        more = own.new_zeros(len(own), size) if bias is None else bias[:, self.bias.start : self.bias.start + size]
        axis = 2 if self.bias.side == "left" else 1
        return torch.cat([own.unflatten(1, self.shape), more.unsqueeze(axis).to(own)], axis).flatten(1)


def _times(vectors: Tensor, basis: Tensor | None, one: float | None = None) -> Tensor:
    """Return vectors times a basis, after appending the number `one` to each vector unless it is None."""
    if basis is None:
        return vectors if one is None else torch.nn.functional.pad(vectors, (0, 1), value=one)
    basis = basis.to(vectors)
    return vectors @ basis if one is None else (vectors @ basis[:-1]).add_(basis[-1], alpha=one)


Blocks = Mapping[str, Sequence[Block]]


@runtime_checkable
class GradientMap(Protocol):
    """A linear map of gradients, which a row is taken after."""

    def factors(self, factor: Factor) -> list[Factor]:
        """Return the factors of the mapped gradients of the examples, one for each parameter."""

    def gradients(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return the mapped gradients of the parameters, by name."""


class Preconditioned:
    """A function of gradients of known parameters, given as factors or whole.

    Args:
        blocks: The blocks of each parameter, which cover it; of a bias that is in the blocks of a matrix none.
        damping: The damping c.
        parameters: The parameters, by name.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> by = Preconditioned({"weight": [Block(0, torch.tensor([[1.0, 3.0]]))]}, 0.5, {"weight": layer.weight})
    >>> by.gradients({"weight": torch.tensor([[2.0, 2.0]])})  # divided by the roots of 1 + 1 and 3 + 1
    {'weight': tensor([[1.4142, 1.0000]])}
    """

    def __init__(self, blocks: Blocks, damping: float, parameters: Mapping[str, nn.Parameter]):
        self.blocks, self.damping, self.parameters = blocks, damping, dict(parameters)
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def factors(self, factor: Factor) -> list[Factor]:
        """Return the factors of L g, given that of g."""
        name = self._names[id(factor.parameter)]
        blocks = self.blocks[name]
        if len(blocks) == 1 and blocks[0].is_diagonal and blocks[0].bias is None:
            (block,) = blocks  # any part of it, in any shape, is an elementwise product
            scale = block.scale(self.damping, numbers(factor))
            return [out for own in separate(factor) for out in self._elementwise(own, scale, factor)]
        if isinstance(factor, LowRank):
            own = next((b for b in blocks if b.start == factor.start), None)
            bias = None if own is None or own.bias is None else own.bias
            if factor.bias is not None and (bias is None or bias.name != self._names[id(factor.bias.parameter)]):
                return [out for part in separate(factor) for out in self.factors(part)]
        for block in blocks:
            if block.bias is None or isinstance(factor, LowRank):
                rotated = block.rotate(factor)
                if rotated is not None:
                    return self._split(
                        block, _scaled(rotated, block.scale(self.damping, numbers(rotated)), block.start)
                    )
        whole = self._whole({name: formed(factor)})
        return [Dense(self.parameters[key], values) for key, values in whole.items()]

    def gradients(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return L g of each parameter, by name; None stays None, unless it is of a layer whose other part has one."""
        flat: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            if gradient is not None:
                dense = gradient.to_dense().reshape(1, -1)
                flat[name] = dense.to(torch.promote_types(dense.dtype, torch.float32))
        if not flat:
            return dict(gradients)
        with full_precision(next(iter(flat.values())).device):
            found = self._whole(flat)
        shapes = {name: g.shape for name, g in gradients.items() if g is not None}
        shapes |= {name: values.shape[1:] for name, values in found.items() if name not in shapes}  # biases are flat
        result: dict[str, Tensor | None] = dict.fromkeys(gradients)
        return result | {name: values.view(shapes[name]) for name, values in found.items()}

    def _elementwise(self, factor: Factor, scale: Tensor, whole: Factor) -> list[Factor]:
        """Return a factor of the parameter times numbers; that of its bias by its own blocks."""
        if factor.parameter is whole.parameter:
            return [_scaled(factor, scale, 0)]
        return self.factors(factor)

    def _split(self, block: Block, factor: Factor) -> list[Factor]:
        """Return a factor of a block with a bias as one of the parameter and one of the bias."""
        if block.bias is None:
            return [factor]
        product, (rows, columns) = cast(LowRank, factor), block.shape
        left, right, scale = product.left, product.right, cast(Tensor, product.scale)
        if block.bias.side == "left":
            values = (left.mT @ right[:, :, columns:])[:, :, 0] * scale[:, columns]
            weight = replace(product, right=right[:, :, :columns], scale=scale[:, :columns])
        else:
            values = (left[:, :, rows:].mT @ right)[:, 0] * scale[rows]
            weight = replace(product, left=left[:, :, :rows], scale=scale[:rows])
        return [weight, Dense(self.parameters[block.bias.name], values, block.bias.start)]

    def _whole(self, flat: Mapping[str, Float[Tensor, "examples numbers"]]) -> dict[str, Tensor]:
        """Return L g of parameters and of what is joint with them, from whole gradients; a missing one is zero."""
        like, found = next(iter(flat.values())), dict[str, Tensor]()

        def out(name: str, numel: int) -> Tensor:
            return found.setdefault(name, like.new_zeros(len(like), numel))

        for name in self._concerned(flat):
            blocks = self.blocks[name]
            numel = max(block.stop for block in blocks)
            weight = flat.get(name, like.new_zeros(1, 1).expand(len(like), numel))
            for block in blocks:
                bias = None if block.bias is None else flat.get(block.bias.name)
                own = Dense(nn.Parameter(like, requires_grad=False), block.joined(weight, bias), block.start)
                values = cast(Dense, block.rotate(own)).values * block.scale(self.damping, like).flatten()
                if block.bias is None:
                    out(name, numel)[:, block.start : block.stop] = values
                    continue
                (rows, columns), matrices = block.shape, values.unflatten(1, block.eigenvalues.shape)
                out(name, numel)[:, block.start : block.stop] = matrices[:, :rows, :columns].flatten(1)
                more = matrices[:, :, columns] if block.bias.side == "left" else matrices[:, rows]
                size = self._size(block.bias.name)
                out(block.bias.name, size)[:, block.bias.start : block.bias.start + more.shape[1]] = more
        return found

    def _concerned(self, flat: Mapping[str, Tensor]) -> list[str]:
        """Return the parameters with blocks that these gradients are in."""
        own = [name for name in flat if self.blocks[name]]
        joint = (
            [n for n, blocks in self.blocks.items() if any(b.bias and b.bias.name in flat for b in blocks)]
            if len(own) < len(flat)
            else []
        )
        return list(dict.fromkeys([*own, *joint]))

    def _size(self, bias: str) -> int:
        """Return the number of scalars of a bias that is in the blocks of a matrix."""
        blocks = [block for own in self.blocks.values() for block in own if block.bias and block.bias.name == bias]
        return sum(block.shape[0] if cast(JointBias, block.bias).side == "left" else block.shape[1] for block in blocks)


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
