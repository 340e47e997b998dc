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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

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
    """Return v -> H v from two gradients, `step` to either side along v / ||v||.

    Args:
        loss_now: The loss at the present parameters.
        module: The module that has the parameters.
        parameters: The parameters to differentiate by.
        step: The distance ε of either side.

    The product raises ValueError if the loss does not get its parameters through the module.
    """

    def gradient(parts: Sequence[Tensor], t: float) -> Sequence[Tensor | None]:
        moved = [torch.add(p.detach(), v, alpha=t).requires_grad_() for p, v in zip(parameters, parts, strict=True)]
        with swap_tensors(module, parameters, moved):
            loss = loss_now()
            nowhere_else(loss, parameters)
            return torch.autograd.grad(loss, moved, allow_unused=True)

    def product(parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        size = float(torch.stack([v.double().square().sum() for v in parts]).sum().sqrt())
        if not size:
            return [None] * len(parts)
        sides = zip(gradient(parts, step / size), gradient(parts, -step / size), strict=True)
        return [None if up is None else (up - cast(Tensor, down)) * (size / (2 * step)) for up, down in sides]

    return product


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
        ValueError: if one of them is in the graph of the output.
    """
    replaced = {id(tensor) for tensor in tensors}
    if any(id(getattr(node, "variable", None)) in replaced for node in graph_nodes(output)):
        raise ValueError(
            "the loss uses a parameter without its module, by a closure or an attribute such as a tuple or dict, so "
            "that it cannot be computed at other values. Use parameters through modules, or float32 and "
            "hvp='double_backward'."
        )


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
