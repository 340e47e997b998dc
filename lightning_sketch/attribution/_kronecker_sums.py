"""Sums over examples from which the blocks of K-FAC and EK-FAC are made; `fit_preconditioner` has the formulas."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.attribution.preconditioner import diagonal
from lightning_sketch.per_example.factors import Bias, Dense, Factor, LowRank, SparseRows, separate
from lightning_sketch.per_example.precondition import Block, JointBias, formed, numbers

_PART = 1 << 20  # numbers of gradients that are formed at once

# Where a matrix lies in a parameter: its first number, its rows and columns.
_Place = tuple[int, int, int]

# What is summed up: the products or the lookups of a matrix, and the bias that its layer adds.
_Key = tuple[type, JointBias | None]


@dataclass(eq=False)
class _Use:
    """Sums over the products or the lookups of a matrix, l rᵀ.

    Args:
        left: The sum of l lᵀ, or its diagonal.
        right: The sum of r rᵀ, or its diagonal.
        trace: The sum of the squares of all gradients.
        of_bias: The part of it that is the bias's.
    """

    left: Tensor
    right: Tensor
    trace: Tensor
    of_bias: Tensor


@runtime_checkable
class Processes(Protocol):
    """Several processes, which call the same methods in the same order."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""


class OneProcess:
    """The only process."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]


class FactorSums:
    """Sums of the two factors of each matrix, and of the squares of what has no factors.

    Args:
        parameters: The parameters, by name.
        max_factor: The most rows of a factor that is kept whole.

    Attributes:
        uses: The most factors that a parameter had in one pass.
    """

    joins_biases = True

    def __init__(self, parameters: Mapping[str, nn.Parameter], max_factor: int):
        self.parameters, self.max_factor = parameters, max_factor
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.sums: dict[tuple[str, _Place], dict[_Key, _Use]] = {}
        self.alone: set[str] = set()  # what has gradients of its own, that are not those of a layer's bias
        self.squares: dict[str, Tensor] = {}
        self.uses: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._dense: dict[str, Tensor] = {}

    def add(self, factor: Factor) -> None:
        """Add a factor of the gradients of the examples."""
        name = self.names[id(factor.parameter)]
        self._now[name] += 1
        if isinstance(factor, Dense):
            self.alone.add(name)
            self._add_whole(name, factor)
        elif isinstance(factor, LowRank):
            place, bias = (factor.start, factor.left.shape[2], factor.right.shape[2]), None
            of_bias = factor.left.new_zeros(())
            if factor.bias is not None:
                bias = JointBias(self.names[id(factor.bias.parameter)], factor.bias.side, factor.bias.start)
                own = cast(Dense, separate(factor)[1])
                self._add_whole(bias.name, own)
                factor, of_bias = _with_ones(factor), own.values.square().sum()
            left, right = factor.left, factor.right
            sums = self._product(left, _counted(right)), self._product(right, _counted(left))
            self._add(name, place, (LowRank, bias), (*sums, _square_norm(factor), of_bias))
        else:
            rows, values = len(factor.parameter), factor.values
            by_row, _ = _by_row(factor)
            looked_up = _counted(values)
            counts = values.new_zeros(rows)
            counts.index_add_(0, factor.index[looked_up].to(values.device), values.new_ones(int(looked_up.sum())))
            place = 0, rows, values.shape[2]
            self._add(
                name,
                place,
                (SparseRows, None),
                (counts, self._product(values, looked_up), by_row.square().sum(), values.new_zeros(())),
            )

    def _add_whole(self, name: str, factor: Dense) -> None:
        """Add gradients that are given whole to those of the pass."""
        whole = formed(factor)
        self._dense[name] = self._dense[name] + whole if name in self._dense else whole

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of one example."""
        self.alone.add(name)
        self._square(name, gradient.reshape(1, -1))

    def end(self) -> None:
        """End a backward pass."""
        for name, values in self._dense.items():
            self._square(name, values)
        self._dense.clear()
        self.uses |= self._now
        self._now.clear()

    def blocks(self, examples: int, processes: Processes) -> dict[str, list[Block]]:
        """Return the blocks of K-FAC of each parameter, in which a matrix has its factors' eigenvectors.

        Args:
            examples: The number of examples of all processes.
            processes: The processes, which may have seen different layers.
        """
        add = processes.sum
        self._agree(processes)
        found: dict[str, list[Block]] = {name: [] for name in self.parameters}
        joint = self._joint()
        for (name, place), uses in sorted(self.sums.items(), key=lambda item: item[0]):
            several = [_Use(*map(add, (u.left, u.right, u.trace, u.of_bias))) for u in uses.values()]
            bias = next(iter(uses))[1] if name in joint else None
            if bias is None:
                several = [
                    _Use(_first(u.left, place[1]), _first(u.right, place[2]), u.trace - u.of_bias, u.of_bias)
                    for u in several
                ]
            found[name].append(_kronecker(place[0], several, examples, bias))
        joined = {block.bias.name for own in found.values() for block in own if block.bias is not None}
        for name, own in found.items():
            if not own and name not in joined:
                squares = self.squares.get(name)
                squares = torch.zeros(self.parameters[name].numel()) if squares is None else squares
                own.append(diagonal(add(squares) / examples))
        return found

    def _agree(self, processes: Processes) -> None:
        """Add sums of zero for what other processes have seen, so that all have the same in the same order."""
        shapes = {
            (*place, *key): (use.left.shape, use.right.shape)
            for place, u in self.sums.items()
            for key, use in u.items()
        }
        seen = dict[tuple, tuple]()
        for others in processes.gather(shapes):
            seen |= others
        self.alone = self.alone.union(*processes.gather(self.alone))
        first = next(iter(self.parameters.values()))
        like = torch.empty(0, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        agreed: dict[tuple[str, _Place], dict[_Key, _Use]] = {}
        for name, place, kind, bias in sorted(seen, key=str):
            left, right = seen[name, place, kind, bias]
            missing = _Use(like.new_zeros(left), like.new_zeros(right), like.new_zeros(()), like.new_zeros(()))
            own = self.sums.get((name, place), {}).get((kind, bias), missing)
            agreed.setdefault((name, place), {})[kind, bias] = own
        self.sums = agreed

    def _joint(self) -> set[str]:
        """Return the matrices whose biases join their blocks: each has one that nothing else adds, and all of it."""
        biases: dict[str, list[JointBias | None]] = {}
        covered: Counter[str] = Counter()  # how many numbers of a bias are in blocks
        for (name, (_, rows, columns)), uses in self.sums.items():
            for _, bias in uses:
                biases.setdefault(name, []).append(bias)
                if bias is not None:
                    covered[bias.name] += rows if bias.side == "left" else columns

        def joins(bias: JointBias | None) -> bool:
            if bias is None or bias.name in self.alone:
                return False
            return covered[bias.name] == self.parameters[bias.name].numel()  # more, if several layers add it

        return {name for name, own in biases.items() if name not in self.alone and all(map(joins, own))}

    def _square(self, name: str, values: Float[Tensor, "examples numbers"]) -> None:
        own = values.to(torch.promote_types(values.dtype, torch.float32)).square().sum(0)
        self.squares[name] = self.squares[name] + own if name in self.squares else own

    def _add(self, name: str, place: _Place, key: _Key, own: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        uses = self.sums.setdefault((name, place), {})
        if key not in uses:
            uses[key] = _Use(*own)
            return
        use = uses[key]
        use.left += own[0]
        use.right += own[1]
        use.trace += own[2]
        use.of_bias += own[3]

    def _product(self, vectors: Float[Tensor, "examples tokens numbers"], counted: Tensor) -> Tensor:
        """Return the sum of x xᵀ over examples and the tokens that count, or its diagonal where it is too wide."""
        flat, counts, width = vectors.flatten(0, 1), counted.flatten(), vectors.shape[2]
        if width <= self.max_factor:
            flat = flat * counts[:, None]
            return flat.T @ flat
        total = flat.new_zeros(width)
        for part, own in zip(flat.split(_PART // width + 1), counts.split(_PART // width + 1), strict=True):
            total += (part * own[:, None]).square_().sum(0)  # a copy of all would be as large as the logits
        return total


def _square_norm(factor: LowRank) -> Tensor:
    """Return the sum of the squares of all gradients: from products of their factors, or formed where that is less."""
    left, right = factor.left, factor.right
    (examples, tokens, rows), columns = left.shape, right.shape[2]
    if tokens * (rows + columns) <= rows * columns:
        return (left @ left.mT * (right @ right.mT)).sum()
    size = max(1, _PART // (columns * examples))
    parts = (_slab([factor], low, min(low + size, rows), columns) for low in range(0, rows, size))
    return torch.stack([part.square_().sum() for part in parts]).sum()


def _counted(vectors: Float[Tensor, "examples tokens numbers"]) -> Tensor:
    """Return which tokens have a vector that is not zero, without a copy of all vectors if these are many numbers."""
    if vectors.numel() <= _PART:
        return (vectors != 0).any(-1)
    return torch.linalg.vector_norm(vectors, ord=float("inf"), dim=-1) > 0


def _with_ones(factor: LowRank) -> LowRank:
    """Return the factor of a matrix with the layer's bias as one more column, or row where the sides are exchanged."""
    left, right = factor.left, factor.right
    if cast(Bias, factor.bias).side == "left":
        right = torch.nn.functional.pad(right, (0, 1), value=1.0)
    else:
        left = torch.nn.functional.pad(left, (0, 1), value=1.0)
    return replace(factor, left=left, right=right, bias=None)


def _first(matrix: Tensor, size: int) -> Tensor:
    """Return the first rows and columns of a sum of products, or of its diagonal."""
    return matrix[:size] if matrix.ndim == 1 else matrix[:size, :size]


def _kronecker(start: int, uses: Sequence[_Use], examples: int, bias: JointBias | None) -> Block:
    """Return the block of K-FAC of a matrix that is used in one or two ways."""
    rows, columns = len(uses[0].left), len(uses[0].right)
    trace = sum(float(use.trace) for use in uses)
    if not 0 < trace < math.inf:
        return Block(start, torch.full((rows, columns), 0.0 if trace == 0 else math.nan), bias=bias)
    used = [use for use in uses if float(use.trace) > 0]
    (a, left), (b, right) = (
        _eigen([(float(use.trace), use.left if side == 0 else use.right) for use in used]) for side in (0, 1)
    )
    eigenvalues = torch.outer(a / a.sum(), b / b.sum()) * (trace / examples)
    return Block(start, eigenvalues.to(uses[0].right.dtype), left, right, bias)


def _eigen(parts: Sequence[tuple[float, Tensor]]) -> tuple[Tensor, Tensor | None]:
    """Return eigenvalues and eigenvectors of a weighted sum of matrices, each scaled to trace one, or of diagonals."""
    total = torch.zeros(())
    whole = any(matrix.ndim == 2 for _, matrix in parts) and all(
        matrix.ndim == 2 or len(matrix) <= len(parts[0][1]) for _, matrix in parts
    )
    for weight, matrix in parts:
        own = matrix.double() if matrix.device.type != "mps" else matrix.cpu().double()
        own = own * (weight / float(own.trace() if own.ndim == 2 else own.sum()))
        total = total + (own.diag() if whole and own.ndim == 1 else own)
    if not whole or len(total) == 1:
        return total.flatten(), None
    values, vectors = torch.linalg.eigh(total)
    return values.clamp(min=0), vectors.to(parts[0][1]).contiguous()


def covering(blocks: list[Block], parameter: nn.Parameter) -> list[Block]:
    """Return blocks that cover a parameter, each number once; of what none covers, zeros."""
    if not blocks:  # a bias that is in the blocks of a matrix
        return []
    found: list[Block] = []
    end = 0
    for block in sorted(blocks, key=lambda block: (block.start, -block.stop)):
        if block.start < end:
            continue
        if block.start > end:
            found.append(Block(end, torch.zeros(1, block.start - end)))
        found.append(block)
        end = block.stop
    if end < parameter.numel():
        found.append(Block(end, torch.zeros(1, parameter.numel() - end)))
    return found


class Moments:
    """Sums of the squares of gradients in the eigenvectors of K-FAC.

    Args:
        kfac: The blocks of each parameter.
        names: The names of the parameters, by their ids.
        uses: How many factors a parameter has in one pass; those of several are held until the last one has come.
    """

    joins_biases = True

    def __init__(self, kfac: Mapping[str, Sequence[Block]], names: Mapping[int, str], uses: Mapping[str, int]):
        self.kfac, self.names, self.uses = kfac, names, uses
        self.sums = {
            name: [torch.zeros_like(block.eigenvalues) for block in blocks]
            for name, blocks in kfac.items()
            if not all(block.is_diagonal and len(block.eigenvalues) == 1 and block.bias is None for block in blocks)
        }
        self.held: dict[str, list[Factor]] = {}

    def add(self, factor: Factor) -> None:
        """Add a factor of the gradients of the examples."""
        name = self.names[id(factor.parameter)]
        if name not in self.sums or not self.sums[name]:
            return
        if self.uses[name] > 1:
            self.held.setdefault(name, []).append(factor)
        else:
            self._square(name, [factor])

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Do nothing: the squares of what hooks do not support are known from the first pass."""

    def end(self) -> None:
        """End a backward pass."""
        for name, factors in self.held.items():
            self._square(name, factors)
        self.held.clear()

    def blocks(self, examples: int, processes: Processes) -> dict[str, list[Block]]:
        """Return the blocks of EK-FAC."""
        add = processes.sum
        found = {}
        for name, blocks in self.kfac.items():
            sums = self.sums.get(name)
            own = blocks
            if sums is not None:
                own = [replace(block, eigenvalues=add(e) / examples) for block, e in zip(blocks, sums, strict=True)]
            found[name] = list(own)
        return found

    def _square(self, name: str, factors: Sequence[Factor]) -> None:
        """Add the squares of the rotated gradients that all these factors of a parameter add up to."""
        for block, total in zip(self.kfac[name], self.sums[name], strict=True):
            rotated = [block.rotate(factor) for factor in factors]
            if any(own is None for own in rotated):
                whole = sum((formed(factor) for factor in factors), torch.zeros(()))
                biases = [separate(f)[1] for f in factors if isinstance(f, LowRank) and f.bias]
                bias = sum((formed(own) for own in biases), torch.zeros(())) if biases and block.bias else None
                rotated = [block.rotate(Dense(factors[0].parameter, block.joined(whole, bias), block.start))]
            known = [own for own in rotated if own is not None]
            if len(known) == 1 and isinstance(known[0], SparseRows):
                sums, which = _by_row(known[0])
                total.index_add_(0, which, sums.square())
                continue
            rows, columns = total.shape
            examples = len(numbers(known[0]))
            size = max(1, _PART // (columns * examples))
            for low in range(0, rows, size):
                slab = _slab(known, low, min(low + size, rows), columns)
                total[low : low + size] += slab.square_().sum(0)


def _slab(factors: Sequence[Factor], low: int, high: int, columns: int) -> Tensor:
    """Return the sum of factors, formed in rows low..high of each example's matrix, (examples, rows, columns)."""
    slab = torch.zeros(())
    for factor in factors:
        if isinstance(factor, LowRank):
            own = factor.left[:, :, low:high].mT @ factor.right
        elif isinstance(factor, Dense):
            own = factor.values[:, low * columns : high * columns].unflatten(1, (high - low, columns))
        else:
            inside = (factor.index >= low) & (factor.index < high)
            index = (factor.index - low).clamp(0, high - low - 1)
            own = factor.values.new_zeros(len(factor.values), high - low, columns)
            own.scatter_add_(1, index[..., None].expand_as(factor.values), factor.values * inside[..., None])
        slab = own if slab.ndim == 0 else slab + own
    return slab


def _by_row(factor: SparseRows) -> tuple[Float[Tensor, "found columns"], Tensor]:
    """Return the sum of each example's values of each row that it looked up, and the rows."""
    rows, values = len(factor.parameter), factor.values
    index = factor.index.to(values.device, torch.int64)
    key = index + rows * torch.arange(len(index), device=index.device)[:, None]
    unique, inverse = key.unique(return_inverse=True)
    sums = values.new_zeros(len(unique), values.shape[2])
    return sums.index_add_(0, inverse.flatten(), values.flatten(0, 1)), unique % rows
