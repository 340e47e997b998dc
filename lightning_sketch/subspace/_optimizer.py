"""The module's own optimizer and schedulers, applied to w in place of the parameters that w determines.

The objects that `configure_optimizers` returns are kept, so that every scheduler keeps working; only the contents of
the optimizer's param groups are exchanged. The learning rate of w is multiplied by `lr_scale` during the optimizer's
step alone, and not while its closure runs: schedulers and modules that set absolute rates would overwrite it.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.optim import LBFGS, Optimizer

INFO_CACHE = WarningCache()  # what has been logged once; tests clear it
_USUAL_RATE = 3e-3
_MAY_DIFFER = ("params", "param_names", "weight_decay")  # keys in which param groups may differ
_ADVICE = "SubspaceModule(optimizer_fn=lambda params: torch.optim.Adam(params, lr=0.03))"


class OptimizerProxy:
    """Make an optimizer that was configured for the weights train w.

    Args:
        configured: The return value of `configure_optimizers`; changed in place.
        weights: The parameters that w determines, by name.
        w: The blocks of w, which are trained instead.
        lr_scale: The factor for the learning rate of w.
        weight_decay: The weight decay of w; None is 0, whatever the optimizer's is.

    Raises:
        MisconfigurationException: If there are several optimizers, param groups with different options, or no learning
            rate; if the optimizer omits some of the weights.
    """

    def __init__(
        self,
        configured: Any,
        weights: Mapping[str, Tensor],
        w: Sequence[Tensor],
        lr_scale: float,
        weight_decay: float | int | None,
    ):
        self.w, self.lr_scale = list(w), lr_scale
        self.decay = 0.0 if weight_decay is None else weight_decay
        self.optimizer = _only(optimizers_in(configured))
        chosen = _groups_of(self.optimizer, weights, self.w)
        if weight_decay is None and any(group.get("weight_decay") for group in chosen):
            INFO_CACHE.info(
                "weight decay on w would pull the weights back to their initial values, so it is off; pass "
                "weight_decay=... to switch it on."
            )
        _warn_if_slow(self.optimizer, chosen[0], lr_scale)
        self._index = [id(group) for group in self.optimizer.param_groups].index(id(chosen[0]))
        taken = {id(parameter) for parameter in [*weights.values(), *self.w]}
        for group in chosen:
            kept = [parameter for parameter in group["params"] if id(parameter) not in taken]
            if kept and isinstance(self.optimizer, LBFGS):
                raise MisconfigurationException(
                    "LBFGS has one learning rate, but w and the other parameters need two; use others='frozen', or "
                    "another optimizer."
                )
            # in place, since LBFGS keeps a reference to this list
            group["params"][:] = [*(self.w if group is chosen[0] else ()), *kept]
            group.pop("param_names", None)
        self._depth = 0
        self._groups: list[dict[str, Any]] = []
        self._step_groups: list[_StepGroup] = []
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)

    def groups(self) -> list[dict[str, Any]]:
        """Return the param groups that a step uses: w in a group of its own, with its own rate and weight decay."""
        return [group.now for group in self._step_groups or self._divided()]

    def _divided(self) -> "list[_StepGroup]":
        """Copy the optimizer's param groups, and move w to a group of its own."""
        own = {id(tensor) for tensor in self.w}
        groups = self.optimizer.param_groups
        source = groups[self._index]
        with_w = {**source, "params": self.w, "lr": source["lr"] * self.lr_scale}
        if "weight_decay" in with_w:
            with_w["weight_decay"] = self.decay
        others = [({**g, "params": [p for p in g["params"] if id(p) not in own]}, g) for g in groups]
        # what is written to the rest of the source group is dropped: the group keeps what is written for w
        rest = [(now, {} if group is source else group) for now, group in others if now["params"]]
        return [_StepGroup(now, dict(now), group) for now, group in [(with_w, source), *rest]]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._depth += 1
        if self._depth > 1:  # a subclass that calls the step of its base class
            return None
        self._open()
        if len(args) > 1:
            return (args[0], self._with_own_groups(args[1]), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._with_own_groups(kwargs["closure"])} if "closure" in kwargs else kwargs

    def _after_step(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.close()

    def _with_own_groups(self, closure: Any) -> Any:
        """Wrap a closure so that it runs with the optimizer's own param groups."""
        if not callable(closure):
            return closure

        @functools.wraps(closure, updated=())
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            depth, step_groups = self._depth, self._step_groups
            self.close()
            value = closure(*args, **kwargs)
            self._open(step_groups)
            self._depth = depth
            return value

        return wrapped

    def _open(self, earlier: "Sequence[_StepGroup]" = ()) -> None:
        """Replace the optimizer's param groups by those of a step, which reuse the dicts of `earlier`."""
        self._groups, self._step_groups = list(self.optimizer.param_groups), self._divided()
        for number, (old, group) in enumerate(zip(earlier, self._step_groups, strict=False)):
            old.now.clear()  # the same dict, since an optimizer may keep a reference to it while its closure runs
            old.now.update(group.now)
            self._step_groups[number] = group._replace(now=old.now)
        self.optimizer.param_groups[:] = self.groups()  # in place, since Lightning's wrapper refers to this list

    def close(self) -> None:
        """Restore the optimizer's param groups, with what its step wrote into them; do nothing between steps."""
        for now, before, group in self._step_groups:
            for key, value in now.items():
                if value is not before.get(key):
                    group[key] = value / self.lr_scale if key == "lr" and now["params"] is self.w else value
        self.optimizer.param_groups[:] = self._groups or self.optimizer.param_groups
        self._groups, self._step_groups, self._depth = [], [], 0


class _StepGroup(NamedTuple):
    """A param group during a step.

    Attributes:
        now: The group that the step sees.
        before: A copy of its entries at the start of the step.
        group: The optimizer's own group, which gets what the step changes.
    """

    now: dict[str, Any]
    before: dict[str, Any]
    group: dict[str, Any]


def refuse_late(trainable: Mapping[str, Tensor]) -> None:
    """Check that no parameter became trainable after the module was wrapped.

    Args:
        trainable: The trainable parameters outside w, by name.

    Raises:
        MisconfigurationException: If there are any.
    """
    if trainable:
        raise MisconfigurationException(
            f"{_some(list(trainable))} became trainable after the module was wrapped, perhaps in setup() or by "
            "unfreeze(); make layers in __init__ or configure_model, or pass others='full'."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _only(found: Sequence[Optimizer]) -> Optimizer:
    if len(found) != 1:
        raise MisconfigurationException(
            f"configure_optimizers made {len(found)} optimizers, but w is trained by one; pass {_ADVICE}."
        )
    return found[0]


def _groups_of(optimizer: Optimizer, weights: Mapping[str, Tensor], w: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return the param groups that contain weights; check that they contain all of them and have the same options."""
    kind = type(optimizer).__name__
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if id(w[0]) in trained and not trained & {id(parameter) for parameter in weights.values()}:
        raise MisconfigurationException(
            f"configure_optimizers returned the same {kind} as before, which trains w already; make a new one each "
            "time."
        )
    left = [name for name, parameter in weights.items() if id(parameter) not in trained]
    if left:
        raise MisconfigurationException(
            f"w moves {len(left)} parameters that the {kind} of configure_optimizers does not train: {_some(left)}; "
            f"choose those that it trains with parameters='...', or pass {_ADVICE}."
        )
    taken = {id(parameter) for parameter in weights.values()}
    chosen = [group for group in optimizer.param_groups if any(id(parameter) in taken for parameter in group["params"])]
    options = [{k: v for k, v in group.items() if k not in _MAY_DIFFER} for group in chosen]
    different = {k for k in options[0] if any(other.get(k) != options[0][k] for other in options)}
    if different:
        raise MisconfigurationException(
            f"the param groups in configure_optimizers differ in {', '.join(sorted(different))}, and w belongs to all "
            f"of them at once; pass {_ADVICE}, or choose parameters of one group with parameters='...'."
        )
    if options[0].get("lr") is None:
        raise MisconfigurationException(
            f"the {kind} of configure_optimizers has no learning rate for lr_scale to multiply; pass {_ADVICE}."
        )
    return chosen


def _warn_if_slow(optimizer: Optimizer, group: Mapping[str, Any], lr_scale: float) -> None:
    """Warn of a small learning rate of Adam: a step has length lr √n in θ, and in a subspace it has to be longer."""
    lr = max(float(group.get(key, 0)) for key in ("lr", "initial_lr", "max_lr")) * lr_scale
    if "adam" in type(optimizer).__name__.lower() and lr < _USUAL_RATE:
        warnings.warn(
            f"w is trained at a learning rate of {lr:g}; in a subspace rates of 0.01 to 0.1 are usual, about ten times "
            f"those of full training. Pass SubspaceModule(lr_scale={10 * lr_scale:g}).",
            stacklevel=2,
        )


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return all optimizers, each once, in any return value that `configure_optimizers` may have."""
    if isinstance(configured, Optimizer):
        return [configured]
    parts = [configured.get("optimizer")] if isinstance(configured, dict) else configured
    found = [one for part in parts for one in optimizers_in(part)] if isinstance(parts, list | tuple) else []
    return list({id(optimizer): optimizer for optimizer in found}.values())
