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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_sketch.attribution._directed import Directed, DirectedStructure, along, check_rows
from lightning_sketch.attribution._kronecker_sums import FactorSums, Moments, OneProcess, Processes, covering
from lightning_sketch.attribution.indexed_dataset import without_index
from lightning_sketch.attribution.preconditioner import DAMPING, Preconditioner
from lightning_sketch.autodiff.batches import BatchStructure, differentiable, on_device
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.gradients import visit_gradients
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
from lightning_sketch.per_example.factors import Factor, LowRank
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.precondition import Blocks, numbers
from lightning_sketch.per_example.verify import by_reason, hooks_fail, tolerance, weighings_by_losses
from lightning_sketch.per_example.weights import KnownWays, Reduction, Weighings

FittedKind = Literal["ekfac", "kfac"]
Labels = Literal["model", "data"]


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
    processes: Processes | None = None,
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
        max_factor: A factor of more rows is kept as its diagonal. For the head of a GPT with a vocabulary of 2,000 the
            LDS was .36 with the diagonal and .37 with the whole factor, of 320 .62 with either.
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
        processes: How to sum tensors over the processes, each of which has other batches; None for one process.

    Returns:
        The preconditioner: 3 n numbers for square layers, more for wide ones (4.6 n for a GPT of 90,000 parameters).

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
    >>> # the bias is one more column of the weight's block
    >>> {name: [tuple(block.eigenvalues.shape) for block in blocks] for name, blocks in p.blocks.items()}
    {'weight': [(2, 4)], 'bias': []}
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
    processes = processes or OneProcess()
    passes = cast(_ByModel | _ByData, by_model or by_data)
    fit = _Fit(module, layout, passes, None if by_model is None else by_data, processes)
    factors = FactorSums(fit.parameters, max_factor)
    fit.over(batches, factors)
    if not fit.examples:
        raise ValueError("fit_preconditioner got no batches; pass a list of them or a data loader.")
    examples = int(processes.sum(torch.tensor(fit.examples)))
    blocks = {name: covering(own, fit.parameters[name]) for name, own in factors.blocks(examples, processes).items()}
    _check_finite(blocks)
    if kind == "ekfac":
        moments = Moments(blocks, factors.names, factors.uses)
        if by_model is not None:
            by_model.compare = None
        first = fit.examples
        fit.over(batches, moments)
        if fit.examples != first:
            raise ValueError(
                f"kind='ekfac' reads the batches twice, and these had {first} examples first, {fit.examples} then; "
                "pass a loader that has the same examples each time, or kind='kfac'."
            )
        blocks = moments.blocks(examples, processes)
    _check_finite(blocks)
    unknown = [name for name, own in blocks.items() if own and not any(b.eigenvalues.any() for b in own)]
    if unknown:
        warnings.warn(
            f"no example has a gradient of {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}, so that their "
            "preconditioner is not known; rows leave them out.",
            stacklevel=2,
        )
    return Preconditioner(
        kind=kind,
        fingerprint=module_fingerprint(module),
        examples=examples,
        damping=damping,
        labels="model" if fit.passes is by_model else "data",
        blocks=blocks,
    )


