"""Sketched gradients of each example of a batch, by the fastest engine that supports the module."""

from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn, on_copies
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.loop import loop_sketches, vmap_sketches
from lightning_sketch.per_example.reduction import Reduction, check_reduction, own_scale
from lightning_sketch.per_example.verify import hooks_fail

_ONE_BY_ONE = {"loop": loop_sketches, "vmap": vmap_sketches}

# How per-example gradients are computed.
Engine = Literal["auto", "hooks", "loop", "vmap"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class ExampleSketches:
    """A function from a batch to the sketched gradients of its examples, and their losses if the engine knows them.

    Call it under `preserve_state`. The first batch of two examples or more decides whether hooks support the module:
    their gradients are compared with those that autograd gives for two examples alone.

    Args:
        module: The module.
        layout: Where in the flat vector each parameter lies.
        sketch: The sketch, of vectors of the layout's size.
        loss_fn: (module, batch) -> loss of the batch, or a loss of each example.
        engine: "hooks", "vmap", "loop", or "auto" for hooks where they are exact and the loop elsewhere.
        weight_fn: (batch) -> its weight in a mean, where examples do not all weigh the same; `num_labels` for a mean
            over tokens.
        reduction: "mean" or "sum", what the loss does over the examples of a batch.
        names: The names of the parameters to differentiate by, all of the layout if None; others are zero in the rows.
        structure: Where the examples are, unless they are rows of tensors.

    Raises:
        ValueError: if the engine is unknown or does not support the module, or if a parameter is frozen.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        *,
        sketch: Sketch,
        loss_fn: LossFn,
        engine: Engine = "auto",
        weight_fn: Callable[[Any], float] | None = None,
        reduction: Reduction = "mean",
        names: Collection[str] | None = None,
        structure: BatchStructure | None = None,
    ):
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is not known; use one of {', '.join(map(repr, ENGINES))}.")
        check_reduction(reduction)
        self.module, self.layout, self.sketch, self.loss_fn = module, layout, sketch, on_copies(loss_fn)
        self.weight_fn, self.reduction, self.engine = weight_fn, reduction, engine
        self.structure = structure or BatchStructure()
        named = zip(layout.names, layout.parameters(module), strict=True)
        self.parameters = {name: p for name, p in named if names is None or name in names}
        frozen = [name for name, parameter in self.parameters.items() if not parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"rows are to cover {', '.join(frozen[:10])}, which {'is' if len(frozen) == 1 else 'are'} frozen now; "
                "set requires_grad=True while rows are computed."
            )
        self._hooks: tuple[ExampleHooks, SketchAccumulator] | None = None

    def __call__(self, batch: Any) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"] | None]:
        """Return the rows (examples, dim) at the module's present weights, and the losses (examples,) if known."""
        if self.engine in ("auto", "hooks") and self._hooks is None:
            self._choose(batch)
        if self._hooks is not None:
            return self._by_hooks(*self._hooks, batch)
        one_by_one = _ONE_BY_ONE[self.engine if self.engine in _ONE_BY_ONE else "loop"]
        rows, losses = one_by_one(
            self.module, batch, self.parameters, self.layout, self.sketch, self.loss_fn, self.structure
        )
        counts = own_scale(batch, self.reduction, self.weight_fn, self.structure).to(rows) > 0
        return rows.where(counts[:, None], 0.0), losses  # the mean over no labels is NaN

    def _choose(self, batch: Any) -> None:
        """Use hooks if they are exact; a batch of one example decides nothing, and takes the loop."""
        if self.structure.count(batch) == 1:
            return
        try:
            scale = self._scale(batch)
            failing = hooks_fail(self.module, batch, self.parameters, self.loss_fn, scale, self.structure)
        except ValueError:
            if self.engine == "hooks":
                raise
            failing = dict.fromkeys(self.parameters, "")
        if failing and self.engine == "hooks":
            listed = "".join(f"\n  {name}: {reason}" for name, reason in list(failing.items())[:20])
            raise ValueError(
                f"hooks do not give the gradients of single examples for {len(failing)} of {len(self.parameters)} "
                f"parameters of {type(self.module).__name__}:{listed}\nUse engine='loop', or leave these out."
            )
        if failing:
            self.engine = "loop"
        else:
            accumulator = SketchAccumulator(self.sketch, self.layout, parameters=self.parameters)
            self._hooks = ExampleHooks(self.module, self.parameters), accumulator

    def _by_hooks(
        self, hooks: ExampleHooks, accumulator: SketchAccumulator, batch: Any
    ) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"] | None]:
        examples = self.structure.count(batch)
        accumulator.start(examples)
        with hooks.recording(accumulator, examples):
            loss = self.loss_fn(self.module, batch)
            total = loss.sum()
            hooks.before_backward(total)
            torch.autograd.grad(total, list(self.parameters.values()), allow_unused=True)
            rows = accumulator.rows()
        each = loss.detach() if loss.shape == (examples,) else None
        return rows * self._scale(batch).to(rows)[:, None], each

    def _scale(self, batch: Any) -> Float[Tensor, " examples"]:
        """Return the scales of the examples; a loss of each example adds up to a sum, whatever `reduction` says."""
        if self.weight_fn is None and self.reduction == "mean" and self._loss_is_vector(batch):
            return own_scale(batch, "sum", structure=self.structure)
        return own_scale(batch, self.reduction, self.weight_fn, self.structure)

    def _loss_is_vector(self, batch: Any) -> bool:
        """Return whether the loss function returns one loss per example."""
        if not hasattr(self, "_vector"):
            with torch.no_grad():
                self._vector = self.loss_fn(self.module, batch).shape == (self.structure.count(batch),)
        return self._vector
