"""The user's own optimizer and schedulers, put to work on w in place of the parameters that w moves.

What `configure_optimizers` returns is kept, objects and all, so that any scheduler goes on as it is; only the contents
of the optimizer's groups are exchanged. The rate of w is multiplied while a step is done, and at no other time:
schedulers that set absolute rates would undo it.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

_USUAL = 3e-3
_OWN = ("params", "param_names", "weight_decay")


class Recipe:
    """An optimizer on w.

    Args:
        configured: what `configure_optimizers` returned; changed in place.
        moved: the parameters that w moves.
        w: what is trained for them.
        lr_scale: factor for the rate of w.
        weight_decay: of w; None is none at all.

    Raises:
        MisconfigurationException: if there are several optimizers, or groups with different options.
    """

    def __init__(
        self,
        configured: Any,
        moved: Sequence[Tensor],
        w: Sequence[Tensor],
        lr_scale: float,
        weight_decay: float | int | None,
    ):
        self.w, self.lr_scale = list(w), lr_scale
        found = list({id(optimizer): optimizer for optimizer in _optimizers(configured)}.values())
        if len(found) != 1:
            raise MisconfigurationException(
                f"configure_optimizers made {len(found)} optimizers, w can be trained by one; pass "
                "SubspaceModule(optimizer_fn=lambda params: torch.optim.Adam(params, lr=0.03))."
            )
        (optimizer,) = found
        self.optimizer = optimizer
        options = [{k: v for k, v in group.items() if k not in _OWN} for group in optimizer.param_groups]
        different = {k for k in options[0] if any(other.get(k) != options[0][k] for other in options)}
        if different:
            raise MisconfigurationException(
                f"the groups of parameters in configure_optimizers differ in {', '.join(sorted(different))}, and w "
                "belongs to all of them at once; pass SubspaceModule(optimizer_fn=lambda params: "
                "torch.optim.Adam(params, lr=0.03)), or choose parameters of one group with parameters='...'."
            )
        self.decay = 0.0 if weight_decay is None else weight_decay
        if weight_decay is None and any(group.get("weight_decay") for group in optimizer.param_groups):
            rank_zero_info(
                "weight decay on w would pull the weights back to where they started: off, unless "
                "weight_decay=... is given."
            )
        taken = {id(parameter) for parameter in moved}
        for number, group in enumerate(optimizer.param_groups):
            kept = [parameter for parameter in group["params"] if id(parameter) not in taken]
            group["params"][:] = [*(self.w if number == 0 else ()), *kept]  # in place: LBFGS holds this very list
            group.pop("param_names", None)
        _warn_if_slow(optimizer, lr_scale)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """The optimizer with a group of its own for w, at its rate and decay."""
        groups = self.optimizer.param_groups
        before = list(groups)
        own = {id(tensor) for tensor in self.w}
        with_w = {**before[0], "params": self.w, "lr": before[0]["lr"] * self.lr_scale}
        if "weight_decay" in with_w:
            with_w["weight_decay"] = self.decay
        others = [{**g, "params": [p for p in g["params"] if id(p) not in own]} for g in before]
        groups[:] = [with_w, *(g for g in others if g["params"])]  # in place: Lightning's own wrapper holds this list
        try:
            yield
        finally:
            groups[:] = before


def _warn_if_slow(optimizer: Optimizer, lr_scale: float) -> None:
    """Adam moves θ by lr √n a step, which in a subspace has to be some ten times longer than usual."""
    group = optimizer.param_groups[0]
    lr = max(float(group.get(key, 0)) for key in ("lr", "initial_lr", "max_lr")) * lr_scale
    if "adam" in type(optimizer).__name__.lower() and lr < _USUAL:
        warnings.warn(
            f"w is trained at a learning rate of {lr:g}; in a subspace rates of 0.01 to 0.1 are usual, about ten times "
            f"those of full training. Pass SubspaceModule(lr_scale={10 * lr_scale:g}).",
            stacklevel=2,
        )


def _optimizers(configured: Any) -> Iterator[Optimizer]:
    """All optimizers in whatever `configure_optimizers` may return."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from _optimizers(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for part in configured:
            yield from _optimizers(part)
