"""Products with the Hessian of a loss and the Jacobian of an output, and errors for losses without such derivatives.

    H v = ∇(∇L(θ)ᵀ v)                       double backward; the graph of ∇L can serve many v
        = d/dt ∇L(θ + t v) at t = 0         forward over reverse: less memory, no graph of a gradient
        ≈ (∇L(θ + ε v) - ∇L(θ - ε v)) / 2ε  central differences, ||v|| = 1: first derivatives only, and inexact

    Jᵀ u                                    the ordinary backward pass
    J v = ∂(Jᵀ u)/∂u, transposed, times v   the derivative of the backward pass, which is linear in u

Sources: Pearlmutter (1994), "Fast exact multiplication by the Hessian", Neural Computation 6(1),
doi:10.1162/neco.1994.6.1.147; Griewank & Walther (2008), "Evaluating Derivatives", sections 3.3 and 1; Townsend
(2017), "A new trick for calculating Jacobian vector products", https://j-towns.github.io/2017/06/12/
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils.hooks import RemovableHandle

from lightning_sketch.autodiff.functional import swap_tensors

# The parts of A v from the parts of v, each in the shape of a parameter; None is zero.
Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]

# The loss at the parameters that the module has when this function is called.
LossNow = Callable[[], Tensor]

# Words in autograd's messages about a derivative that is missing.
_SIGNS = (
    "is not implemented",
    "does not have a double backward",
    "not supported",
    ".grad()",
    "cudnn RNN backward",
    "forward AD",
    "jvp",
)

# Relative difference between finite differences with two steps above which they are refused; and the rounding error of
# a gradient that is allowed on top, in units of its last digit.
_STEPS_AGREE, _ROUNDING = 0.02, 30

# Steps along a vector of length one, for differences that autograd is compared with.
_FINE, _COARSE = (1e-6, 1e-7, 1e-5), (1e-2, 3e-3, 1e-3, 3e-4)

# Difference between the slopes of a loss to either side, relative to its value, above which it is not in float64: one
# that is rounded to float32 on its way changes by 6e-8 at random, which is divided by the step.
_SMOOTH = 2e-5

# Operations with kinks: beginnings of the names of their nodes in a graph.
_KINKS = (
    "Relu", "Threshold", "LeakyRelu", "Prelu", "Rrelu", "Hard", "Softshrink", "Abs", "Clamp", "Max", "Min", "Amax",
    "Amin", "Aminmax", "AdaptiveMaxPool", "FractionalMaxPool", "Sort", "Topk", "Kthvalue", "Median", "Where", "Cummax",
    "Cummin",
)  # fmt: skip

# The code of every backward pass that is marked once_differentiable.
_MARKED = once_differentiable(lambda ctx: None).__code__


def double_backward(loss_now: LossNow, parameters: Sequence[Tensor], keep: bool) -> Product:
    """Return v -> H v by differentiating the gradient once more, in reverse.

    Args:
        loss_now: The loss at the present parameters.
        parameters: The parameters to differentiate by.
        keep: Whether to keep the graph of the gradient, for more than one product.

    Raises:
        NoSecondDerivative: if an operation of the loss cannot be differentiated twice; from the product too.
    """
    loss = loss_now()
    with second_derivative_errors(), nothing_dropped(loss):
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)

    def product(parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(g, v) for g, v in zip(gradients, parts, strict=True) if g is not None and g.requires_grad]
        if not pairs:  # the loss is linear in the parameters
            return [None] * len(parts)
        outputs, directions = zip(*pairs, strict=True)
        with second_derivative_errors():
            return torch.autograd.grad(outputs, parameters, directions, retain_graph=keep, allow_unused=True)

    return product


def forward_over_reverse(loss_now: LossNow, module: nn.Module, parameters: Sequence[Tensor]) -> Product:
    """Return v -> H v by carrying the derivative along v through the gradient.

    Args:
        loss_now: The loss at the present parameters.
        module: The module that has the parameters.
        parameters: The parameters to differentiate by.

    The product raises `NoSecondDerivative` if an operation of the loss cannot be differentiated so, and ValueError if
    the loss does not get its parameters through the module.
    """

    def product(parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        with forward_ad.dual_level(), second_derivative_errors():
            leaves = [p.detach().requires_grad_() for p in parameters]
            duals = [forward_ad.make_dual(p, v.to(p)) for p, v in zip(leaves, parts, strict=True)]
            with swap_tensors(module, parameters, duals):
                loss = loss_now()
                nowhere_else(loss, parameters)
                gradients = torch.autograd.grad(loss, duals, allow_unused=True)
            return [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients]

    return product


def finite_differences(loss_now: LossNow, module: nn.Module, parameters: Sequence[Tensor], step: float) -> Product:
    """Return v -> H v from four gradients, `step` and half of it to either side along v / ||v||.

    The two differences D(ε) and D(ε/2) are combined to (4 D(ε/2) - D(ε)) / 3, whose error is of order ε⁴.

    Args:
        loss_now: The loss at the present parameters.
        module: The module that has the parameters.
        parameters: The parameters to differentiate by.
        step: The distance ε of either side.

    The product raises ValueError if the two differences disagree, as they do where a step crosses a kink of the loss,
    and if the loss does not get its parameters through the module.
    """

    def difference(parts: Sequence[Tensor], t: float) -> tuple[list[Tensor | None], float]:
        """Return (∇L(θ + t v) - ∇L(θ - t v)) / 2t, and the rounding error that is due to the size of ∇L."""
        up, down = (gradient_at(loss_now, module, parameters, parts, sign * t)[1] for sign in (1, -1))
        rounding = _ROUNDING * torch.finfo(parameters[0].dtype).eps * norm(up) / t
        return [None if d is None else d.div_(2 * t) for d in _differences(up, down)], rounding

    def product(parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        size = norm(parts)
        if not size:
            return [None] * len(parts)
        (coarse, _), (fine, rounding) = (difference(parts, t / size) for t in (step, step / 2))
        change, whole = norm(_differences(fine, coarse)), norm(fine)
        if not change <= _STEPS_AGREE * whole + rounding:
            raise ValueError(
                f"finite differences with steps of {step:g} and {step / 2:g} differ by "
                f"{change / whole if whole else math.inf:.0%}: the loss has kinks (ReLU, max-pooling) or the step does "
                "not fit it. Use hvp='auto', smooth activations, or another step."
            )
        return [
            None if f is None or c is None else f.mul_(4).sub_(c).div_(3) for f, c in zip(fine, coarse, strict=True)
        ]

    return product


def gradient_at(
    loss_now: LossNow, module: nn.Module, parameters: Sequence[Tensor], parts: Sequence[Tensor], t: float
) -> tuple[float, Sequence[Tensor | None]]:
    """Return L(θ + t v) and ∇L(θ + t v), without changing the parameters.

    Args:
        loss_now: The loss at the present parameters.
        module: The module that has the parameters.
        parameters: The parameters θ.
        parts: The direction v, in the shapes of the parameters.
        t: The distance along v.

    Raises:
        ValueError: if the loss does not get its parameters through the module.
    """
    moved = [torch.add(p.detach(), v, alpha=t).requires_grad_() for p, v in zip(parameters, parts, strict=True)]
    with swap_tensors(module, parameters, moved):
        loss = loss_now()
        nowhere_else(loss, parameters)
        return float(loss.detach()), torch.autograd.grad(loss, moved, allow_unused=True)


class Disagreement(NamedTuple):
    """How far a derivative by autograd is from a difference.

    Attributes:
        relative: The norm of their difference over the norm of the larger of the two; of the tensor that is most off.
        bound: How far they may differ, by the difference's own error.
        tensors: The places of the tensors that differ most.
    """

    relative: float
    bound: float
    tensors: list[int]


def disagreement(
    claimed: Sequence[Tensor | None],
    at: Callable[[float], tuple[float, Sequence[Tensor | None]]],
    slope: float | None,
    *,
    fine: bool,
    coarse: bool,
) -> Disagreement | None:
    """Compare d/dt f(t) at 0 by autograd with differences of f; return None if these say nothing.

    One-sided differences to either side must agree with each other before they count, and two steps before they
    contradict. A fine step, for float64, is so small that almost never a kink lies within it, and where one does the
    sides disagree. It does not count where a value is rounded to float32 on its way, which would hide what the step
    changes: the loss itself must then change as its gradient says.

    Args:
        claimed: The derivative by autograd.
        at: t -> a loss and f(t), tensors of the shapes of the derivative; None is zero.
        slope: The derivative of that loss along t, by its gradient; None if there is no loss to look at.
        fine: Whether to take fine steps.
        coarse: Whether to take coarse ones, as in float32, if the fine ones say nothing.
    """
    value, middle = at(0.0)
    for steps, sides_agree, tolerance in ((_FINE if fine else (), 1e-2, 1e-3), (_COARSE if coarse else (), 0.1, 0.05)):
        before: list[Tensor | None] | None = None  # the difference with another step
        for step in steps:
            (high, up), (low, down) = at(step), at(-step)
            if slope is not None and steps is _FINE and not _is_smooth(value, high, low, step, slope):
                break
            central = [d if d is None else d / (2 * step) for d in _differences(up, down)]
            apart = [
                norm([d]) / step for d in _differences(_differences(up, middle), _differences(middle, down))
            ]  # of the one-sided differences
            del up, down
            size = max(norm(central), norm(claimed))
            if not size:
                return None
            if not math.hypot(*apart) <= sides_agree * size:
                before = None
                continue
            found = _compared(claimed, central, apart, size, tolerance, each=steps is _FINE)
            if found.relative <= found.bound:
                return found
            if before is not None and norm(_differences(central, before)) <= 2 * sides_agree * size:
                return found
            before = central
    return None


def _compared(
    claimed: Sequence[Tensor | None],
    central: Sequence[Tensor | None],
    apart: Sequence[float],
    size: float,
    tolerance: float,
    each: bool,
) -> Disagreement:
    """Compare all tensors together and, if `each`, also those that are not small by themselves."""
    rests = [norm([rest]) for rest in _differences(claimed, central)]
    worst = sorted(range(len(rests)), key=lambda i: -rests[i])[:3]
    whole = Disagreement(math.hypot(*rests) / size, tolerance + 2 * math.hypot(*apart) / size, worst)
    for i in range(len(rests)) if each and whole.relative <= whole.bound else ():
        own = max(norm([claimed[i]]), norm([central[i]]))
        if own > 1e-6 * size and rests[i] > 10 * (tolerance * own + 2 * apart[i]):
            return Disagreement(rests[i] / own, tolerance, [i])
    return whole


def _is_smooth(value: float, high: float, low: float, step: float, slope: float) -> bool:
    """Return whether a loss changes as its slope says, as it does not where it is rounded more coarsely."""
    right, left = (high - value) / step, (value - low) / step
    allowed = _SMOOTH * (abs(value) + abs(slope))
    return abs(right - left) <= allowed and abs(right + left - 2 * slope) <= 2 * allowed


def _differences(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(map(_dense, a), map(_dense, b), strict=True)
    return [(-y if y is not None else None) if x is None else (x if y is None else x - y) for x, y in pairs]


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_dense() if tensor is not None and tensor.layout != torch.strided else tensor


def norm(parts: Sequence[Tensor | None]) -> float:
    """Return the Euclidean norm of the numbers in some tensors together; None is zero."""
    return math.hypot(0.0, *(float(part.detach().double().norm()) for part in parts if part is not None))


class Jacobian:
    """The Jacobian J = ∂output/∂parameters, at the point where the output was computed; it keeps the graph.

    Args:
        output: The output, with a graph.
        parameters: The parameters to differentiate by.

    Raises:
        NoSecondDerivative: if the backward pass of an operation cannot be differentiated.
    """

    def __init__(self, output: Tensor, parameters: Sequence[Tensor]):
        self.output, self.parameters = output, parameters
        self._u = torch.ones_like(output, requires_grad=True)
        with second_derivative_errors(), nothing_dropped(output):
            self._pulled = torch.autograd.grad(output, parameters, self._u, create_graph=True, allow_unused=True)

    def matvec(self, parts: Sequence[Tensor]) -> Tensor:
        """Return J v, in the shape of the output."""
        pairs = [(g, v) for g, v in zip(self._pulled, parts, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.output)
        outputs, directions = zip(*pairs, strict=True)
        with second_derivative_errors():
            return torch.autograd.grad(outputs, self._u, directions, retain_graph=True)[0]

    def rmatvec(self, u: Tensor, keep: bool) -> Sequence[Tensor | None]:
        """Return Jᵀ u in the shapes of the parameters; the graph is freed unless `keep`."""
        return torch.autograd.grad(self.output, self.parameters, u, retain_graph=keep, allow_unused=True)


class OutsideModule(ValueError):
    """Raised where a loss uses a parameter without its module, so that it cannot be computed at another value."""


class NoSecondDerivative(ValueError):
    """Raised where an operation of the loss has no derivative of the kind that is needed."""


@contextmanager
def second_derivative_errors() -> Iterator[None]:
    """Re-raise autograd's errors about a missing second derivative, with advice.

    Raises:
        NoSecondDerivative: in place of such an error.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise _refusal(str(error).splitlines()[0].rstrip(".")) from error


