"""Fits a Kronecker-factored preconditioner of a model's Gauss-Newton matrix, streamed over batches.

    P = (1/n) sum_i sum_v vec(G) vec(G)ᵀ      G: a layer's part of the gradient of <v, z_i>, for v at the output z_i
                                              with sum_v v vᵀ the Hessian of its loss, see `autodiff.output_roots`

    G = sum_t l_t r_tᵀ,   A = sum l lᵀ,   B = sum r rᵀ over examples, v and tokens t where neither l_t nor r_t is zero
    kfac     U diag(a) Uᵀ = A,  V diag(b) Vᵀ = B,  P = t (A / tr A) ⊗ (B / tr B),  t = tr P, which is computed exactly
    ekfac    P = (U ⊗ V) diag(E) (U ⊗ V)ᵀ,  E = (1/n) sum (Uᵀ G V)², in a second pass

Of a layer with a bias G has a column more, the bias's gradient, and r a one more. Where a table is looked up, l is a
unit vector, and A is diagonal; where a matrix is used in both ways, as a tied embedding is, A and B are sums of both,
weighted by their traces. A factor that is wider than `max_factor`, as of a vocabulary, keeps its diagonal only.
Normalizations, parameters that no rule splits, and biases of which a layer has not the only use have a diagonal P.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.attribution._directed import Directed, DirectedStructure, along, check_rows
from lightning_sketch.attribution.indexed_dataset import without_index
from lightning_sketch.attribution.preconditioner import DAMPING, Preconditioner, diagonal
from lightning_sketch.autodiff.batches import BatchStructure, differentiable, on_device
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import (
    Compare,
    LossFn,
    OutputLoss,
    OutputLossName,
    OutputModel,
    on_copies,
    training_step_loss,
)
from lightning_sketch.autodiff.output_roots import Draws
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.per_example.factors import Bias, Dense, Factor, LowRank, SparseRows, separate
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.precondition import Block, JointBias, formed, numbers
from lightning_sketch.per_example.verify import by_reason, gradients_of, hooks_fail, tolerance, weighings_by_losses
from lightning_sketch.per_example.weights import Reduction, Weighings

FittedKind = Literal["ekfac", "kfac"]
Labels = Literal["model", "data"]

_PART = 1 << 20  # numbers of gradients that are formed at once


def fit_preconditioner(
    module: nn.Module,
    batches: Iterable[Any],
    kind: FittedKind = "ekfac",
    *,
    damping: float = DAMPING,
    labels: Labels | None = None,
    draws: int = 1,
    max_classes: int = 32,
    max_factor: int = 8192,
    seed: int = 0,
    parameters: str | Sequence[str] = "*",
    loss_fn: LossFn | None = None,
    model_fn: Callable[[nn.Module, Any], Any] | None = None,
    output_loss_fn: OutputLossName | OutputLoss | None = None,
    weight_fn: Callable[[Any], float] | None = None,
    reduction: Reduction | None = None,
    num_examples: int | Callable[[Any], int] | None = None,
    batch_dim: int = 0,
    split_fn: Callable[[Any], Iterable[Any]] | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> Preconditioner:
    """Fit K-FAC or EK-FAC of all parameters to training examples, at the module's current weights.

    Rows whose gradients went through it before they were sketched have influence scores as their inner products, each
    layer with a damping of its own. It wins on language models and costs on small images; the README has the table.

    Args:
        module: The module, in evaluation mode during the computation and then left as it was.
        batches: Batches of training examples, such as a data loader; for "ekfac" they are read twice.
        kind: "ekfac", whose eigenvalues are right in its eigenbasis, or "kfac", in one pass.
        damping: The damping of each block, in units of the mean of its eigenvalues; `Preconditioner.damped` changes it.
        labels: "model" draws labels from the model's own output; "data" takes those of the batches (the empirical
            Fisher matrix), which needs the trained loss alone and not its output. If None, those of the model, or, if
            its output or the loss of that cannot be determined, which a warning says, those of the batches.
        draws: How many labels are drawn for each example with many classes, or for each token.
        max_classes: Up to so many classes, of examples that have a single label, all are summed exactly.
        max_factor: A factor of more rows is kept as its diagonal.
        seed: Seed of the draws.
        parameters: The parameters to cover, as shell patterns of their names.
        loss_fn: The trained loss, (module, batch) -> mean loss; the module's `training_step` if None.
        model_fn: (module, batch) -> the output, as in `fit_ggn`; for labels="model".
        output_loss_fn: The loss of the output, as in `fit_ggn`; for labels="model".
        weight_fn: batch -> its weight in a mean over batches, as in `sketch_gradients`; for labels="data".
        reduction: "mean" or "sum", as in `sketch_gradients`; for labels="data".
        num_examples: The number of examples of a batch, or batch -> this number, as in `sketch_gradients`.
        batch_dim: The axis of the examples, as in `sketch_gradients`.
        split_fn: batch -> batches of one example, as in `sketch_gradients`.
        summed: A function that sums a tensor over processes, each of which has other batches; all call it alike.

    Returns:
        The preconditioner: about 3 n numbers for square layers, less for wide ones.

    Raises:
        ValueError: if there are no batches, or, for "ekfac", they can be read only once; with labels="model", if the
            loss of the output is not the trained loss or cannot be determined.

    Warns:
        UserWarning: if hooks do not support some parameters, so that their preconditioner is diagonal and the examples
            are differentiated one at a time; if parameters have no gradient at all.

    Cost: a training step for each batch and draw (or class), for "ekfac" twice and with the gradient of each example
    formed once more; eigenvectors of each factor, O(rows³) in float64. Memory: the result, and the factors.

    Source: George et al. (2018), arXiv:1806.03884; Grosse et al. (2023), arXiv:2308.03296.

    >>> module, batch = nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
    >>> loss_fn = lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1])
    >>> p = fit_preconditioner(module, [batch], "kfac", loss_fn=loss_fn)
    >>> {name: [tuple(block.eigenvalues.shape) for block in blocks] for name, blocks in p.blocks.items()}
    {'weight': [(2, 3)], 'bias': [(1, 2)]}
    """
    for name, value, known in (("kind", kind, get_args(FittedKind)), ("labels", labels, (*get_args(Labels), None))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, known))}.")
    if kind == "ekfac" and iter(batches) is batches:
        raise ValueError(
            "kind='ekfac' reads the batches twice, and these can be read only once; pass a data loader or a list, or "
            "kind='kfac'."
        )
    layout = Layout.of(module, parameters if isinstance(parameters, str) else list(parameters))
    structure = BatchStructure(num_examples, batch_dim, split_fn)
    generator = torch.Generator().manual_seed(seed)
    by_model = by_data = None
    if labels != "data":
        model = OutputModel(module, model_fn, output_loss_fn, loss_fn)
        if model.given is not None and not hasattr(model.given, "roots"):
            raise ValueError(
                f"labels of the model need the method `roots` of an output loss, which {model.given!r} does not have; "
                "use 'cross_entropy', 'binary_cross_entropy' or 'squared_error', or labels='data'."
            )
        by_model = _ByModel(model, Draws(generator, draws, max_classes), structure)
    if labels != "model" and (loss_fn is not None or hasattr(module, "training_step")):
        weighings = Weighings(module, weight_fn, reduction, structure)
        by_data = _ByData(module, on_copies(loss_fn or training_step_loss), weighings)
    if by_model is None and by_data is None:
        raise ValueError(f"{type(module).__name__} has no training_step; pass loss_fn=lambda module, batch: loss.")
    fit = _Fit(module, layout, cast(_ByModel | _ByData, by_model or by_data), None if by_model is None else by_data)
    factors = _FactorSums(fit.parameters, max_factor)
    fit.over(batches, factors)
    add = summed or (lambda tensor: tensor)
    examples = int(add(torch.tensor(fit.examples)))
    blocks = {name: _covering(own, fit.parameters[name]) for name, own in factors.blocks(examples, add).items()}
    if kind == "ekfac":
        moments = _Moments(blocks, factors.names, factors.uses)
        if by_model is not None:
            by_model.compare = None
        fit.over(batches, moments)
        blocks = moments.blocks(examples, add)
    unknown = [name for name, own in blocks.items() if own and not any(b.eigenvalues.any() for b in own)]
    if unknown:
        warnings.warn(
            f"no example has a gradient of {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}, so that their "
            "preconditioner is not known; rows leave them out.",
            stacklevel=2,
        )
    return Preconditioner(
        kind=kind, fingerprint=module_fingerprint(module), examples=examples, damping=damping, blocks=blocks
    )


@runtime_checkable
class _Accumulator(Protocol):
    """What a pass over the batches adds up."""

    def add(self, factor: Factor) -> None:
        """Add a factor of the gradients of the examples."""

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of one example."""

    def end(self) -> None:
        """End a backward pass, so that no more factors of its gradients come."""


