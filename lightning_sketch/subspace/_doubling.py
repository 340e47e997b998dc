"""How w grows during a search: the sizes of its blocks, and the optimizer's state at a doubling.

At a doubling D shrinks by √½ and w grows by √2, so that θ stays the same. The gradient of w shrinks as D does, and each
entry of the optimizer's state must shrink by the power of the gradient that it contains. New coordinates start without
state and with a step count of zero: with the old count Adam would omit the bias correction of its first averages, and
step too far. Therefore each doubling adds a block, a parameter with a state of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

# The power of the gradient in each entry of the state of torch.optim's Adam, AdamW, NAdam, RAdam, Adamax, SGD, RMSprop
# and Adagrad.
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
_COUNTS = ("step", "mu_product")


def block_sizes(dim: int, max_dim: int | None) -> list[int]:
    """Return the sizes of the blocks of w: `dim`, then one block for each doubling, `max_dim` in all."""
    sizes, largest = [dim], max_dim or dim
    while sum(sizes) < largest:
        sizes.append(min(sum(sizes), largest - sum(sizes)))
    return sizes


@torch.no_grad()
def carry_over(optimizer: Optimizer, old: Sequence[Tensor], new: Sequence[Tensor], factor: float | Tensor) -> None:
    """Rescale the optimizer's state of the old blocks of w, and delete that of the new ones.

    The whole state of an old block is deleted if it has entries of an unknown kind; the optimizer then restarts from
    the current weights.

    Args:
        optimizer: The optimizer of w; its state is changed in place.
        old: The blocks that were in use before the doubling.
        new: The other blocks.
        factor: What the gradients of the old blocks are multiplied by from now on, or one number for each entry.
    """
    for block in new:
        optimizer.state.pop(block, None)
    for block in old:
        state = optimizer.state.get(block, {})
        tensors = {name for name, value in state.items() if isinstance(value, Tensor) and value.shape == block.shape}
        if tensors <= _POWERS.keys() and state.keys() <= {*_POWERS, *_COUNTS}:
            for name in tensors - ({"momentum_buffer"} if "square_avg" in state else set()):  # RMSprop's is of g / √v
                state[name] *= factor ** _POWERS[name]
        else:
            optimizer.state.pop(block, None)
