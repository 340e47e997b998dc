"""The module's own optimizer, for w in place of the weights that w determines.

The objects that `configure_optimizers` returns are kept, so that every scheduler keeps working; only w takes the place
of the weights in the optimizer's param groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.optim import SGD, Optimizer

INFO_CACHE = WarningCache()  # what has been logged once; tests clear it
_MAY_DIFFER = ("params", "param_names", "weight_decay")  # keys in which param groups may differ
_ADVICE = "SubspaceModule(optimizer_fn=lambda params: torch.optim.Adam(params, lr=0.03))"


def train_w(
    configured: Any, weights: Mapping[str, Tensor], w: Sequence[Tensor], weight_decay: float | int | None
) -> "OwnDecay | None":
    """Put w in the place of weights in an optimizer that was configured for them.

    Args:
        configured: The return value of `configure_optimizers`; changed in place.
        weights: The parameters that w determines, by name.
        w: The blocks of w, which are trained instead.
        weight_decay: The weight decay of w; None is 0, whatever the optimizer's is.

    Returns:
        What gives w its own weight decay during steps, if other parameters are in its group.

    Raises:
        MisconfigurationException: If there are several optimizers, or param groups with different options; if the
            optimizer omits some of the weights.
    """
    optimizer = only(optimizers_in(configured))
    chosen = _groups_of(optimizer, weights, w)
    if weight_decay is None and any(group.get("weight_decay") for group in chosen):
        INFO_CACHE.info(
            "weight decay on w would pull the weights back to their initial values, so it is off; pass "
            "weight_decay=... to the wrapper to switch it on."
        )
    decay = 0.0 if weight_decay is None else weight_decay
    taken = {id(tensor) for tensor in [*weights.values(), *w]}
    own: OwnDecay | None = None
    for group in chosen:
        kept = [parameter for parameter in group["params"] if id(parameter) not in taken]
        # in place, since LBFGS keeps a reference to this list
        group["params"][:] = [*(w if group is chosen[0] else ()), *kept]
        group.pop("param_names", None)
        if group is chosen[0] and not kept and "weight_decay" in group:
            group["weight_decay"] = decay
        elif group is chosen[0] and group.get("weight_decay", decay) != decay:
            index = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
            own = OwnDecay(optimizer, index, w, decay)
    return own


class OwnDecay:
    """Give w a weight decay of its own in a param group that holds others too, during each step.

    Schedulers count groups, so that w gets a group of its own only for as long as a step takes.
    """

    def __init__(self, optimizer: Optimizer, index: int, w: Sequence[Tensor], decay: float):
        self.index, self.w, self.decay = index, list(w), decay
        self.whole: dict[str, Any] | None = None
        optimizer.register_step_pre_hook(self.divide)
        optimizer.register_step_post_hook(self.join)

    def divide(self, optimizer: Optimizer, *_: Any) -> None:
        """Move w out of its group."""
        if self.whole is not None:  # a step within a step, or one after a step that failed
            self.join(optimizer)
        self.whole, own = optimizer.param_groups[self.index], set(map(id, self.w))
        rest = {**self.whole, "params": [p for p in self.whole["params"] if id(p) not in own]}
        of_w = {**self.whole, "params": self.w, "weight_decay": self.decay}
        optimizer.param_groups[self.index : self.index + 1] = [rest, of_w]

    def join(self, optimizer: Optimizer, *_: Any) -> None:
        """Move w back, and keep what the step wrote into the group."""
        if self.whole is None:
            return
        rest = optimizer.param_groups[self.index]
        self.whole.update({key: value for key, value in rest.items() if key != "params"})
        optimizer.param_groups[self.index : self.index + 2] = [self.whole]
        self.whole = None


def scale_of_rate(optimizer: Optimizer, lr_scale: float | int) -> float:
    """Return the factor of D that has the effect of a learning rate of w that is `lr_scale` times the optimizer's.

    The gradient of w grows as D does. Adam divides by it, so that θ moves c times as far for a factor c; SGD multiplies
    by it, so that θ moves c² times as far. RAdam does the one after it has done the other.

    Raises:
        MisconfigurationException: If the optimizer is of another family.
    """
    kind = type(optimizer).__name__.lower()
    if lr_scale == 1 or ("adam" in kind and "radam" not in kind):
        return float(lr_scale)
    if isinstance(optimizer, SGD):
        return float(lr_scale) ** 0.5
    raise MisconfigurationException(
        f"lr_scale={lr_scale:g} is known as a factor of the directions for Adam and SGD, not for "
        f"{type(optimizer).__name__}; pass scale=..., which multiplies the directions, or set the rate in optimizer_fn."
    )


def refuse_late(trainable: Sequence[str]) -> None:
    """Check that no parameter became trainable after the module was wrapped.

    Args:
        trainable: The names of the trainable parameters outside w.

    Raises:
        MisconfigurationException: If there are any.
    """
    if trainable:
        raise MisconfigurationException(
            f"{_some(trainable)} became trainable after the module was wrapped, perhaps in setup() or by "
            "unfreeze(); make layers in __init__ or configure_model, or pass others='full'."
        )


def refuse_in_groups(optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Let an optimizer refuse the weights that w determines, as from a callback that unfreezes layers."""
    ids = {id(parameter): name for name, parameter in weights.items()}
    add = optimizer.add_param_group

    def add_others(group: dict[str, Any]) -> None:
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        found = [ids[id(p)] for p in given if id(p) in ids]
        if found:
            raise MisconfigurationException(
                f"{_some(found)} cannot be added to the optimizer, since w moves them; a layer moves again as soon as "
                "requires_grad_(True) is called, without a param group of its own."
            )
        add({**group, "params": given})

    optimizer.__dict__["add_param_group"] = add_others


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def only(found: Sequence[Optimizer]) -> Optimizer:
    """Return the only optimizer of several.

    Raises:
        MisconfigurationException: If there is none, or more than one.
    """
    if len(found) != 1:
        raise MisconfigurationException(
            f"configure_optimizers made {len(found)} optimizers, but w is trained by one; pass {_ADVICE}."
        )
    return found[0]


