"""The user's own optimizer and schedulers, put to work on w in place of the parameters that w moves.

What `configure_optimizers` returns is kept, objects and all, so that any scheduler goes on as it is; only the contents
of the optimizer's groups are exchanged. The rate of w is multiplied while the optimizer itself is at work, and at no
other time, not in the closure that it is given either: schedulers and modules that set absolute rates would undo it.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.optim import LBFGS, Optimizer

SAID = WarningCache()
_USUAL = 3e-3
_OWN = ("params", "param_names", "weight_decay")
_INSTEAD = "SubspaceModule(optimizer_fn=lambda params: torch.optim.Adam(params, lr=0.03))"


class OptimizerProxy:
    """An optimizer on w.

    Args:
        configured: what `configure_optimizers` returned; changed in place.
        moved: the parameters that w moves, by name.
        w: what is trained for them.
        lr_scale: factor for the rate of w.
        weight_decay: of w; None is none at all.

    Raises:
        MisconfigurationException: if there are several optimizers, groups with different options, or no learning rate;
            if it leaves out parameters that w moves.
    """

    def __init__(
        self,
        configured: Any,
        moved: Mapping[str, Tensor],
        w: Sequence[Tensor],
        lr_scale: float,
        weight_decay: float | int | None,
    ):
        self.w, self.lr_scale = list(w), lr_scale
        self.decay = 0.0 if weight_decay is None else weight_decay
        self.optimizer = _only(optimizers_in(configured))
        homes = _homes(self.optimizer, moved, self.w)
        if weight_decay is None and any(group.get("weight_decay") for group in homes):
            SAID.info(
                "weight decay on w would pull the weights back to where they started: off, unless "
                "weight_decay=... is given."
            )
        _warn_if_slow(self.optimizer, homes[0], lr_scale)
        self.home = [id(group) for group in self.optimizer.param_groups].index(id(homes[0]))
        taken = {id(parameter) for parameter in [*moved.values(), *self.w]}
        for group in homes:
            kept = [parameter for parameter in group["params"] if id(parameter) not in taken]
            if kept and isinstance(self.optimizer, LBFGS):
                raise MisconfigurationException(
                    "LBFGS has one rate for all, w and the others need two; use others='frozen', or another optimizer."
                )
            group["params"][:] = [*(self.w if group is homes[0] else ()), *kept]  # in place: LBFGS holds this very list
            group.pop("param_names", None)
        self._depth = 0
        self._groups: list[dict[str, Any]] = []
        self._parts: list[_Part] = []
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)

    def groups(self) -> list[dict[str, Any]]:
        """Replicas of the optimizer's groups as a step has them: w in one of its own, at its rate and decay."""
        return [part.now for part in self._parts or self._divided()]

    def _divided(self) -> "list[_Part]":
        own = {id(tensor) for tensor in self.w}
        groups = self.optimizer.param_groups
        home = groups[self.home]
        with_w = {**home, "params": self.w, "lr": home["lr"] * self.lr_scale}
        if "weight_decay" in with_w:
            with_w["weight_decay"] = self.decay
        others = [({**g, "params": [p for p in g["params"] if id(p) not in own]}, g) for g in groups]
        parts = [(with_w, home), *((now, {} if group is home else group) for now, group in others if now["params"])]
        return [_Part(now, dict(now), group) for now, group in parts]  # of their group what is written of w counts

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._depth += 1
        if self._depth > 1:  # the step of a class within that of one made from it
            return None
        self._open()
        if len(args) > 1:
            return (args[0], self._outside(args[1]), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._outside(kwargs["closure"])} if "closure" in kwargs else kwargs

    def _after_step(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.close()

    def _outside(self, closure: Any) -> Any:
        """One that sees the groups as they are outside."""
        if not callable(closure):
            return closure

        @functools.wraps(closure, updated=())
        def outside(*args: Any, **kwargs: Any) -> Any:
            depth, parts = self._depth, self._parts
            self.close()
            value = closure(*args, **kwargs)
            self._open(parts)
            self._depth = depth
            return value

        return outside

    def _open(self, earlier: "Sequence[_Part]" = ()) -> None:
        self._groups, self._parts = list(self.optimizer.param_groups), self._divided()
        for number, (old, part) in enumerate(zip(earlier, self._parts, strict=False)):
            old.now.clear()  # the same object: an optimizer may hold on to what it had before its closure
            old.now.update(part.now)
            self._parts[number] = part._replace(now=old.now)
        self.optimizer.param_groups[:] = self.groups()  # in place: Lightning's own wrapper holds this list

    def close(self) -> None:
        """The groups as they were, with what the optimizer wrote into them; nothing if no step is on."""
        for part in self._parts:
            for key, value in part.now.items():
                if value is not part.before.get(key):
                    part.group[key] = value / self.lr_scale if key == "lr" and part.now["params"] is self.w else value
        self.optimizer.param_groups[:] = self._groups or self.optimizer.param_groups
        self._groups, self._parts, self._depth = [], [], 0


class _Part(NamedTuple):
    """What a step has for a group, what it was at first, and the group itself."""

    now: dict[str, Any]
    before: dict[str, Any]
    group: dict[str, Any]


def refuse_late(trainable: Mapping[str, Tensor]) -> None:
    """Of what the wrapper froze nothing may be trainable now.

    Raises:
        MisconfigurationException: if something is.
    """
    if trainable:
        raise MisconfigurationException(
            f"{_some(list(trainable))} became trainable after the module was wrapped, in setup() or by unfreeze() "
            "perhaps; make layers in __init__ or configure_model, or pass others='full'."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _only(found: Sequence[Optimizer]) -> Optimizer:
    if len(found) != 1:
        raise MisconfigurationException(
            f"configure_optimizers made {len(found)} optimizers, w can be trained by one; pass {_INSTEAD}."
        )
    return found[0]


def _homes(optimizer: Optimizer, moved: Mapping[str, Tensor], w: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The groups of what moves; they must agree, and hold all of it."""
    kind = type(optimizer).__name__
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if id(w[0]) in trained and not trained & {id(parameter) for parameter in moved.values()}:
        raise MisconfigurationException(
            f"configure_optimizers gave the {kind} that it gave before, which is at work on w already; make a new one "
            "each time."
        )
    left = [name for name, parameter in moved.items() if id(parameter) not in trained]
    if left:
        raise MisconfigurationException(
            f"w moves {len(left)} parameters that {kind} of configure_optimizers does not train: {_some(left)}; choose "
            f"those that it trains with parameters='...', or pass {_INSTEAD}."
        )
    taken = {id(parameter) for parameter in moved.values()}
    homes = [group for group in optimizer.param_groups if any(id(parameter) in taken for parameter in group["params"])]
    options = [{k: v for k, v in group.items() if k not in _OWN} for group in homes]
    different = {k for k in options[0] if any(other.get(k) != options[0][k] for other in options)}
    if different:
        raise MisconfigurationException(
            f"the groups of parameters in configure_optimizers differ in {', '.join(sorted(different))}, and w "
            f"belongs to all of them at once; pass {_INSTEAD}, or choose parameters of one group with parameters='...'."
        )
    if options[0].get("lr") is None:
        raise MisconfigurationException(
            f"{kind} of configure_optimizers has no learning rate that lr_scale could multiply; pass {_INSTEAD}."
        )
    return homes


def _warn_if_slow(optimizer: Optimizer, group: Mapping[str, Any], lr_scale: float) -> None:
    """Adam moves θ by lr √n a step, which in a subspace has to be some ten times longer than usual."""
    lr = max(float(group.get(key, 0)) for key in ("lr", "initial_lr", "max_lr")) * lr_scale
    if "adam" in type(optimizer).__name__.lower() and lr < _USUAL:
        warnings.warn(
            f"w is trained at a learning rate of {lr:g}; in a subspace rates of 0.01 to 0.1 are usual, about ten times "
            f"those of full training. Pass SubspaceModule(lr_scale={10 * lr_scale:g}).",
            stacklevel=2,
        )


def optimizers_in(configured: Any) -> list[Optimizer]:
    """All optimizers in whatever `configure_optimizers` may return, each once."""
    if isinstance(configured, Optimizer):
        return [configured]
    parts = [configured.get("optimizer")] if isinstance(configured, dict) else configured
    found = [one for part in parts for one in optimizers_in(part)] if isinstance(parts, list | tuple) else []
    return list({id(optimizer): optimizer for optimizer in found}.values())