def _check_finite(blocks: Blocks) -> None:
    """Refuse eigenvalues that are not finite."""
    broken = [name for name, own in blocks.items() if not all(b.eigenvalues.isfinite().all() for b in own)]
    if broken:
        raise ValueError(
            f"the preconditioner of {', '.join(broken[:5])} is not finite: the gradient of an example is not, or its "
            "square is beyond float32; leave the example out, or use a module in float64."
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
        self.ways, self.batches, self.warned = KnownWays(), 0, False

    def __call__(self, batch: Any) -> Iterator[_Pass]:
        """Yield the pass of a batch; or one of each example, if it is not known how the loss weighs them."""
        ways, error = self.weighings(batch), tolerance(dict(self.module.named_parameters()))
        number, self.batches = self.batches, self.batches + 1
        found = weighings_by_losses(self.module, batch, self.loss_fn, ways, self.structure, number, error)
        way = None if isinstance(found, str) else self.ways.narrow(found)
        if way is not None:
            yield _Pass(batch, way.scale)
            return
        reason = found if isinstance(found, str) else "the loss weighs its examples in another way than before"
        if not self.warned:
            self.warned = True
            warnings.warn(f"examples are differentiated one at a time, which is slow, since {reason}.", stacklevel=4)
        for part, _ in self.structure.parts(batch, 1, len(ways[0].weights)):
            yield _Pass(part)


class _Fit:
    """Passes over all batches, each of which adds the factors of all gradients to an accumulator.

    Args:
        module: The module.
        layout: The parameters.
        passes: batch -> its backward passes.
        otherwise: The same, to be used if those of the first batch cannot be made.
        processes: The processes, each of which has other batches.

    Attributes:
        parameters: The parameters, by name.
        examples: The number of examples of the last pass over all batches.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        passes: _ByModel | _ByData,
        otherwise: _ByData | None,
        processes: Processes,
    ):
        self.processes = processes
        self.module, self.passes, self.otherwise, self.examples = module, passes, otherwise, 0
        self.parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
        self.hooks: ExampleHooks | None = None
        self.alone: dict[str, nn.Parameter] = {}  # parameters that hooks do not support
        self.warned = self.said = False

    def over(self, batches: Iterable[Any], accumulator: _Accumulator) -> None:
        """Add the factors of all gradients of all batches."""
        self.examples = 0
        device = next(iter(self.parameters.values())).device
        for batch in batches:
            with preserve_state(self.module), full_precision(device):
                batch = on_device(differentiable(without_index(batch)), device)
                for own in self._passes(batch):
                    self._add(own, accumulator)
                self.examples += self.passes.of_batch.count(batch)

    def _passes(self, batch: Any) -> Iterator[_Pass]:
        """Yield the passes of a batch, the other ones from the first batch on if it has none of the first kind."""
        try:
            yield from self.passes(batch)
        except ValueError as error:
            if self.hooks is not None or self.otherwise is None:
                raise
            warnings.warn(
                f"the preconditioner takes the labels of the data (labels='data'), since {error} A writer takes "
                "preconditioner=fit_preconditioner(model, loader, model_fn=...).",
                stacklevel=4,
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
                if not loss.isfinite():
                    self._add_finite(own, count, accumulator)
                    return
                used = hooks.run_backward(loss)
            missed = [name for name in used if name not in hooks.supported]
            if missed and not self.warned:
                self.warned = True
                reasons = by_reason({name: hooks.reasons.get(name, "no hook saw it") for name in missed})
                warnings.warn(f"the preconditioner lacks a part of {len(missed)} parameters:{reasons}", stacklevel=4)
            del loss
        if self.alone:
            for part, _ in structure.parts(own.batch, 1, count):
                loss = loss_fn(self.module, part).sum()
                visit_gradients(loss, self.alone, lambda name, g: accumulator.add_gradient(name, g.to_dense()))
        accumulator.end()

    def _add_finite(self, own: _Pass, count: int, accumulator: _Accumulator) -> None:
        """Run the backward pass of each example whose loss is finite, where that of the batch is not."""
        if not self.said:
            self.said = True
            warnings.warn("examples whose loss is not finite are left out of the preconditioner.", stacklevel=5)
        for i, (part, _) in enumerate(self.passes.structure.parts(own.batch, 1, count) if count > 1 else ()):
            self._add(_Pass(part, None if own.scale is None else own.scale[i : i + 1]), accumulator)

    def _supported(self, own: _Pass) -> ExampleHooks:
        """Find, on the first pass, which parameters hooks support, and return hooks for these."""
        structure, ways = self.passes.structure, self.passes.weighings
        try:
            failing = hooks_fail(self.module, own.batch, self.parameters, self.passes.loss_fn, structure, ways)
        except ValueError as error:
            failing = dict.fromkeys(self.parameters, str(error))
        for others in reversed(self.processes.gather(failing)):
            failing = {**others, **failing}
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
            side = "left" if factor.bias is None else factor.bias.side  # that of the output, whose sum the bias has
            scaled: Any = {side: getattr(factor, side) * scale[:, None, None]}
            self.accumulator.add(replace(factor, **scaled))
        else:
            shape = (-1,) + (1,) * (factor.values.ndim - 1)
            self.accumulator.add(replace(factor, values=factor.values * scale.view(shape)))