def _groups_of(optimizer: Optimizer, weights: Mapping[str, Tensor], w: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return the param groups that contain weights; check that they contain all of them and have the same options.

    An optimizer of the wrapper's parameters, as LightningCLI makes, contains w instead.
    """
    kind = type(optimizer).__name__
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    of_w = {id(block) for block in w} <= trained
    taken = {id(parameter) for parameter in (w if of_w else weights.values())}
    missing = {} if of_w else {name: p for name, p in weights.items() if id(p) not in trained}
    frozen = set() if len(missing) == len(weights) else {name for name, p in missing.items() if not p.requires_grad}
    left = [name for name in missing if name not in frozen]
    if left:
        raise MisconfigurationException(
            f"w moves {len(left)} parameters that the {kind} of configure_optimizers does not train: {_some(left)}; "
            f"choose those that it trains with parameters='...', or pass {_ADVICE}."
        )
    chosen = [group for group in optimizer.param_groups if any(id(parameter) in taken for parameter in group["params"])]
    options = [{k: v for k, v in group.items() if k not in _MAY_DIFFER} for group in chosen]
    different = {k for k in options[0] if any(other.get(k) != options[0][k] for other in options)}
    if different:
        raise MisconfigurationException(
            f"the param groups in configure_optimizers differ in {', '.join(sorted(different))}, and w belongs to all "
            f"of them at once; pass {_ADVICE}, or choose parameters of one group with parameters='...'."
        )
    return chosen


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return all optimizers, each once, in any return value that `configure_optimizers` may have."""
    if isinstance(configured, Optimizer):
        return [configured]
    parts = [configured.get("optimizer")] if isinstance(configured, dict) else configured
    found = [one for part in parts for one in optimizers_in(part)] if isinstance(parts, list | tuple) else []
    return list({id(optimizer): optimizer for optimizer in found}.values())
