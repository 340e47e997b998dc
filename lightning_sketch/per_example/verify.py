"""Checks on the first batch that the rows of hooks are the gradients of the examples; two for each parameter.

    sum    the shares of all examples add up to the gradient of the batch
           finds what is missing or counted twice
    row    the scaled share of an example is the gradient of this example alone, for the first and the last example
           that have a weight; finds a wrong axis, a wrong scale, examples that are coupled through the loss

Either alone lets wrong rows pass: any partition of a batch's terms has the right sum. Small sketches are compared.
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

# A parameter's gradient below this, relative to the gradient of all parameters, is rounding, such as that of a bias
# before a normalization.
_FLOOR = 1e-5


class _SmallSketches:
    """A small sketch of each parameter's gradients, with the scratch memory of one parameter at a time.

    Args:
        parameters: The parameters, by name.
        examples: The number of examples in the batch.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], examples: int):
        self.examples = examples
        self.rows: dict[str, Tensor] = {}
        self.names = {id(p): name for name, p in parameters.items()}
        self.sketches = {name: CountSketch(p.numel(), min(p.numel(), _DIM)) for name, p in parameters.items()}
        for name, p in parameters.items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            self.rows[name] = torch.zeros(examples, self.sketches[name].dim, dtype=dtype, device=p.device)

    def add(self, factor: Factor) -> None:
        """Add a factor of the gradients of the examples."""
        name = self.names[id(factor.parameter)]
        layout = Layout((name,), (factor.parameter.shape,))
        accumulator = SketchAccumulator(self.sketches[name], layout, parameters={name: factor.parameter})
        accumulator.start(self.examples)
        accumulator.add(factor)
        self.rows[name] += accumulator.rows()

    def of(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Sketch gradients of the parameters, in their order; None is zero."""
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
    """Return the names of parameters for which hooks do not give the examples' gradients, each with the reason.

    Costs a training step on the batch and two on one example. Call it under `preserve_state`.

    Args:
        module: The module.
        batch: The first batch.
        parameters: The parameters to check, by name.
        loss_fn: (module, batch) -> loss of the batch, or a loss of each example.
        scale: The scale of each example's share, as `own_scale` returns it.
        structure: Where the examples are, unless they are rows of tensors.

    Raises:
        ValueError: if the module is compiled; if examples are not along the first axis.
    """
    structure = structure or BatchStructure()
    if not structure.along_first_axis:
        raise ValueError(
            "hooks split gradients along the first axis of tensors, but batch_dim or split_fn puts the examples "
            "elsewhere; use 'loop' as engine or fallback."
        )
    parameters = {name: p for name, p in parameters.items() if p.numel()}
    examples = structure.count(batch)
    hooks, small = ExampleHooks(module, parameters), _SmallSketches(parameters, examples)
    with hooks.recording(small, examples):
        loss = loss_fn(module, batch).sum()
        hooks.before_backward(loss)
        whole = _gradients(loss, parameters)
    supported, reasons = hooks.supported, hooks.reasons  # some are known only once the hooks are off
    wrong = _differing(small.of(whole), {name: rows.sum(0) for name, rows in small.rows.items()}, parameters)
    found: dict[str, str] = {}
    used = [name for name, gradient in whole.items() if gradient is not None]  # even if it is zero
    missed = [name for name in used if name not in supported]
    for name in dict.fromkeys([*missed, *wrong]):
        unknown = "no hook saw it" if name not in supported else "its shares do not add up to its gradient"
        found[name] = reasons.get(name, unknown)
    for place in scale.nonzero().flatten()[[0, -1]].tolist() if scale.any() else ():
        example, _ = next(itertools.islice(structure.parts(batch, 1), place, None))
        alone = _gradients(loss_fn(module, example).sum(), parameters)
        shares = {name: rows[place] * float(scale[place]) for name, rows in small.rows.items()}
        for name in _differing(small.of(alone), shares, parameters):
            found.setdefault(
                name,
                "the share of an example in the batch is not the gradient of the example alone: the examples are along "
                "another axis, or coupled, or the loss is not a mean over them (pass reduction='sum', or for a mean "
                "over tokens weight_fn=num_labels, with shift=True for a causal language model)",
            )
    return found


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def _differing(
    true: Mapping[str, Tensor], found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Return the names of the parameters whose sketched gradients differ by more than rounding."""
    half = any(p.dtype in HALF for p in parameters.values())
    tolerance = 5e-2 if half else 1e-3
    size = sum(float(t.square().sum()) for t in true.values()) ** 0.5
    return [
        name
        for name, t in true.items()
        if not (found[name] - t).norm() <= tolerance * t.norm() + (tolerance if half else _FLOOR) * size
    ]
