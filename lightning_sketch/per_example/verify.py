"""Are the rows that hooks give the gradients of the examples? Two questions to the first batch, for each parameter.

    sum    the shares of all examples add up to the gradient of the batch        sees what is missing or counted twice
    row    the first and last example's share, scaled, is the gradient of the example alone; of those with a weight
                                       sees a wrong axis, a wrong scale, examples that are coupled through the loss

Either alone lets wrong rows pass: any partition of a batch's terms has the right sum. Compared are small sketches.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF, BatchStructure
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn
from lightning_sketch.operators.count_sketch import CountSketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import Factor
from lightning_sketch.per_example.hooks import ExampleHooks

_DIM = 256
_FLOOR = 1e-5
"""Of the whole gradient: below, a parameter's own is rounding, as a bias's is before a normalization."""


class _Each:
    """A small sketch for each parameter, made with the scratch memory of one at a time."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], examples: int):
        self.examples, self.rows = examples, {}
        self.names = {id(p): name for name, p in parameters.items()}
        self.sketches = {name: CountSketch(p.numel(), min(p.numel(), _DIM)) for name, p in parameters.items()}
        for name, p in parameters.items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            self.rows[name] = torch.zeros(examples, self.sketches[name].dim, dtype=dtype, device=p.device)

    def add(self, factor: Factor) -> None:
        name = self.names[id(factor.parameter)]
        layout = Layout((name,), (factor.parameter.shape,))
        accumulator = SketchAccumulator(self.sketches[name], layout, {name: factor.parameter})
        accumulator.start(self.examples)
        accumulator.add(factor)
        self.rows[name] += accumulator.rows()

    def of(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Sketch gradients likewise; a missing one is zero."""
        return {
            name: self.rows[name].new_zeros(sketch.dim) if g is None else sketch.matvec(g.to_dense().reshape(-1))
            for (name, g), sketch in zip(gradients.items(), self.sketches.values(), strict=True)
        }


def hooks_fail(
    module: nn.Module,
    batch: Any,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFn,
    scale: Float[Tensor, " examples"],
    structure: BatchStructure | None = None,
) -> dict[str, str]:
    """Return the parameters for which hooks do not give the examples' gradients, each with the reason.

    Costs a training step on the batch and two on an example. Run it under `preserve_state`.

    Raises:
        ValueError: if the module is compiled; if examples are not along the first axis.
    """
    structure = structure or BatchStructure()
    if not structure.along_first_axis:
        raise ValueError(
            "hooks split gradients along the first axis of tensors, and examples are elsewhere here (batch_dim, "
            "split_fn); use 'loop' as engine or fallback."
        )
    parameters = {name: p for name, p in parameters.items() if p.numel()}
    examples = structure.count(batch)
    hooks, each = ExampleHooks(module, parameters), _Each(parameters, examples)
    with hooks.recording(each, examples):
        loss = loss_fn(module, batch).sum()
        hooks.before_backward(loss)
        whole = _gradients(loss, parameters)
    supported, reasons = hooks.supported, hooks.reasons  # some are known only once the hooks are off
    wrong = _differing(each.of(whole), {name: rows.sum(0) for name, rows in each.rows.items()}, parameters)
    found = {}
    used = [name for name, gradient in whole.items() if gradient is not None]  # zero, or not
    missed = [name for name in used if name not in supported]
    for name in dict.fromkeys([*missed, *wrong]):
        unknown = "no hook saw it" if name not in supported else "its shares do not add up to its gradient"
        found[name] = reasons.get(name, unknown)
    for place in scale.nonzero().flatten()[[0, -1]].tolist() if scale.any() else ():
        example, _ = next(itertools.islice(structure.parts(batch, 1), place, None))
        alone = _gradients(loss_fn(module, example).sum(), parameters)
        shares = {name: rows[place] * float(scale[place]) for name, rows in each.rows.items()}
        for name in _differing(each.of(alone), shares, parameters):
            found.setdefault(
                name,
                "the share of an example in the batch is not the gradient of the example alone: the examples are along "
                "another axis, or coupled, or the loss is no mean over them (reduction='sum', or weight_fn=num_labels, "
                "which counts with shift=True for a causal language model)",
            )
    return found


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def _differing(
    true: Mapping[str, Tensor], found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    half = any(p.dtype in HALF for p in parameters.values())
    tolerance = 5e-2 if half else 1e-3
    size = sum(float(t.square().sum()) for t in true.values()) ** 0.5
    return [
        name
        for name, t in true.items()
        if not (found[name] - t).norm() <= tolerance * t.norm() + (tolerance if half else _FLOOR) * size
    ]