@dataclass(frozen=True, eq=False)
class _Pass:
    """A backward pass that gives the gradients of some losses of single examples.

    Args:
        batch: The batch.
        scale: The factors that turn the examples' shares into their own gradients; None for ones.
    """

    batch: Any
    scale: Tensor | None = None


class _ByModel:
    """Backward passes along roots of the Hessian at the output, as labels drawn from the model give them.

    Args:
        model: The model and the loss of its output.
        draws: How many roots each example has.
        of_batch: The structure of the batches.
    """

    def __init__(self, model: OutputModel, draws: Draws, of_batch: BatchStructure):
        self.model, self.draws, self.of_batch = model, draws, of_batch
        self.structure, self.loss_fn = DirectedStructure(of_batch=of_batch), along(model)
        self.weighings = Weighings(model.module, None, "sum", self.structure)
        self.compare: Compare = "value"  # with the trained loss; None once all batches were compared

    def __call__(self, batch: Any) -> Iterator[_Pass]:
        """Yield the passes of a batch."""
        output, loss = self.model.output_and_loss(batch, compare=self.compare)
        check_rows(output, self.of_batch.count(batch))
        roots = loss.roots(output, batch, self.draws)
        del output
        for root in roots:
            if root.parts[0].any():
                yield _Pass(Directed(batch, root))


