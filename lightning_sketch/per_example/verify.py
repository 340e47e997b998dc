"""Checks that rows of hooks are the gradients of the examples, by gradients of single examples, the witnesses.

    direction    the share of a witness in the batch's gradient is parallel to the witness's gradient alone
                 finds a wrong axis, coupled examples, what is missing or counted twice
    scale        both differ by the factor that a way of weighing says, see `weights`
                 finds class weights, padding, masks, sums

On every batch there are two witnesses: one drawn from the number of the batch, and the one about which the possible
ways of weighing disagree most, such as that with the fewest or the most labels. A row that is zero, or small beside the
others, is no witness: of a masked example both gradients are zero, whatever the scale. On the first batch direction is
checked parameter by parameter, with small sketches, and the shares must add up to the batch's gradient.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF, BatchStructure, leaves_of
from lightning_sketch.autodiff.gradients import visit_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn
from lightning_sketch.operators.count_sketch import CountSketch
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import Factor
from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.per_example.weights import Weighing

_DIM = 256

# A parameter's gradient below this, relative to the gradient of all parameters, is rounding, such as that of a bias
# before a normalization.
_FLOOR = 1e-5

# A row is no witness if it is smaller than this, relative to the largest one: rounding may be all of it.
_SMALL = 1e-2

# Witnesses of a batch; more where the ways that fit disagree about other examples.
WITNESSES, MOST_WITNESSES = 2, 5

_LISTED = 5  # parameters and reasons in a message

# Pairs of examples whose losses are compared, until one shows enough.
_PAIRS = 4

# The squared gradient of an example alone, relative to that of its share in the batch, below which it is zero.
_NOTHING = 1e-12

# The part of a batch's gradient that no weights of the examples explain, above which examples are coupled.
_COUPLED = 1e-2

_OTHER_DIRECTION = (
    "the share of an example in the batch is not the gradient of the example alone, nor parallel to it: the examples "
    "are along another axis (batch_dim=1 if time is first), or coupled by the loss, or the loss draws random numbers"
)


def tolerance(parameters: Mapping[str, Tensor]) -> float:
    """Return the relative error of a gradient that is rounding."""
    return 5e-2 if any(p.dtype in HALF for p in parameters.values()) else 1e-3


def disagreement(ways: Sequence[Weighing]) -> Float[Tensor, " examples"]:
    """Return by what factor ways of weighing disagree about each example; infinite if it counts in some of them only.

    It is one if all say the same, or that the example does not count.
    """
    scales = torch.stack([way.scale for way in ways])
    least, most = scales.min(0).values, scales.max(0).values
    return torch.where(most == 0, 1.0, most / least)


def witnesses(rows: Float[Tensor, "examples dim"], ways: Sequence[Weighing], number: int) -> list[int]:
    """Return the examples that a batch is checked by, none if all rows are zero or not finite.

    The first is drawn, the second is the one about which the ways disagree most; others follow, for more witnesses.

    Args:
        rows: The rows of the batch, up to their scales.
        ways: The ways in which the loss may weigh its examples.
        number: The number of the batch, from which one of the witnesses is drawn.
    """
    norms = rows.detach().double().norm(dim=1).cpu()
    norms = norms.where(norms.isfinite(), 0.0)
    fit = norms > _SMALL * norms.max()
    order = torch.randperm(len(norms), generator=torch.Generator().manual_seed(number))
    drawn = [i for i in order.tolist() if fit[i]]
    if len(drawn) < 3:
        return drawn
    apart = disagreement(ways).tolist()
    return [drawn[0], *sorted(drawn[1:], key=lambda i: -apart[i])]


def weighings_of(
    shares: Float[Tensor, "witnesses dim"],
    alone: Float[Tensor, "witnesses dim"],
    places: Sequence[int],
    ways: Sequence[Weighing],
    error: float,
) -> list[Weighing] | str:
    """Return the ways that turn the shares of the witnesses into their own gradients, or why there are none.

    Args:
        shares: The rows of the witnesses, from the pass of their batch.
        alone: The sketches of their gradients alone.
        places: Their places in the batch.
        ways: The ways in which the loss may weigh its examples.
        error: The relative error that is rounding.
    """
    shares, alone = shares.double().cpu(), alone.double().cpu()
    norms = alone.norm(dim=1)
    found = (shares * alone).sum(1) / shares.square().sum(1)
    off = (alone - found[:, None] * shares).norm(dim=1) / norms
    if not (off <= error).all():
        return _OTHER_DIRECTION
    errors = [float((way.scale[list(places)] / found - 1).abs().max()) for way in ways]
    fitting = [way for way, own in zip(ways, errors, strict=True) if own <= error]
    if fitting:
        return fitting
    best = ways[min(range(len(ways)), key=errors.__getitem__)]
    tried = " or ".join(dict.fromkeys(way.name for way in ways))
    at, real, expected = places[0], float(found[0]), float(best.scale[places[0]])
    return (
        "the share of an example in the batch is not the gradient of the example alone times a usual weight: the loss "
        f"is not {tried}; example {at} has {1 / real:.3g} of its own gradient in that of the batch, not "
        f"{1 / expected if expected else 0:.3g}. Pass weight_fn=lambda batch: the weight of the batch in a mean, such "
        "as the sum of its class weights"
    )


def weighings_by_losses(
    module: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    ways: Sequence[Weighing],
    structure: BatchStructure,
    number: int,
    error: float,
) -> list[Weighing] | str:
    """Return the ways of weighing that agree with the losses of pairs of examples, alone and in a batch of two.

    For rows that are shares of a training step, whose dropout no second pass repeats. One example of a pair is drawn
    from the number of the batch; the other is the one about which the ways that are left disagree most, among equals
    the one whose label is rarest. Costs a forward pass of four examples for each pair, and one pair is enough in most
    batches; call it under `preserve_state`.

    Args:
        module: The module.
        batch: The batch.
        loss_fn: (module, batch) -> loss of the batch.
        ways: The ways in which the loss may weigh its examples.
        structure: Where the examples are in a batch.
        number: The number of the batch, from which one of the examples is drawn.
        error: The relative error that is rounding.

    Returns:
        The ways that are left, which may disagree about examples if no pair could tell; or why none is left.
    """
    examples = structure.count(batch)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(number)).tolist()
    rarity = _frequencies(batch, examples)
    left, known = list(ways), False
    for first in order[:_PAIRS]:
        pair = _pair(first, order, left, rarity)
        if pair is None or (known and len({way.summed for way in left}) == 1 and disagreement(left).max() <= 1 + error):
            break
        low, high = sorted(pair)
        batches = structure.one(batch, low, examples), structure.one(batch, high, examples)
        both_examples = structure.two(batch, low, high, examples)
        a, b, both = (float(loss_fn(module, part).detach().double().mean()) for part in (*batches, both_examples))
        rounding = error / 500 * max(abs(a), abs(b))
        if not abs(a - b) > 1000 * rounding:  # or one of them is not finite
            continue
        known = True
        far = error * abs(a - b) + 2 * rounding
        agreeing = [way for way in left if abs(_expected(way, low, high, a, b) - both) <= far]
        if not agreeing:
            if abs(float(loss_fn(module, both_examples).detach().double().mean()) - both) > rounding:
                return "the loss draws random numbers, so that two passes cannot be compared"
            return (
                f"the loss of two examples, {both:.4g}, is none of the usual means or sums of their losses alone, "
                f"{a:.4g} and {b:.4g}; pass weight_fn=lambda batch: the weight of the batch in a mean (such as the sum "
                "of its class weights)"
            )
        left = agreeing
    return left


def _pair(first: int, order: Sequence[int], ways: Sequence[Weighing], rarity: Sequence[int]) -> tuple[int, int] | None:
    """Return two examples that tell ways of weighing apart, beginning with `first` if all of them count it."""
    counted = torch.stack([way.weights for way in ways]).min(0).values > 0
    start = first if counted[first] else next((i for i in order if counted[i]), None)
    if start is None or len(order) < 2:
        return None
    ratios = torch.stack([way.weights / way.weights[start] for way in ways])
    apart = ratios.max(0).values / ratios.min(0).values.clamp(min=1e-300)
    others = [i for i in order if i != start and ratios[:, i].max() > 0]
    if not others:
        return None
    # All count both: a mean differs from a sum. Else, where the ways agree there: one that some do not count.
    return start, max(others, key=lambda i: (bool(counted[i]) and _tells(ways, apart[i]), float(apart[i]), -rarity[i]))


def _tells(ways: Sequence[Weighing], apart: Tensor) -> bool:
    """Return whether a pair that all ways count shows which of them is right."""
    return len({way.summed for way in ways}) > 1 or bool(apart > 1 + 1e-6)


def _expected(way: Weighing, first: int, second: int, a: float, b: float) -> float:
    """Return the loss of a batch of two examples, from their losses alone; NaN if neither counts."""
    if way.summed:
        return a + b
    w, v = float(way.weights[first]), float(way.weights[second])
    return (w * a + v * b) / (w + v) if w + v > 0 else math.nan


def _frequencies(batch: Any, examples: int) -> list[int]:
    """Return how many examples of a batch have the class of each, in that column of classes where it is rarest.

    A loss with class weights weighs an example of a rare class unlike the others.
    """
    found = torch.full((examples,), examples)
    for _, _, place, count in _columns_of_classes(batch, examples):
        found = found.minimum(count[place])
    return found.tolist()


def classes_of(batch: Any, structure: BatchStructure) -> set[tuple[str, int]]:
    """Return the classes of the examples of a batch, each with the name of its column."""
    columns = _columns_of_classes(batch, structure.count(batch))
    return {(name, value) for name, values, _, _ in columns for value in values.tolist()}


def _columns_of_classes(batch: Any, examples: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield the columns of whole numbers of which some are equal: name, values, each example's value, and counts.

    A column without equal values, such as one of ids, is none of classes.
    """
    for name, _, leaf in leaves_of(batch):
        if isinstance(leaf, Tensor) and leaf.shape == (examples,) and not leaf.is_floating_point():
            values, place, count = leaf.cpu().unique(return_inverse=True, return_counts=True)
            if len(count) < examples:
                yield name, values, place, count


