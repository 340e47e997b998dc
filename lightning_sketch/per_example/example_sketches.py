"""Sketched gradients of each example of a batch, by the fastest engine that is right, checked on every batch."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.gradients import gradients_of, sketched_gradient
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn, on_copies
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.loop import loop_sketches, vmap_sketches
from lightning_sketch.per_example.output_losses import OutputLosses, last_output
from lightning_sketch.per_example.precondition import GradientMap
from lightning_sketch.per_example.verify import (
    MOST_WITNESSES,
    WITNESSES,
    by_reason,
    check_first_axis,
    coupled,
    disagreement,
    hooks_fail,
    tolerance,
    weighings_of,
    witnesses,
)
from lightning_sketch.per_example.weights import KnownWays, Reduction, Weighing, Weighings, WeightFn

# How per-example gradients are computed.
Engine = Literal["auto", "hooks", "loop", "vmap"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class ExampleGradients(NamedTuple):
    """The sketched gradients of the examples of a batch.

    Attributes:
        rows: The sketches, (examples, dim).
        losses: The losses of the examples alone, (examples,), or None if they are not known.
        weights: The weights of the examples in a mean over the batch, (examples,), NaN if they are not known.
        probabilities: The probabilities of the true labels, (examples,), of a document the geometric mean over its
            labels; None if they are not known.
        scale_known: Whether the rows have the scale of the examples' own gradients.
        in_doubt: Whether this batch has shown that rows of batches before it may have a wrong scale.
    """

    rows: Float[Tensor, "examples dim"]
    losses: Float[Tensor, " examples"] | None
    weights: Float[Tensor, " examples"]
    probabilities: Float[Tensor, " examples"] | None = None
    scale_known: bool = True
    in_doubt: bool = False


class ExampleSketches:
    """A function from a batch to the sketched gradients of its examples' own losses, checked on every batch.

    Call it under `preserve_state`. Rows of hooks are compared, on each batch, with the gradients of two of its examples
    alone, see `verify`; this costs two passes of one example. At the first batch that hooks do not split right,
    engine="auto" says so once, and takes the loop from this batch on.

    The loop is right whenever an example has a loss of its own. Whether the batch's gradient is made of the gradients
    of its examples is checked on batches 1, 2, 4, 8, ..., by one pass of the whole batch.

    Args:
        module: The module.
        layout: Where in the flat vector each parameter lies.
        sketch: The sketch, of vectors of the layout's size.
        loss_fn: (module, batch) -> loss of the batch, or a loss of each example.
        engine: "hooks", "vmap", "loop", or "auto" for hooks where they are exact and the loop elsewhere.
        weight_fn: (batch) -> its weight in a mean, where examples do not all weigh the same. If this and `reduction`
            are None, the usual ways are tried, see `Weighings`.
        reduction: "mean" or "sum", what the loss does over the examples of a batch.
        names: The names of the parameters to differentiate by, all of the layout if None; others are zero in the rows.
        structure: Where the examples are, unless they are rows of tensors.
        gradient_map: A linear map of the gradients, after which they are sketched, such as a preconditioner.

    Raises:
        ValueError: if the engine is unknown or does not support the module, or if a parameter is frozen; if the
            gradients of all examples alone are zero, but that of their batch is not.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        *,
        sketch: Sketch,
        loss_fn: LossFn,
        engine: Engine = "auto",
        weight_fn: WeightFn | None = None,
        reduction: Reduction | None = None,
        names: Collection[str] | None = None,
        structure: BatchStructure | None = None,
        gradient_map: Callable[[Mapping[str, nn.Parameter]], GradientMap] | None = None,
    ):
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is not known; use one of {', '.join(map(repr, ENGINES))}.")
        self.module, self.layout, self.sketch = module, layout, sketch
        self.structure, self.engine = structure or BatchStructure(), engine
        self.weighings = Weighings(module, weight_fn, reduction, self.structure)
        self._on_copies = on_copies(loss_fn)
        named = zip(layout.names, layout.parameters(module), strict=True)
        self.parameters = {name: p for name, p in named if names is None or name in names}
        frozen = [name for name, parameter in self.parameters.items() if not parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"rows are to cover {', '.join(frozen[:10])}, which {'is' if len(frozen) == 1 else 'are'} frozen now; "
                "set requires_grad=True while rows are computed."
            )
        self._map = None if gradient_map is None else gradient_map(self.parameters)
        self.batches = self.by_hooks = 0  # that were seen, and of these the ones that hooks split
        self._hooks: ExampleHooks | None = None
        self._accumulator = SketchAccumulator(sketch, layout, parameters=self.parameters, gradient_map=self._map)
        self._ways = KnownWays()
        self._reasons: set[str] | None = None  # parameters for which hooks had a reason on the first batch
        self._output_losses = OutputLosses()
        self._coupled = self._unchecked = self._refuted = self._random = False

    def __call__(self, batch: Any) -> ExampleGradients:
        """Return the rows at the module's present weights, with what is known about their examples."""
        _refuse_packed(self.module)
        examples, number = self.structure.count(batch), self.batches
        self.batches += 1
        by_definition = self.engine == "auto" and not self.structure.along_first_axis
        if self.engine in ("loop", "vmap") or examples == 1 or by_definition:
            return self._one_by_one(batch, examples, number)
        found = self._by_hooks(batch, examples, number)
        if found is None:
            return self._one_by_one(batch, examples, number)
        if isinstance(found, ExampleGradients):
            self.by_hooks += 1
            return found
        which = "the first batch" if number == 0 else f"batch {number + 1}"
        if self.engine == "hooks":
            raise ValueError(
                f"hooks do not give the gradients of single examples {found}\nThis is {which}. Use engine='loop', or "
                "leave parameters out."
            )
        in_doubt, self.engine, self._ways, self._unchecked = self.by_hooks > 0, "loop", KnownWays(), True
        before = " The scale of earlier rows of this pass is marked as not known." if in_doubt else ""
        if self.structure.num_examples is not len:  # a list of examples, of different shapes perhaps, says so itself
            warnings.warn(
                f"from {which} on, examples are differentiated one at a time, which is slow, since hooks do not give "
                f"the gradients of single examples {found}{before}",
                stacklevel=2,
            )
        return self._one_by_one(batch, examples, number)._replace(in_doubt=in_doubt)

    def loss_fn(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch, or the losses of its examples.

        Raises:
            ValueError: if it fails where the examples may be along another axis.
        """
        try:
            return _loss_in(self._on_copies(module, batch))
        except RuntimeError as error:
            time_first = self._time_first()
            if not time_first or "when called for its loss" not in str(error):
                raise
            raise ValueError(
                f"{error} Or pass batch_dim=1: {time_first} has batch_first=False, so that the first axis may be time."
            ) from error

    def _time_first(self) -> str:
        """Return the name of a part that takes time along the first axis, where examples are taken from there too."""
        if not self.structure.along_first_axis:
            return ""
        parts = self.module.named_modules()
        return next((name for name, part in parts if getattr(part, "batch_first", True) is False), "")

    def forget_batches(self) -> None:
        """Forget what earlier batches have shown about the structure of a batch: those of another loader follow."""
        self.structure = self.weighings.structure = replace(self.structure)
        self._output_losses = OutputLosses()

    def _by_hooks(self, batch: Any, examples: int, number: int) -> ExampleGradients | str | None:
        """Return the rows that hooks give; or why they are not the examples' gradients; None if all rows are zero."""
        if self._hooks is None:
            reason = self._unsupported(batch)
            if reason:
                return reason
            self._hooks = ExampleHooks(self.module, self.parameters)
        hooks, accumulator = self._hooks, self._accumulator
        accumulator.start(examples)
        with hooks.recording(accumulator, examples), last_output(self.module, examples) as outputs:
            loss = self.loss_fn(self.module, batch)
            total = loss.sum()
            used = hooks.run_backward(total)
            shares = accumulator.rows()
        if self._reasons is None:  # those of the first batch were checked parameter by parameter
            self._reasons = set(hooks.reasons)
        new = [n for n in used if n not in hooks.supported or n in hooks.reasons.keys() - self._reasons]
        if new:
            return self._listed({name: hooks.reasons.get(name, "no hook saw it") for name in new})
        del total
        each = loss.detach() if loss.shape == (examples,) else None
        if each is not None and self.weighings.weight_fn is None:  # they add up to a sum
            ways = [Weighing("a sum over examples", torch.ones(examples, dtype=torch.float64), summed=True)]
        else:
            ways = self.weighings(batch)
        order = witnesses(shares, ways, number)
        if not order:
            return None
        fitting, places = self._fitting(batch, shares, ways, order)
        if isinstance(fitting, str):
            return f"of {type(self.module).__name__}: {fitting}."
        way = self._ways.narrow(fitting)
        if way is None:
            return f"of {type(self.module).__name__}: the loss weighs its examples in another way than before."
        known, probabilities = self._output_losses(outputs, batch, self.structure, places, way, loss.detach().sum())
        each = known if each is None else each
        return ExampleGradients(shares * way.scale.to(shares)[:, None], each, way.weights, probabilities)

    def _fitting(
        self, batch: Any, shares: Float[Tensor, "examples dim"], ways: list[Weighing], order: list[int]
    ) -> tuple[list[Weighing] | str, dict[int, float]]:
        """Return the ways that fit the witnesses, or why none does, and the losses of the witnesses alone.

        There are more witnesses than two as long as the ways that fit disagree about an example.
        """
        rows, losses, fitting = list[Tensor](), dict[int, float](), ways
        zero = (shares == 0).all(1).cpu()
        while order and len(losses) < MOST_WITNESSES:
            if len(losses) >= WITNESSES and (disagreement(fitting)[~zero] <= 1 + tolerance(self.parameters)).all():
                break
            apart = disagreement(fitting).tolist() if len(losses) >= WITNESSES else None
            place = order.pop(0) if apart is None else order.pop(max(range(len(order)), key=lambda i: apart[order[i]]))
            row, losses[place] = self.alone(batch, place, len(shares))
            rows.append(row)
            places = list(losses)
            found = weighings_of(shares[places], torch.stack(rows), places, ways, tolerance(self.parameters))
            if isinstance(found, str):
                return found, losses
            fitting = [way for way in found if zero[way.weights == 0].all()]  # who does not count has no gradient
            if not fitting:
                return "a weight of zero would be that of an example with a gradient", losses
        return fitting, losses

    def _unsupported(self, batch: Any) -> str:
        """Return why hooks do not support the module, from its first batch; empty if they do."""
        try:
            check_first_axis(self.structure)
            failing = hooks_fail(self.module, batch, self.parameters, self.loss_fn, self.structure, self.weighings)
        except ValueError as error:
            if self.engine == "hooks":
                raise
            return f"of {type(self.module).__name__}: {error}"
        return self._listed(failing) if failing else ""

    def alone(self, batch: Any, place: int, examples: int) -> tuple[Float[Tensor, " dim"], float]:
        """Return the sketch of the gradient of one example of a batch alone, and its loss."""
        loss = self.loss_fn(self.module, self.structure.one(batch, place, examples)).sum()
        return self._sketched(loss), float(loss.detach())

    def _sketched(self, loss: Tensor) -> Float[Tensor, " dim"]:
        """Return the sketch of the gradient of a loss."""
        if self._map is None:
            return sketched_gradient(loss, self.parameters, self.layout, self.sketch)
        return self.layout.sketch(self.sketch, self._map.gradients(gradients_of(loss, self.parameters)))

    def _one_by_one(self, batch: Any, examples: int, number: int) -> ExampleGradients:
        """Return the rows of the loop, or of vmap."""
        sketches = vmap_sketches if self.engine == "vmap" else loop_sketches
        rows, losses = sketches(
            self.module, batch, self.parameters, self.layout, self.sketch, self.loss_fn, self.structure, self._map
        )
        ways, before = self.weighings(batch), self._coupled
        if examples > 1 and (self._unchecked or (number + 1) & number == 0):  # batches 1, 2, 4, 8, ...
            self._check_sum(batch, rows, ways)
        guess = ways[0] if (self.weighings.given and not self._refuted) or (examples == 1 and ways) else None
        way = self._ways.of(ways) or guess
        weights = torch.full((examples,), torch.nan, dtype=torch.float64) if way is None else way.weights
        empty = (weights == 0).to(rows.device) & ~rows.isfinite().all(1)  # the mean over no labels is NaN
        rows = rows.where(~empty[:, None], 0.0)
        if self.weighings.given and way is not None:
            rows = rows.where((weights > 0).to(rows.device)[:, None], 0.0)
        in_doubt = self._coupled and not before and number > 0
        return ExampleGradients(rows, losses, weights, None, not self._coupled, in_doubt)

    def _check_sum(self, batch: Any, rows: Float[Tensor, "examples dim"], ways: list[Weighing]) -> None:
        """Find how the gradient of the batch is made of those of its examples; warn, once, if it is not.

        Raises:
            ValueError: if all gradients of examples are zero, but not that of the batch.
        """
        self._unchecked = False
        loss = self.loss_fn(self.module, batch)
        each = loss.shape == (len(rows),)
        whole = self._sketched(loss.sum())
        error = tolerance(self.parameters)
        if each and self.weighings.weight_fn is None:
            ways = [Weighing("a sum over examples", torch.ones(len(rows), dtype=torch.float64), summed=True)]
        fitting = []
        for way in ways:
            shares = rows / way.scale.to(rows)[:, None]
            total = shares.where(shares.isfinite(), 0.0).sum(0)
            if (total - whole.to(total)).norm() <= error * whole.norm():
                fitting.append(way)
        self._refuted = not fitting
        if fitting:
            if self._ways.narrow(fitting) is None:
                self._ways = KnownWays()
            return
        time_first = self._time_first()
        if time_first and coupled(rows, whole, error):
            raise ValueError(
                "the first axis of a batch is not that of examples: gradients of slices along it do not add up to that "
                f"of the batch, and {time_first} has batch_first=False, so that it is time; pass batch_dim=1."
            )
        if not rows.any() and whole.any() and whole.isfinite().all():
            raise ValueError(
                f"the loss of {type(self.module).__name__} couples the examples of a batch, as a contrastive loss does:"
                " the gradient of each example alone is zero, that of the batch is not. No example has a row; write "
                "rows of steps (per='step'), or pass loss_fn=lambda module, batch: a loss that each example has alone."
            )
        if self._coupled or not (each or coupled(rows, whole, error)):
            return
        if self._is_random(batch):
            if not self._random:
                self._random = True
                warnings.warn(
                    f"the loss of {type(self.module).__name__} draws random numbers, and a row is the gradient of one "
                    "draw; pass loss_fn=lambda module, batch: the mean of several draws for rows with less noise.",
                    stacklevel=2,
                )
            return
        self._coupled = True
        warnings.warn(
            f"the gradient of a batch of {type(self.module).__name__} is no sum of the gradients of its examples, so "
            "that the loss couples them. A row is the gradient of a batch of one example; its scale is marked as not "
            "known.",
            stacklevel=2,
        )

    def _listed(self, reasons: dict[str, str]) -> str:
        """Return a text of the parameters that hooks do not support, by reason."""
        count = f"{len(reasons)} of {len(self.parameters)} parameters"
        return f"for {count} of {type(self.module).__name__}:{by_reason(reasons)}"

    def _is_random(self, batch: Any) -> bool:
        """Return whether the loss draws random numbers, so that two passes differ."""
        first, second = (self.loss_fn(self.module, batch).detach().sum() for _ in range(2))
        return not torch.equal(first, second)


def _loss_in(returned: Any) -> Tensor:
    """Return the loss in what a loss function returned: itself, or the entry `loss`."""
    found = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", returned)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the loss function returned a {type(returned).__name__}; return the loss as a tensor, or a mapping with "
            "the entry 'loss'."
        )
    if not found.requires_grad and torch.is_grad_enabled() and not torch.is_inference(found):
        raise ValueError(
            "the loss does not depend on the parameters; it may have been computed under no_grad or from detached "
            "tensors: return it without .detach()."
        )
    return found


def _refuse_packed(module: nn.Module) -> None:
    """Refuse a layer of bitsandbytes that gives no gradient after a pass without gradients on a CPU.

    Such a pass packs 4-bit weights for inference.
    """
    for name, part in module.named_modules():
        state = getattr(getattr(part, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed the 4-bit weights of {name} for inference on a CPU, in a pass under no_grad, "
                "and gives no gradients through them any more: load the model anew and call sketch_gradients before "
                "such a pass, or use a GPU, or 8 bits."
            )