class _ByData:
    """The backward pass of the trained loss, with the labels of the batch.

    Args:
        module: The module.
        loss_fn: (module, batch) -> loss.
        weighings: The ways in which the loss may weigh its examples.
    """

    def __init__(self, module: nn.Module, loss_fn: LossFn, weighings: Weighings):
        self.module, self.loss_fn, self.weighings = module, loss_fn, weighings
        self.of_batch = self.structure = weighings.structure
        self.batches, self.warned = 0, False

    def __call__(self, batch: Any) -> Iterator[_Pass]:
        """Yield the only pass of a batch."""
        ways, error = self.weighings(batch), tolerance(dict(self.module.named_parameters()))
        number, self.batches = self.batches, self.batches + 1
        found = weighings_by_losses(self.module, batch, self.loss_fn, ways, self.structure, number, error)
        if isinstance(found, str) and not self.warned:
            self.warned = True
            warnings.warn(f"examples are weighed as if the loss were {ways[0].name}, since {found}.", stacklevel=4)
        yield _Pass(batch, (ways if isinstance(found, str) else found)[0].scale)


class _Fit:
    """Passes over all batches, each of which adds the factors of all gradients to an accumulator.

    Args:
        module: The module.
        layout: The parameters.
        passes: batch -> its backward passes.
        otherwise: The same, to be used if those of the first batch cannot be made.

    Attributes:
        parameters: The parameters, by name.
        examples: The number of examples of the last pass over all batches.
    """

    def __init__(self, module: nn.Module, layout: Layout, passes: "_ByModel | _ByData", otherwise: "_ByData | None"):
        self.module, self.passes, self.otherwise, self.examples = module, passes, otherwise, 0
        self.parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
        self.hooks: ExampleHooks | None = None
        self.alone: dict[str, nn.Parameter] = {}  # parameters that hooks do not support
        self.warned = False

    def over(self, batches: Iterable[Any], accumulator: _Accumulator) -> None:
        """Add the factors of all gradients of all batches.

        Raises:
            ValueError: if there is no batch.
        """
        self.examples = 0
        device = next(iter(self.parameters.values())).device
        for batch in batches:
            with preserve_state(self.module), full_precision(device):
                batch = on_device(differentiable(without_index(batch)), device)
                for own in self._passes(batch):
                    self._add(own, accumulator)
                self.examples += self.passes.of_batch.count(batch)
        if not self.examples:
            raise ValueError("fit_preconditioner got no batches; pass a list of them or a data loader.")

    def _passes(self, batch: Any) -> Iterator[_Pass]:
        """Yield the passes of a batch, the other ones from the first batch on if it has none of the first kind."""
        try:
            yield from self.passes(batch)
        except ValueError as error:
            if self.hooks is not None or self.otherwise is None:
                raise
            warnings.warn(
                f"the preconditioner takes the labels of the data (labels='data'), since {error}", stacklevel=4
            )
            self.passes = self.otherwise
            yield from self.passes(batch)

    def _add(self, own: _Pass, accumulator: _Accumulator) -> None:
        """Run one backward pass."""
        if self.hooks is None:
            self.hooks = self._supported(own)
        hooks, structure, loss_fn = self.hooks, self.passes.structure, self.passes.loss_fn
        count = structure.count(own.batch)
        supported = {name: p for name, p in self.parameters.items() if name not in self.alone}
        if supported:
            scaled = accumulator if own.scale is None else _Scaled(accumulator, own.scale)
            with hooks.recording(scaled, count):
                loss = loss_fn(self.module, own.batch).sum()
                hooks.before_backward(loss)
                gradients = gradients_of(loss, supported)
            missed = [name for name, g in gradients.items() if g is not None and name not in hooks.supported]
            if missed and not self.warned:
                self.warned = True
                reasons = by_reason({name: hooks.reasons.get(name, "no hook saw it") for name in missed})
                warnings.warn(f"the preconditioner lacks a part of {len(missed)} parameters:{reasons}", stacklevel=4)
            del gradients, loss
        if self.alone:
            for part, _ in structure.parts(own.batch, 1, count):
                alone = gradients_of(loss_fn(self.module, part).sum(), self.alone)
                for name, gradient in alone.items():
                    if gradient is not None:
                        accumulator.add_gradient(name, gradient.to_dense())
        accumulator.end()

    def _supported(self, own: _Pass) -> ExampleHooks:
        """Find, on the first pass, which parameters hooks support, and return hooks for these."""
        structure, ways = self.passes.structure, self.passes.weighings
        try:
            failing = hooks_fail(self.module, own.batch, self.parameters, self.passes.loss_fn, structure, ways)
        except ValueError as error:
            failing = dict.fromkeys(self.parameters, str(error))
        self.alone = {name: self.parameters[name] for name in failing}
        if failing:
            warnings.warn(
                f"the preconditioner of {len(failing)} of {len(self.parameters)} parameters is diagonal, and the "
                f"examples are differentiated one at a time for them, which is slow:{by_reason(failing)}",
                stacklevel=5,
            )
        return ExampleHooks(self.module, {n: p for n, p in self.parameters.items() if n not in failing})


