"""The largest step along an optimizer's last update that does not raise the loss.

    c* = min {c > 0: L(θ₀ + c (θ₁ - θ₀)) > L(θ₀)},    critical learning rate = c* lr,    critical sharpness = 2 / c* lr

θ₀, θ₁    the weights before and after the last step, which any optimizer may have taken at the learning rate lr
L         the mean loss over the batches of a curvature operator

The search looks for the rise nearest to the step itself, c = 1, at the points that it tries: a bump of the loss between
them is not seen.

For gradient descent on a quadratic the critical sharpness is gᵀHg / gᵀg, which is at most lambda_max. It needs a few
forward passes, where lambda_max needs products with H.

Source: Kalra et al. (2026), "A scalable measure of loss landscape curvature for analyzing the training dynamics of
LLMs", arXiv:2601.16979. There the update is the next one, and the batch that of the step.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.preserve_state import interrupts_held_back
from lightning_sketch.autodiff.shards import local, reshard
from lightning_sketch.curvature.operator import CurvatureOperator

_PASSES = 9  # forward passes over the batches, at most
_FAR = 128.0  # the largest factor that is tried, and the inverse of the smallest
_PRECISE = 1.03  # the ratio of bounds at which the search ends
_NEAR = 1.01  # how far from an estimated root the loss is evaluated, on either side
_ROUNDING = 8  # changes of the loss up to this multiple of its rounding error are none


@dataclass(frozen=True)
class CriticalLearningRate:
    """How much larger the last step could have been without raising the loss.

    Attributes:
        factor: The factor c* of the last step: above 1 if the step lowered the loss; 0 if even a hundredth of it raises
            the loss, so that it was no step downhill; NaN if it is not known.
        lr: The learning rate of that step.
        at_least: Whether the loss never rose, so that the factor is a lower bound.
        passes: The number of forward passes over the batches.
        reason: Why the factor is NaN; empty if it is a number.
    """

    factor: float
    lr: float
    at_least: bool = False
    passes: int = 0
    reason: str = ""

    @property
    def learning_rate(self) -> float:
        """The smallest learning rate at which the last step would have raised the loss."""
        return self.factor * self.lr

    @property
    def sharpness(self) -> float:
        """The critical sharpness, 2 over the critical learning rate; infinite at 0."""
        return 2 / self.learning_rate if self.learning_rate else math.inf


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable parameters by name, of each sharded one this rank's shard."""
    reshard(module)
    return {name: local(p).clone() for name, p in module.named_parameters() if p.requires_grad}


def critical_learning_rate(
    operator: CurvatureOperator, before: Mapping[str, Tensor], lr: float
) -> CriticalLearningRate:
    """Return the largest factor of an optimizer's last step that does not raise the loss.

    To about 3 % where the loss is smooth.

    The step is from weights that were copied to those that the module has now. Costs four to nine forward passes over
    the operator's batches, and memory for one more copy of the weights; these are restored to the bit. If the operator
    sums over ranks, all of them call this.

    Args:
        operator: A curvature operator, whose mean loss over batches counts.
        before: What `copy_weights` returned before the step.
        lr: The learning rate of the step, by which the factor is multiplied; NaN if unknown.

    Returns:
        The factor, or the reason why there is none: a step that changed nothing, a loss that is NaN.

    Raises:
        ValueError: If the weights are not those of the module, or the loss is NaN at its present weights.

    >>> from lightning_sketch import Hessian
    >>> module = nn.Linear(1, 1, bias=False)
    >>> h = Hessian(lambda module, batch: module.weight.square().sum(), module, [torch.ones(1, 1)])
    >>> before = copy_weights(module)
    >>> sgd = torch.optim.SGD(module.parameters(), lr=0.25)
    >>> h.loss_fn(module, None).backward()
    >>> sgd.step()
    >>> found = critical_learning_rate(h, before, lr=0.25)
    >>> round(found.learning_rate, 2), round(found.sharpness, 2)  # 2 / lambda_max, lambda_max
    (1.0, 2.0)
    """
    with operator.hold():
        reshard(operator.module)
        parameters = {name: p for name, p in operator.module.named_parameters() if p.requires_grad}
        if before.keys() != parameters.keys() or any(before[n].shape != local(p).shape for n, p in parameters.items()):
            raise ValueError(
                "the copied weights are of other parameters than the module has now; call copy_weights(module) before "
                "the step, on the module of the operator."
            )
        after = operator.loss()  # where it is NaN, raises; it is not looked at again until the weights change
        with _restored(operator.module, parameters) as now:

            def loss(factor: float) -> float:
                for name, parameter in parameters.items():
                    start, end = before[name].to(now[name]), now[name]
                    local(parameter).copy_(start.lerp(end, factor) if factor else start)
                reshard(operator.module)
                return operator.loss()

            start = loss(0.0)
            if not math.isfinite(start):
                return CriticalLearningRate(
                    math.nan, lr, passes=2, reason="the loss before the last step is not finite"
                )
            unit = torch.finfo(operator.dtype).eps * max(abs(start), abs(after))
            search = _Search(lambda factor: loss(factor) - start, _ROUNDING * unit, {1.0: after - start})
            search.run(_PASSES - 2)
    passes = 1 + len(search.values)
    if all(abs(change) <= search.tolerance for change in search.values.values()):
        return CriticalLearningRate(math.nan, lr, passes=passes, reason="the last step does not change the loss")
    return CriticalLearningRate(search.root, lr, search.upper == math.inf, passes)


