"""Gradients of one example at a time: the slow engines that serve any module.

loop    a forward and a backward pass per example
vmap    torch.func.vmap(grad(loss)): many small examples at once; refuses what depends on data or writes buffers
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.gradients.examples import each_example, split_batch
from lightning_sketch.gradients.loss import LossFn
from lightning_sketch.gradients.substituted import substituted
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.params import Layout

_AT_ONCE = 1 << 24
"""Numbers in the gradients that vmap holds at a time."""


def loop_sketches(
    module: nn.Module,
    batch: Any,
    parameters: Mapping[str, Tensor],
    layout: Layout,
    sketch: Sketch,
    loss_fn: LossFn,
) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"]]:
    """Sketches of each example's gradient with respect to these parameters of the layout, and its loss."""
    rows, losses = [], []
    for example in split_batch(batch, 1):
        loss = loss_fn(module, example).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        rows.append(layout.sketch(sketch, dict(zip(parameters, gradients, strict=True))))
        losses.append(loss.detach())
    return torch.stack(rows), torch.stack(losses)


def vmap_sketches(
    module: nn.Module,
    batch: Any,
    parameters: Mapping[str, Tensor],
    layout: Layout,
    sketch: Sketch,
    loss_fn: LossFn,
) -> tuple[Float[Tensor, "examples dim"], Float[Tensor, " examples"]]:
    """As `loop_sketches`.

    Raises:
        ValueError: if the loss cannot be vectorized over examples.
    """
    tensors, batch_of_one = each_example(batch)
    own = list(parameters.values())

    def loss_of(values: Sequence[Tensor], *slices: Tensor) -> tuple[Tensor, Tensor]:
        with substituted(module, own, values):
            loss = loss_fn(module, batch_of_one(slices)).sum()
        return loss, loss

    gradients_of = torch.func.vmap(
        torch.func.grad(loss_of, has_aux=True), in_dims=(None, *[0] * len(tensors)), randomness="different"
    )
    rows, losses = [], []
    size = max(1, _AT_ONCE // sum(p.numel() for p in own))
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        try:
            gradients, loss = gradients_of([p.detach() for p in own], *parts)
        except RuntimeError as error:
            raise ValueError(
                f"{type(module).__name__} cannot be vectorized over examples: {error}. Use engine='loop'."
            ) from error
        named = dict(zip(parameters, gradients, strict=True))
        rows += [layout.sketch(sketch, {k: g[i] for k, g in named.items()}) for i in range(len(parts[0]))]
        losses.append(loss)
    return torch.stack(rows), torch.cat(losses)