@dataclass(frozen=True, eq=False)
class _Scaled:
    """An accumulator that gets the factors of each example's own gradient, given those of its share in a batch.

    Args:
        accumulator: Where they go.
        scale: The factor of each example.
    """

    accumulator: _Accumulator
    scale: Tensor
    joins_biases = True

    def add(self, factor: Factor) -> None:
        """Add a factor."""
        scale = self.scale.to(numbers(factor))
        if isinstance(factor, LowRank):
            self.accumulator.add(replace(factor, left=factor.left * scale[:, None, None]))
        else:
            shape = (-1,) + (1,) * (factor.values.ndim - 1)
            self.accumulator.add(replace(factor, values=factor.values * scale.view(shape)))


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


class _FactorSums:
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

    def blocks(self, examples: int, add: Callable[[Tensor], Tensor]) -> dict[str, list[Block]]:
        """Return the blocks of K-FAC of each parameter, in which a matrix has its factors' eigenvectors.

        Args:
            examples: The number of examples of all processes.
            add: Sums a tensor over processes.
        """
        found: dict[str, list[Block]] = {name: [] for name in self.parameters}
        joint = self._joint()
        for (name, place), uses in sorted(self.sums.items(), key=lambda item: item[0]):
            several = [_Use(*map(add, (u.left, u.right, u.trace, u.of_bias))) for u in uses.values()]
            bias = next(iter(uses))[1] if name in joint else None
            if bias is None:
                several = [
                    _Use(_square(u.left, place[1]), _square(u.right, place[2]), u.trace - u.of_bias, u.of_bias)
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

    def _joint(self) -> set[str]:
        """Return the matrices that all have a bias which nothing else adds, so that it joins their blocks."""
        biases: dict[str, set[JointBias | None]] = {}
        for (name, _), uses in self.sums.items():
            biases.setdefault(name, set()).update(bias for _, bias in uses)
        of: Counter[str] = Counter(name for own in biases.values() for name in {b.name for b in own if b is not None})
        places = Counter(name for name, _ in self.sums)
        return {
            name
            for name, own in biases.items()
            if None not in own
            and name not in self.alone
            and len(own) == places[name]  # one bias each
            and all(of[bias.name] == 1 and bias.name not in self.alone for bias in own if bias is not None)
            and sum(
                self._size(name, place, bias) for (n, place), uses in self.sums.items() if n == name for _, bias in uses
            )
            == sum(self.parameters[bias.name].numel() for bias in {b.name: b for b in own if b is not None}.values())
        }

    @staticmethod
    def _size(name: str, place: _Place, bias: JointBias | None) -> int:
        return 0 if bias is None else place[1] if bias.side == "left" else place[2]

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


def _square(matrix: Tensor, size: int) -> Tensor:
    """Return the first rows and columns of a sum of products, or of its diagonal."""
    return matrix[:size] if matrix.ndim == 1 else matrix[:size, :size]


def _kronecker(start: int, uses: Sequence[_Use], examples: int, bias: JointBias | None) -> Block:
    """Return the block of K-FAC of a matrix that is used in one or two ways."""
    rows, columns = len(uses[0].left), len(uses[0].right)
    trace = sum(float(use.trace) for use in uses)
    if not trace > 0:
        return Block(start, torch.zeros(rows, columns), bias=bias)
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


def _covering(blocks: list[Block], parameter: nn.Parameter) -> list[Block]:
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


class _Moments:
    """Sums of the squares of gradients in the eigenvectors of K-FAC.

    Args:
        kfac: The blocks of each parameter.
        uses: How many factors a parameter has in one pass; those of several are held until the last one has come.
    """

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

    joins_biases = True

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Do nothing: the squares of what hooks do not support are known from the first pass."""

    def end(self) -> None:
        """End a backward pass."""
        for name, factors in self.held.items():
            self._square(name, factors)
        self.held.clear()

    def blocks(self, examples: int, add: Callable[[Tensor], Tensor]) -> dict[str, list[Block]]:
        """Return the blocks of EK-FAC."""
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