@contextmanager
def nothing_dropped(loss: Tensor) -> Iterator[None]:
    """Refuse gradients, taken inside, that pass through a Python function whose backward pass leaves no graph.

    Autograd raises only for a function marked once_differentiable, and only if the incoming gradient depends on
    something; otherwise it silently treats the function as a linear one.

    Args:
        loss: The tensor whose gradient is taken inside.

    Raises:
        NoSecondDerivative: if there was such a function.
    """
    found: list[str] = []

    def watch(node: Any) -> RemovableHandle:
        name = type(node).__name__.removesuffix("Backward")
        if _is_marked(node):
            return node.register_prehook(lambda _: found.append(f"{name} is marked once_differentiable"))

        def check(leaving: Sequence[Tensor | None], coming: Sequence[Tensor | None]) -> None:
            sources = (*coming, *(node.saved_tensors if hasattr(node, "saved_tensors") else ()))
            curved = any(t is not None and t.requires_grad for t in sources)
            if curved and any(t is not None and not t.requires_grad and t.any() for t in leaving):
                found.append(f"the backward pass of {name} leaves no graph")

        return node.register_hook(check)

    hooks = [watch(node) for node in graph_nodes(loss) if isinstance(node, BackwardCFunction)]
    yield
    for hook in hooks:
        hook.remove()
    if found:
        raise _refusal(found[0])


