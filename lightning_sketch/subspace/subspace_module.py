"""Train a module in a random subspace of its weights: θ = θ₀ + Dᵀ w, and only w is trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import index
from typing import Any

import torch
from jaxtyping import Float
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch._lightning import LightningModule, unwrapped
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.functional import swap_tensors
from lightning_sketch.autodiff.losses import call_step
from lightning_sketch.subspace._doubling import block_sizes
from lightning_sketch.subspace._gradient import ExplicitGradient, Held, loss_of, trainable, with_loss
from lightning_sketch.subspace._optimizer import OptimizerProxy, refuse_late
from lightning_sketch.subspace._replicas import refuse_different_starts
from lightning_sketch.subspace._state_dict import complete, kept
from lightning_sketch.subspace._weights import FrozenWeights, TrainableWeights
from lightning_sketch.subspace._wrapper import Wrapper
from lightning_sketch.subspace.directions import Directions


class SubspaceModule(Wrapper):
    """A LightningModule that trains another one along `dim` random directions of its weights.

    Use it in place of the module: the same Trainer, data, callbacks, and the module's own `training_step`,
    `validation_step`, logged names, buffers and optimizer, which trains `w` instead of the weights. The directions
    are a sketch's rows: a few integers, nothing of size n is stored but θ₀.

    Scaled so that E‖D x‖² = ‖x‖²: a step of Adam moves the weights by lr √n whatever `dim` is, so that one learning
    rate serves all; it has to be about ten times the usual, see `lr_scale`.

    A step costs the module's own, and one product with D and one with Dᵀ. Memory: one more vector of n, for θ₀.

    Args:
        module: to be trained; of `pytorch_lightning` or `lightning.pytorch`. Its parameters are frozen from here on.
        dim: how many numbers are trained, 0 < dim <= n; at n without `max_dim`, the weights themselves.
        sketch: kind of the directions: block_srht, affd, afjl, qk, ffd, fjl, gaussian or count_sketch.
        seed: of the directions.
        parameters: shell-style pattern, or several, of the names of the parameters that move. Their number is n.
        max_dim: if given, `dim` can be doubled up to this while training, see `IntrinsicDimensionFinder`.
        others: what is done with the other trainable parameters: "frozen", or "full" to train them as ever.
        implicit: differentiate through θ₀ + Dᵀ w, in place of D times the full gradient. Equal, and slower.
        lr_scale: factor for the learning rate of the module's own optimizer, for w. The optimizer's groups show the
            module's own rate all the same, and so does LearningRateMonitor.
        weight_decay: of w, which pulls towards θ₀; None is none, whatever the module's optimizer says.
        optimizer_fn: parameters -> what `configure_optimizers` may return, in place of the module's own.
        save_theta0: keep θ₀ in checkpoints; else its fingerprint, and the module must be made with the same weights.

    Raises:
        ValueError: if `dim`, `max_dim`, `others` or the kind of sketch is out of range; if no parameter matches.
        TypeError: if `module` is no LightningModule.
        MisconfigurationException: for manual optimization; at `setup`, if θ₀ differs between ranks; when optimizers
            are made, if the module's own cannot train w.

    Example::

        sub = SubspaceModule(module, dim=1024, lr_scale=10)
        trainer.fit(sub, datamodule=data)
        plain = sub.materialize()

    Source: Li, Farkhoor, Liu & Yosinski (2018), "Measuring the intrinsic dimension of objective landscapes", ICLR 2018,
    arXiv:1804.08838, eq. (2); Schioppa (2024), arXiv:2402.03994.
    """

    def __init__(
        self,
        module: LightningModule,
        dim: int,
        sketch: str = "block_srht",
        seed: int = 0,
        parameters: str | Sequence[str] = "*",
        max_dim: int | None = None,
        others: str = "frozen",
        implicit: bool = False,
        lr_scale: float | int = 1.0,
        weight_decay: float | int | None = None,
        optimizer_fn: Callable[[list[nn.Parameter]], Any] | None = None,
        save_theta0: bool = False,
    ):
        module = unwrapped(module)
        if not isinstance(module, LightningModule) or isinstance(module, SubspaceModule):
            raise TypeError(
                f"SubspaceModule wraps a LightningModule, got {type(module).__name__}; make it one, or materialize() it"
                " first."
            )
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(module).__name__} optimizes by hand, with gradients of weights that are not trained here; use "
                "automatic optimization."
            )
        if others not in ("frozen", "full"):
            raise ValueError(f"others={others!r} is not known; use 'frozen' or 'full'.")
        if not lr_scale > 0:
            raise ValueError(f"need lr_scale > 0, got {lr_scale}.")
        dim, seed, max_dim = index(dim), index(seed), None if max_dim is None else index(max_dim)
        super().__init__(module)
        self.save_hyperparameters(ignore=["module", "optimizer_fn"])
        self.others, self.implicit, self.save_theta0 = others, implicit, save_theta0
        self.lr_scale, self.weight_decay, self.optimizer_fn = float(lr_scale), weight_decay, optimizer_fn
        self._asked = (parameters, sketch, dim, seed, max_dim)
        self._recipe: OptimizerProxy | None = None
        self._begun = False
        self.register_load_state_dict_post_hook(_follow)
        if "configure_model" in vars(self):
            self.__dict__["configure_model"] = self._configure_model
        if any(p.requires_grad for p in module.parameters()):
            self._begin()
        elif "configure_model" not in vars(self) or any(True for _ in module.parameters()):
            raise ValueError(
                f"{type(module).__name__} has no trainable parameters. Layers have to be made in __init__ or "
                "configure_model, setup is too late; and a module that is in a SubspaceModule already is frozen: give "
                "each its own copy.deepcopy(module)."
            )

    @property
    def n(self) -> int:
        """The number of weights that move."""
        return self.weights.layout.n

    @property
    def blocks(self) -> list[Tensor]:
        """The pieces of w: one, or if nested dim, dim, 2 dim, 4 dim, ... numbers."""
        return list(self.w) if isinstance(self.w, nn.ParameterList) else [self.w]

    def coordinates(self) -> Float[Tensor, " dim"]:
        """The part of w that is in use, as one vector."""
        return torch.cat(self.blocks)[: self.directions.dim] if len(self.blocks) > 1 else self.blocks[0]

    def cut(self, vector: Float[Tensor, " dim"]) -> list[Tensor]:
        """A vector like the part of w that is in use, in blocks as w; zero in those that are not."""
        sizes = [len(block) for block in self.blocks]
        whole = self.blocks[0].new_zeros(sum(sizes))
        whole[: len(vector)] = vector
        return list(whole.split(sizes))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, as a function of w."""
        if self.implicit or self._current_fx_name != "training_step":
            return self._implicit_step(*args, **kwargs)
        self.ready()
        theta = self.weights.parameters()
        with trainable(theta):
            output = call_step(self.module.training_step, *args, **kwargs)
        loss = loss_of(output)
        if loss is None:
            return output
        return with_loss(output, ExplicitGradient.apply(Held(loss, theta), self._gradient, *self.blocks))

    def configure_optimizers(self) -> Any:
        """The module's own, on w."""
        others = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if self.others == "frozen":
            refuse_late(others)
        if self.optimizer_fn is not None:
            return self.optimizer_fn([*self.blocks, *others.values()])
        theta = self.weights.parameters()
        with trainable(theta):
            configured = self.module.configure_optimizers()
        moved = dict(zip(self.weights.layout.names, theta, strict=True))
        self._recipe = OptimizerProxy(configured, moved, self.blocks, self.lr_scale, self.weight_decay)
        return configured

    def groups(self, optimizers: Sequence[Optimizer]) -> list[Mapping[str, Any]]:
        """The groups of the optimizers as a step has them, w at its own rate."""
        if self._recipe is not None:
            return self._recipe.groups()
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure=None) -> None:
        """The module's own; then its weights follow w."""
        try:
            self.module.optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            if self._recipe:
                self._recipe.close()  # a step that failed
        self.ready()

    @torch.no_grad()
    def ready(self) -> None:
        """Set the weights to θ₀ + Dᵀ w if w is another than before, whoever changed it and however."""
        w = self.coordinates()
        if self._w_then is None or self._w_then.shape != w.shape or not torch.equal(self._w_then, w):
            self.weights.move(self.directions, w)
            self._w_then = w.clone()

    def materialize(self) -> LightningModule:
        """A copy of the module with the trained weights, and nothing of the subspace."""
        self.ready()
        plain = copy.deepcopy(self.module)
        plain._current_fx_name = plain._metric_attributes = None  # of a fit that may be on
        for name, parameter in plain.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(True)
        return plain

    def double_dim(self) -> None:
        """Twice as many directions, the former among them; the weights stay where they are."""
        before, self.directions = self.directions, self.directions.doubled()
        with torch.no_grad():
            for block in self.blocks:
                block *= (self.directions.dim / before.dim) ** 0.5

    def theta0(self) -> dict[str, Tensor]:
        """The weights that training starts from, by name."""
        return dict(zip(self.weights.layout.names, self.weights.start, strict=True))

    def on_fit_start(self) -> None:
        """The module's own; refuse ranks that start from different weights."""
        self.module.on_fit_start()
        refuse_different_starts(self.trainer, self._fingerprint)
        if self.n / 2 < self.directions.dim < self.n:
            rank_zero_info(
                f"{self.directions.dim} random directions of {self.n}: their condition number is "
                f"{self.directions.condition():.3g} or more."
            )

    def get_extra_state(self) -> dict[str, Any]:
        """What the directions are made from, how many are used, and a fingerprint of θ₀."""
        return {"directions": self.directions.spec(), "dim": self.directions.dim, "theta0": self._fingerprint}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """As many directions as then."""
        self.directions = replace(self.directions, dim=state["dim"])
        self._fingerprint = state["theta0"]

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """w, the module's buffers, and what is trained in full; see `save_theta0`."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        kept(self, state, prefix)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The inverse of `state_dict`; here, since what holds this module loads it so."""
        complete(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _configure_model(self) -> None:
        self.module.configure_model()
        if not self._begun:
            self._begin()
        elif not self.coordinates().any():  # the same weights, perhaps sharded by now; later they are not θ₀
            self.weights.restart()

    def _begin(self) -> None:
        """From the module's weights as they are."""
        pattern, kind, dim, seed, max_dim = self._asked
        self.weights = TrainableWeights(self.module, pattern)
        self.directions = Directions.of(kind, self.n, dim, seed, max_dim)
        theta = self.weights.parameters()
        self._trainable = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        for parameter in theta if self.others == "full" else self.module.parameters():
            parameter.requires_grad_(False)
        dtype = torch.promote_types(theta[0].dtype, torch.float32)
        blocks = [
            nn.Parameter(torch.zeros(size, dtype=dtype, device=theta[0].device)) for size in block_sizes(dim, max_dim)
        ]
        self.w = blocks[0] if max_dim is None else nn.ParameterList(blocks)
        self._w_then = self.coordinates().detach().clone()
        self.frozen = FrozenWeights(self.module, theta)
        self._fingerprint = fingerprint([p for p in self.module.parameters() if not p.requires_grad])
        self._begun = True

    def _implicit_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step at θ₀ + Dᵀ w, as a function of w to any order."""
        moved = self.weights.moved(self.directions, self.coordinates())
        with swap_tensors(self.module, self.weights.parameters(), moved):
            return call_step(self.module.training_step, *args, **kwargs)

    def _gradient(self) -> list[Tensor]:
        """D g, in blocks as w; zero along directions not yet in use."""
        return self.cut(self.weights.take_gradient(self.directions))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SubspaceModule":
        """θ₀ goes where the weights go; w stays in float32 at least, of which many small steps are made."""
        before = [block.detach() for block in self.blocks] if self._begun else []
        with self.frozen.cast(fn) if self._begun else nullcontext():
            super()._apply(fn, recurse)
        if self._begun:
            for block, old in zip(self.blocks, before, strict=True):
                if block.dtype.itemsize < 4:
                    block.data = old.to(block.device)
            self.weights.to(fn)
            self._w_then = None
            if not self.blocks[0].is_meta:
                self.ready()  # at once: nobody can while a graph is traced
        return self


def _follow(sub: SubspaceModule, _: Any) -> None:
    """The weights go where the w that was loaded says."""
    sub._w_then = None
    sub.ready()
