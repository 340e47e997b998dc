"""Gradients of one example at a time: the slow engines, which support any module or nearly any.

loop    a forward and a backward pass per example; any module
vmap    torch.func.vmap(grad(loss)), many small examples at once; no module that branches on data or writes buffers
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure
from lightning_sketch.autodiff.functional import swap_tensors
from lightning_sketch.autodiff.gradients import gradients_of, sketched_gradient
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.precondition import GradientMap

# The most numbers in the gradients that vmap computes in one call, and in those that are sketched in one call.
_VMAP_NUMBERS = 1 << 24
_SKETCH_NUMBERS = 1 << 21


def loop_sketches(
    module: nn.Module,
    batch: Any,
    parameters: Mapping[str, Tensor],
    layout: Layout,
    sketch: Sketch,
    loss_fn: LossFn,
    structure: BatchStructure | None = None,
    gradient_map: GradientMap | None = None,
) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"]]:
    """Compute the sketch of each example's gradient, and its loss, by one backward pass per example.

    Args:
        module: The module that `loss_fn` is called with.
        batch: The examples.
        parameters: The parameters to differentiate by, by their names in the layout; all others count as zero.
        layout: Where in the flat vector each parameter lies.
        sketch: The sketch, of vectors of the layout's size.
        loss_fn: (module, batch of one example) -> loss.
        structure: Where the examples are, unless they are rows of tensors.
        gradient_map: A linear map of the gradients, after which they are sketched.

    Returns:
        The rows (examples, dim) and the losses (examples,).
    """
    rows, losses = _Sketched(layout, sketch, parameters, gradient_map), []
    for example, _ in (structure or BatchStructure()).parts(batch, 1):
        loss = loss_fn(module, example).sum()
        rows.add_gradient(loss)
        losses.append(loss.detach())
    return rows.all(), torch.stack(losses)


def vmap_sketches(
    module: nn.Module,
    batch: Any,
    parameters: Mapping[str, Tensor],
    layout: Layout,
    sketch: Sketch,
    loss_fn: LossFn,
    structure: BatchStructure | None = None,
    gradient_map: GradientMap | None = None,
) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"]]:
    """Compute the sketch of each example's gradient, and its loss, by vmap; arguments as in `loop_sketches`.

    Raises:
        ValueError: if the loss cannot be vectorized over examples.
    """
    tensors, batch_of_one = (structure or BatchStructure()).each(batch)
    own = list(parameters.values())

    def loss_of(values: Sequence[Tensor], *slices: Tensor) -> tuple[Tensor, Tensor]:
        with swap_tensors(module, own, values):
            loss = loss_fn(module, batch_of_one(slices)).sum()
        return loss, loss

    together = torch.func.vmap(
        torch.func.grad(loss_of, has_aux=True), in_dims=(None, *[0] * len(tensors)), randomness="different"
    )
    rows, losses = _Sketched(layout, sketch, parameters, gradient_map), []
    size = max(1, _VMAP_NUMBERS // sum(p.numel() for p in own))
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        try:
            gradients, loss = together([p.detach() for p in own], *parts)
        except RuntimeError as error:
            raise ValueError(
                f"{type(module).__name__} cannot be vectorized over examples: {str(error).splitlines()[0][:200]} Use "
                "'loop' instead of 'vmap'."
            ) from error
        named = dict(zip(parameters, gradients, strict=True))
        for i in range(len(parts[0])):
            rows.add({name: gradient[i] for name, gradient in named.items()})
        losses.append(loss)
    return rows.all(), torch.cat(losses)


class _Sketched:
    """Sketches of gradients that are added one by one; small ones are sketched together, which makes signs once.

    Args:
        layout: Where in the flat vector each parameter lies.
        sketch: The sketch, of vectors of the layout's size.
        parameters: The parameters that gradients are added of, by their names in the layout.
        gradient_map: A linear map that gradients go through first.
    """

    def __init__(
        self,
        layout: Layout,
        sketch: Sketch,
        parameters: Mapping[str, Tensor],
        gradient_map: GradientMap | None = None,
    ):
        self.layout, self.sketch, self.parameters, self.map = layout, sketch, parameters, gradient_map
        dtypes = (parameter.dtype for parameter in parameters.values())
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        self.like = torch.empty(0, dtype=dtype, device=next(iter(parameters.values())).device)
        self.at_once = _SKETCH_NUMBERS // layout.n
        self.waiting: list[Tensor] = []
        self.rows: list[Tensor] = []

    def add(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add the gradients of one example, by name; None or a missing name is zero."""
        gradients = gradients if self.map is None else self.map.gradients(gradients)
        if self.at_once < 2:
            self._append(self.layout.sketch(self.sketch, gradients))
            return
        self.waiting.append(self.layout.flatten([gradients.get(name) for name in self.layout.names], self.like))
        if len(self.waiting) == self.at_once:
            self._sketch()

    def add_gradient(self, loss: Tensor) -> None:
        """Add the gradient of the loss of one example; a large one is sketched while it is computed."""
        if self.at_once < 2 and self.map is None:
            self._append(sketched_gradient(loss, self.parameters, self.layout, self.sketch))
        else:
            self.add(gradients_of(loss, self.parameters))

    def all(self) -> Float[Tensor, "examples dim"]:
        """Return the rows of all examples."""
        self._sketch()
        return torch.cat(self.rows)

    def _append(self, row: Float[Tensor, " dim"]) -> None:
        self.rows.append(row[None].to(self.like))

    def _sketch(self) -> None:
        if self.waiting:
            self.rows.append(self.sketch.matvec(torch.stack(self.waiting)))
            self.waiting = []