def _is_marked(node: Any) -> bool:
    return getattr(node._forward_cls.backward, "__code__", None) is _MARKED


def _refusal(what: str) -> NoSecondDerivative:
    return NoSecondDerivative(
        f"the loss has an operation that PyTorch cannot differentiate twice: {what}. "
        'Replace it by plain operations, leave out the parameters before it with parameters="...", or, if the loss '
        'is smooth, use finite differences (hvp="finite_differences").'
    )


def nowhere_else(output: Tensor, tensors: Sequence[Tensor]) -> None:
    """Refuse an output that was computed, under `swap_tensors`, from one of the replaced tensors themselves.

    Args:
        output: The output, with a graph.
        tensors: The tensors that were replaced.

    Raises:
        OutsideModule: if one of them is in the graph of the output.
    """
    replaced = {id(tensor) for tensor in tensors}
    if any(id(getattr(node, "variable", None)) in replaced for node in graph_nodes(output)):
        raise OutsideModule(
            "the loss uses a parameter without its module, by a closure or an attribute such as a tuple or dict, so "
            "that it cannot be computed at other values. Use parameters through modules, or float32 and "
            "hvp='double_backward'."
        )


def functions_in(output: Tensor) -> list[str]:
    """Return the names of the custom autograd functions in a tensor's graph, those of torch and of this package not."""
    classes = {node._forward_cls for node in graph_nodes(output) if isinstance(node, BackwardCFunction)}  # type: ignore[attr-defined]
    own = ("torch.", __name__.partition(".")[0])
    return sorted(one.__name__ for one in classes if not one.__module__.startswith(own))


def has_kinks(output: Tensor) -> bool:
    """Return whether a tensor's graph has operations with kinks, as far as their names tell."""
    return any(type(node).__name__.startswith(_KINKS) for node in graph_nodes(output))


def graph_nodes(output: Tensor) -> Iterator[object]:
    """Yield the nodes of a tensor's graph, each once."""
    nodes: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            yield node
