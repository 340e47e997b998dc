"""Say which operation has no second derivative, and what to do about it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_SIGNS = ("is not implemented", "once_differentiable", "does not have a double backward", "not supported")


@contextmanager
def second_derivative_errors(outputs: Sequence[Tensor | None]) -> Iterator[None]:
    """Re-raise what autograd says of a missing second derivative, with the operation's name in front."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise ValueError(
            f"the loss holds an operation that PyTorch cannot differentiate twice: {_name(error, outputs)}. "
            'Replace it by plain operations, or leave the parameters before it out with parameters="...".'
        ) from error


def _name(error: RuntimeError, outputs: Sequence[Tensor | None]) -> str:
    """What the error names; for a Python function marked once_differentiable it names nothing, so search."""
    if "once_differentiable" not in str(error):
        return str(error).splitlines()[0]
    nodes = [tensor.grad_fn for tensor in outputs if tensor is not None]
    seen, custom = set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            custom.add(type(node).__name__.removesuffix("Backward"))
        nodes += [following for following, _ in node.next_functions]
    return f"one of {', '.join(sorted(custom))}, marked once_differentiable" if custom else str(error)
