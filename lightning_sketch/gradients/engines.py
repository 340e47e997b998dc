"""One sketched gradient per example of a batch, by whichever engine serves the module."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.gradients.loss import LossFn
from lightning_sketch.gradients.one_by_one import loop_sketches, vmap_sketches
from lightning_sketch.gradients.own_scale import check_reduction
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.params import Layout

_ONE_BY_ONE = {"loop": loop_sketches, "vmap": vmap_sketches}
ENGINES = ("auto", *_ONE_BY_ONE)


class ExampleSketches:
    """A function: batch -> rows, one per example, and losses, where the engine knows them.

    Run it under `undisturbed`. Arguments as in `sketch_gradients`.

    Raises:
        ValueError: if the engine is unknown, or cannot serve the module.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        sketch: Sketch,
        loss_fn: LossFn,
        engine: str = "auto",
        weight_fn: Callable[[Any], float] | None = None,
        reduction: str = "mean",
    ):
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is not known; use one of {', '.join(map(repr, ENGINES))}.")
        check_reduction(reduction)
        self.module, self.layout, self.sketch, self.loss_fn = module, layout, sketch, loss_fn
        self.weight_fn, self.reduction = weight_fn, reduction
        self.parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
        self.engine = "loop" if engine == "auto" else engine

    def __call__(self, batch: Any) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"] | None]:
        """The rows, at the module's present weights."""
        one_by_one = _ONE_BY_ONE[self.engine]
        return one_by_one(self.module, batch, self.parameters, self.layout, self.sketch, self.loss_fn)
