"""Growth of w: in blocks with step counts of their own, and what an optimizer remembers carried over a doubling.

At a doubling D shrinks by √½ and w grows by √2, so that θ stays. The gradient of w shrinks as D does; so must what is
made of gradients, by the power of the gradient that it is. New coordinates start from nothing, with a step count of
their own: with the old count Adam would take its first averages for settled ones, and step too far.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

_POWERS = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "square_avg": 2,
    "sum": 2,
}
"""Of the gradient, in what torch.optim's Adam, AdamW, NAdam, RAdam, Adamax, SGD, RMSprop and Adagrad remember."""
_COUNTS = ("step", "mu_product")


def block_sizes(dim: int, max_dim: int | None) -> list[int]:
    """dim, and then as many as there are already, up to max_dim in all."""
    sizes, largest = [dim], max_dim or dim
    while sum(sizes) < largest:
        sizes.append(min(sum(sizes), largest - sum(sizes)))
    return sizes


@torch.no_grad()
def carry_over(optimizer: Optimizer, old: Sequence[Tensor], new: Sequence[Tensor], shrunk: float) -> None:
    """Rescale the state of the old blocks of w, whose gradients shrank by a factor; forget that of the new ones.

    A state of another kind is forgotten as a whole: the optimizer then starts anew from the present weights.
    """
    for block in new:
        optimizer.state.pop(block, None)
    for block in old:
        state = optimizer.state.get(block, {})
        tensors = {name for name, value in state.items() if isinstance(value, Tensor) and value.shape == block.shape}
        if tensors <= _POWERS.keys() and state.keys() <= {*_POWERS, *_COUNTS}:
            for name in tensors - ({"momentum_buffer"} if "square_avg" in state else set()):  # RMSprop's is of g / √v
                state[name] *= shrunk ** _POWERS[name]
        else:
            optimizer.state.pop(block, None)
