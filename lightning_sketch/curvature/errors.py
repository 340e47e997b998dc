"""Say which operation has no second derivative, and what to do about it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils.hooks import RemovableHandle

from lightning_sketch.gradients import graph_nodes

_SIGNS = (
    "is not implemented",
    "does not have a double backward",
    "not supported",
    ".grad()",
    "cudnn RNN backward",
    "forward AD",
    "jvp",
)
_MARKED = once_differentiable(lambda ctx: None).__code__


class NoSecondDerivative(ValueError):
    """An operation of the loss has no derivative of that kind."""


@contextmanager
def second_derivative_errors() -> Iterator[None]:
    """Re-raise what autograd says of a missing second derivative, with a way out."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise _refusal(str(error).splitlines()[0].rstrip(".")) from error


@contextmanager
def nothing_dropped(loss: Tensor) -> Iterator[None]:
    """Refuse a gradient that is taken inside through a Python function whose backward pass leaves no graph.

    Autograd raises only for one marked once_differentiable, and only if the gradient that comes in at it depends on
    something; else the function is silently taken for a linear one.
    """
    met: list[str] = []

    def meet(node: BackwardCFunction) -> RemovableHandle:
        name = type(node).__name__.removesuffix("Backward")
        if _is_marked(node):
            return node.register_prehook(lambda _: met.append(f"{name} is marked once_differentiable"))

        def look(leaving: Sequence[Tensor | None], coming: Sequence[Tensor | None]) -> None:
            sources = (*coming, *(node.saved_tensors if hasattr(node, "saved_tensors") else ()))
            curved = any(t is not None and t.requires_grad for t in sources)
            if curved and any(t is not None and not t.requires_grad and t.any() for t in leaving):
                met.append(f"the backward pass of {name} leaves no graph")

        return node.register_hook(look)

    hooks = [meet(node) for node in graph_nodes(loss) if isinstance(node, BackwardCFunction)]
    yield
    for hook in hooks:
        hook.remove()
    if met:
        raise _refusal(met[0])


def _is_marked(node: BackwardCFunction) -> bool:
    return getattr(node._forward_cls.backward, "__code__", None) is _MARKED


def _refusal(what: str) -> NoSecondDerivative:
    return NoSecondDerivative(
        f"the loss holds an operation that PyTorch cannot differentiate twice: {what}. "
        'Replace it by plain operations, leave the parameters before it out with parameters="...", or, if the loss '
        'is smooth, take finite differences (hvp="finite_differences").'
    )
