"""The gradient of a loss by parameters: whole, or of one parameter after the other, as the backward pass reaches them.

Neither writes to `.grad`, nor calls the hooks of what does, by which DistributedDataParallel averages over ranks.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch._private import required
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators._hadamard import group_size
from lightning_sketch.operators.sketch import Sketch

# Gradients of so many numbers in all are held until the pass is done: hooks on small parameters would take longer.
_HELD = 1 << 23

# Else so many numbers are sketched at once, and so many chunks: a call sums a few chunks more, and fills two in part.
_SKETCHED, _CHUNKS = 1 << 22, 32


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the gradients of a loss by the names of the parameters; None where it does not depend on one."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def visit_gradients(
    loss: Tensor, parameters: Mapping[str, Tensor], visit: Callable[[str, Tensor], object], hold: int = _HELD
) -> list[str]:
    """Compute the gradient of one parameter after the other, in one backward pass, and hold none of them.

    Args:
        loss: The loss, whose graph is freed.
        parameters: The parameters, by name, each of them once.
        visit: Called as visit(name, gradient) for one parameter at a time, when the pass has all of its gradient; not
            for a parameter that the loss does not depend on.
        hold: Gradients of so many numbers together are held until the pass is done, which is faster.

    Returns:
        The names of the parameters that have a gradient, in their order.

    >>> w, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> visit_gradients((w * w).sum(), {"w": w, "b": b}, print)
    w tensor([2., 2.])
    ['w']
    """
    if sum(parameter.numel() for parameter in parameters.values()) <= hold:
        found = {name: g for name, g in gradients_of(loss, parameters).items() if g is not None}
        for name, gradient in found.items():
            visit(name, gradient)
        return list(found)
    number_of_pass, lock = required(torch._C, "_current_graph_task_id"), threading.Lock()
    own: list[int] = []
    visited: set[str] = set()

    def act(name: str, nothing: Tensor, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or number_of_pass() != own[0]:  # a pass inside this one, whose result it needs
            return None
        with lock:  # each device has a thread
            visited.add(name)
            visit(name, gradient)
        return nothing if gradient.layout == torch.strided else torch.zeros_like(gradient)

    handles = [loss.register_hook(lambda _: own.append(number_of_pass()))] if loss.requires_grad else []
    try:
        for name, parameter in parameters.items():
            # What autograd holds until the end is what hooks return: one number each.
            nothing = parameter.detach().new_zeros(()).expand_as(parameter)
            handles.append(parameter.register_hook(partial(act, name, nothing)))
        gradients_of(loss, parameters)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in parameters if name in visited]


def sketched_gradient(
    loss: Tensor, parameters: Mapping[str, Tensor], layout: Layout, sketch: Sketch
) -> Float[Tensor, " dim"]:
    """Return the sketch of the gradient of a loss, as `layout.sketch` does of given gradients.

    Scratch memory, if the sketch streams and n is above 2^23: the largest parameter, and as many numbers again, or 2^22
    (2^24 on a GPU) or 32 dim if that is more. Else n numbers.

    Args:
        loss: The loss, whose graph is freed.
        parameters: The parameters to differentiate by, by their names in the layout; all others count as zero.
        layout: Where in the flat vector each parameter lies.
        sketch: The sketch, of vectors of the layout's size.
    """
    total: Tensor | None = None
    waiting, size = dict[str, Tensor](), 0
    sizes = [parameter.numel() for parameter in parameters.values()]
    most = max(*sizes, _SKETCHED, group_size(loss.device), _CHUNKS * getattr(sketch, "chunk", 1))

    def flush() -> None:
        nonlocal total, size
        found = layout.sketch(sketch, waiting)
        total = found if total is None else total + found.to(total.device)
        waiting.clear()
        size = 0

    def add(name: str, gradient: Tensor) -> None:
        nonlocal size
        waiting[name] = gradient
        size += gradient.numel()
        if size >= most:
            flush()

    if not sketch.streams or sum(sizes) <= max(most, _HELD):
        return layout.sketch(sketch, gradients_of(loss, parameters))
    visit_gradients(loss, parameters, add)
    if waiting or total is None:
        flush()
    return cast(Tensor, total)