def coupled(rows: Float[Tensor, "examples dim"], whole: Float[Tensor, " dim"], error: float) -> bool:
    """Return whether no weights of the gradients of examples alone make their sum that of their batch.

    With more examples than numbers in a row there are always such weights.

    Args:
        rows: The sketches of the gradients of the examples alone.
        whole: The sketch of the gradient of their batch.
        error: The relative error that is rounding.
    """
    rows, whole = rows.detach().double().cpu(), whole.detach().double().cpu()
    if not (rows.isfinite().all() and whole.isfinite().all()):
        return False
    weights = torch.linalg.lstsq(rows.T, whole[:, None], driver="gelsd").solution[:, 0]
    return float((whole - weights @ rows).norm()) > max(_COUPLED, error) * float(whole.norm())


class _SmallSketches:
    """A small sketch of each parameter's gradients, with the scratch memory of one parameter at a time.

    Args:
        parameters: The parameters, by name.
        examples: The number of examples in the batch.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], examples: int):
        self.parameters, self.examples = parameters, examples
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

    def of(self, loss: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        """Sketch the gradients of a loss, in the order of the parameters, and return which ones it depends on."""
        found = {name: torch.zeros_like(rows[0]) for name, rows in self.rows.items()}

        def add(name: str, gradient: Tensor) -> None:
            found[name] = self.sketches[name].matvec(gradient.to_dense().reshape(-1))

        used = visit_gradients(loss, self.parameters, add)
        return found, used


def hooks_fail(
    module: nn.Module,
    batch: Any,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFn,
    structure: BatchStructure | None = None,
    ways: Callable[[Any], Sequence[Weighing]] | None = None,
) -> dict[str, str]:
    """Return the names of parameters for which hooks do not give the examples' gradients, each with the reason.

    What is compared is the direction of an example's gradient; its scale is that of all parameters together. Costs a
    training step on the batch and two on one example. Call it under `preserve_state`.

    Args:
        module: The module.
        batch: The first batch.
        parameters: The parameters to check, by name.
        loss_fn: (module, batch) -> loss of the batch, or a loss of each example.
        structure: Where the examples are, unless they are rows of tensors.
        ways: batch -> the ways in which the loss may weigh its examples; they choose a witness.

    Raises:
        ValueError: if the module is compiled; if examples are not along the first axis.
    """
    structure = structure or BatchStructure()
    check_first_axis(structure)
    parameters = {name: p for name, p in parameters.items() if p.numel()}
    examples = structure.count(batch)
    hooks, small = ExampleHooks(module, parameters), _SmallSketches(parameters, examples)
    with hooks.recording(small, examples):
        loss = loss_fn(module, batch).sum()
        hooks.before_backward(loss)
        whole, used = small.of(loss)
    supported, reasons = hooks.supported, hooks.reasons  # some are known only once the hooks are off
    wrong = _differing(whole, {name: rows.sum(0) for name, rows in small.rows.items()}, parameters)
    found: dict[str, str] = {}
    missed = [name for name in used if name not in supported]  # even if its gradient is zero
    for name in dict.fromkeys([*missed, *wrong]):
        unknown = "no hook saw it" if name not in supported else "its shares do not add up to its gradient"
        found[name] = reasons.get(name, unknown)
    right = [name for name in parameters if name not in found]
    if not right:
        return found
    known = ways(batch) if ways is not None else [Weighing("", torch.ones(examples, dtype=torch.float64))]
    for place in witnesses(torch.cat([small.rows[name].double() for name in right], 1), known, 0)[:WITNESSES]:
        alone, _ = small.of(loss_fn(module, structure.one(batch, place, examples)).sum())
        shares = {name: rows[place] for name, rows in small.rows.items()}
        products = sum(float((shares[name] * alone[name]).double().sum()) for name in right)
        squares = sum(float(shares[name].double().square().sum()) for name in right)
        if sum(float(own.double().square().sum()) for own in alone.values()) <= _NOTHING * squares:
            found |= {name: found.get(name, _OTHER_DIRECTION) for name in right}  # alone it has no loss
            continue
        scaled = {name: share * (products / squares) for name, share in shares.items()}
        for name in _differing(alone, scaled, parameters):
            found.setdefault(name, _OTHER_DIRECTION)
    return found


def by_reason(reasons: Mapping[str, str]) -> str:
    """Return a text of parameters and the reasons why hooks do not support them, a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = []
    for reason, (first, *others) in list(names.items())[:_LISTED]:
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        lines.append(f"\n  {first}: {reason}" + (f" (also {', '.join(others[:_LISTED])}{more})" if others else ""))
    return "".join(lines) + (f"\n  and {len(names) - _LISTED} other reasons" if len(names) > _LISTED else "")


def check_first_axis(structure: BatchStructure) -> None:
    """Refuse examples that are not along the first axis."""
    if not structure.along_first_axis:
        raise ValueError(
            "hooks split gradients along the first axis of tensors, but batch_dim or split_fn puts the examples "
            "elsewhere; use 'loop' as engine or fallback."
        )


def _differing(
    true: Mapping[str, Tensor], found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Return the names of the parameters whose sketched gradients differ by more than rounding."""
    error, half = tolerance(parameters), any(p.dtype in HALF for p in parameters.values())
    size = sum(float(t.square().sum()) for t in true.values() if t.isfinite().all()) ** 0.5
    return [
        name
        for name, t in true.items()
        if t.isfinite().all()  # an example whose gradient is not finite says nothing about the others
        and not (found[name] - t).norm() <= error * t.norm() + (error if half else _FLOOR) * size
    ]