@dataclass
class _Search:
    """The search for the root of c -> L(c) - L(0) nearest to 1, by secants of the quotient by c.

    This quotient is linear in c if the loss is quadratic.

    Attributes:
        change: c -> L(c) - L(0).
        tolerance: Changes up to this are none.
        values: The changes that are known, by c.
    """

    change: Callable[[float], float]
    tolerance: float
    values: dict[float, float] = field(default_factory=dict)

    @property
    def lower(self) -> float:
        """The largest c below the first at which the loss rises; 0 if there is none."""
        return max((c for c in self.values if c < self.upper), default=0.0)

    @property
    def upper(self) -> float:
        """The smallest c at which the loss rises; infinite if there is none."""
        return min((c for c, v in self.values.items() if not v <= self.tolerance), default=math.inf)

    @property
    def root(self) -> float:
        """The best estimate of the root, between both bounds; the lower bound if there is no other."""
        lower, upper = self.lower, self.upper
        if upper == math.inf or not lower:
            return lower
        secant = self._secant(lower, upper)
        return min(max(secant, lower), upper) if math.isfinite(secant) else lower

    def run(self, passes: int) -> None:
        """Evaluate the change until the bounds are close or far away, at most `passes` times."""
        width = math.inf
        for _ in range(passes):
            lower, upper = self.lower, self.upper
            if lower >= _FAR or upper <= 1 / _FAR or (lower and upper / lower < _PRECISE):
                return
            if upper == math.inf:
                factor = self._beyond(lower, 1)
            elif not lower:
                factor = 1 / self._beyond(upper, -1)
            else:
                factor = self._between(lower, upper, halve=math.log(upper / lower) > width / 2)
                width = math.log(upper / lower)
            self.values[factor] = self.change(factor)

    def _beyond(self, known: float, sign: int) -> float:
        """Return the next c, or 1 / c if the sign is -1, beyond all that are known: at most eight times as far."""
        far, others = known**sign, sorted(self.values, key=lambda c: abs(math.log(c / known)))
        if len(others) == 1:
            return 2 * far
        root = self._secant(*others[:2])
        wanted = root**sign * _NEAR**4 if math.isfinite(root) and root > 0 else math.inf
        least = 1.5 if len(others) == 2 else 4.0  # a secant that has failed once will fail again
        return min(max(wanted, least * far), 8 * far, _FAR)

    def _between(self, lower: float, upper: float, halve: bool) -> float:
        """Return the next c between the bounds: on one side of the secant's root, then on the other."""
        root = self._secant(lower, upper)
        middle = math.sqrt(lower * upper)
        if halve or not lower < root < upper:
            return middle
        factor = root / _NEAR if root / _NEAR**2 > lower else root * _NEAR
        return factor if lower < factor < upper else middle

    def _secant(self, a: float, b: float) -> float:
        """Return the root of the line through the quotients at a and b; NaN or infinite if there is none."""
        at_a, at_b = self.values[a] / a, self.values[b] / b
        slope = (at_b - at_a) / (b - a)
        return b - at_b / slope if slope and math.isfinite(slope) else math.nan


@contextmanager
def _restored(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of parameters, and restore these from them afterwards, bit by bit."""
    copies = {name: local(parameter).clone() for name, parameter in parameters.items()}
    try:
        yield copies
    finally:
        outer, interrupts_held_back.restoring = interrupts_held_back.restoring, True
        try:
            for name, parameter in parameters.items():
                local(parameter).copy_(copies[name])
            reshard(module)
        finally:
            interrupts_held_back.restoring = outer
