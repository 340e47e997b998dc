"""The LightningModule that trains another one in a random subspace of its weights: θ = θ₀ + Dᵀ w, w is trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import index
from typing import Any, Literal, get_args

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
from lightning_sketch.subspace._gradient import ExplicitGradient, OpaqueLoss, loss_of, trainable, with_loss
from lightning_sketch.subspace._optimizer import OptimizerProxy, refuse_late
from lightning_sketch.subspace._replicas import refuse_different_starts
from lightning_sketch.subspace._state_dict import complete_state, trim_state
from lightning_sketch.subspace._weights import FrozenWeights, TrainableWeights
from lightning_sketch.subspace._wrapper import Wrapper
from lightning_sketch.subspace.directions import Directions

Others = Literal["frozen", "full"]


class SubspaceModule(Wrapper):
    """A LightningModule that trains another one along `dim` random directions of its weights.

    Use it in place of the module, with the same Trainer, data and callbacks. It runs the module's own `training_step`,
    `validation_step` and hooks, logs under the module's names, and lets the module's optimizer train `w` instead of the
    weights. The directions are the rows of a sketch, which is described by a few integers: of vectors of length n, only
    θ₀ is stored.

    D is scaled so that E‖D x‖² = ‖x‖². A step of Adam then moves the weights by lr √n whatever `dim` is, so that one
    learning rate is right for all; it has to be about ten times the usual one, see `lr_scale`.

    Cost of a step: the module's own, one product with D and one with Dᵀ. Memory: one more vector of length n, for θ₀.

    Args:
        module: The LightningModule to train, of `pytorch_lightning` or `lightning.pytorch`. Its parameters are frozen
            from here on.
        dim: The number of trained coordinates, 0 < dim <= n; with dim = n and no `max_dim`, the weights themselves.
        sketch: The kind of sketch whose rows are the directions: block_srht, affd, afjl, qk, ffd, fjl, gaussian or
            count_sketch, or a kind of your own.
        seed: The seed of the directions.
        parameters: A shell-style pattern, or several, of the names of the parameters that w moves; n is the number of
            their entries.
        max_dim: The number up to which `dim` can be doubled during training, see `IntrinsicDimensionFinder`; None if it
            stays.
        others: What is done with the other trainable parameters: "frozen", or "full" to train them as usual.
        implicit: Whether to differentiate through θ₀ + Dᵀ w, instead of multiplying the full gradient by D. The result
            is equal, and it is slower.
        lr_scale: The factor for the learning rate of w in the module's own optimizer. Its param groups, and therefore
            LearningRateMonitor, show the rate without this factor.
        weight_decay: The weight decay of w, which pulls toward θ₀; None is 0, whatever the module's optimizer has.
        optimizer_fn: Makes the optimizer in place of the module's own: a function from a list of parameters to anything
            that `configure_optimizers` may return.
        save_theta0: Whether checkpoints contain θ₀; otherwise they contain its fingerprint, and the module must be made
            with the same weights before one is loaded.

    Attributes:
        module: The module inside, at the weights θ₀ + Dᵀ w.
        w: The trained parameter, of shape (dim,); with `max_dim` a ParameterList, see `blocks`.
        directions: The matrix D, of shape (dim, n).

    Raises:
        ValueError: If `dim`, `max_dim`, `others` or the kind of sketch is out of range; if no parameter matches.
        TypeError: If `module` is not a LightningModule.
        MisconfigurationException: For manual optimization; at fit, if θ₀ differs between ranks, or if the module's
            optimizer cannot train w.

    Example::

        sub = SubspaceModule(module, 1024, lr_scale=10)
        trainer.fit(sub, datamodule=data)
        plain = sub.materialize()

    >>> import pytorch_lightning as pl
    >>> class Model(pl.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(8, 2)
    >>> sub = SubspaceModule(Model(), 4)
    >>> sub.n, sub.w.shape
    (18, torch.Size([4]))
    >>> sub.w.data.fill_(0.1)
    tensor([0.1000, 0.1000, 0.1000, 0.1000])
    >>> plain = sub.materialize()
    >>> bool(torch.equal(plain.layer.bias, sub.theta0()["layer.bias"]))
    False

    Source: Li, Farkhoor, Liu & Yosinski (2018), "Measuring the intrinsic dimension of objective landscapes", ICLR 2018,
    arXiv:1804.08838, eq. (2); Schioppa (2024), arXiv:2402.03994.
    """

    directions: Directions
    weights: TrainableWeights
    _last_w: Tensor | None

    def __init__(
        self,
        module: LightningModule,
        dim: int,
        *,
        sketch: str = "block_srht",
        seed: int = 0,
        parameters: str | Sequence[str] = "*",
        max_dim: int | None = None,
        others: Others = "frozen",
        implicit: bool = False,
        lr_scale: float | int = 1.0,
        weight_decay: float | int | None = None,
        optimizer_fn: Callable[[list[nn.Parameter]], Any] | None = None,
        save_theta0: bool = False,
    ):
        module = unwrapped(module)
        if not isinstance(module, LightningModule) or isinstance(module, SubspaceModule):
            raise TypeError(
                f"SubspaceModule wraps a LightningModule, got {type(module).__name__}; make it a LightningModule, or "
                "materialize() it first."
            )
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(module).__name__} uses manual optimization, for weights that are not trained here; use "
                "automatic optimization."
            )
        if others not in get_args(Others):
            raise ValueError(f"others={others!r} is not known; use 'frozen' or 'full'.")
        if not lr_scale > 0:
            raise ValueError(f"need lr_scale > 0, got {lr_scale}.")
        dim, seed, max_dim = index(dim), index(seed), None if max_dim is None else index(max_dim)
        super().__init__(module)
        self.save_hyperparameters(ignore=["module", "optimizer_fn"])
        self.others, self.implicit, self.save_theta0 = others, implicit, save_theta0
        self.lr_scale, self.weight_decay, self.optimizer_fn = float(lr_scale), weight_decay, optimizer_fn
        self._arguments = (parameters, sketch, dim, seed, max_dim)
        self._optimizer_proxy: OptimizerProxy | None = None
        self._initialized = False
        self.register_load_state_dict_post_hook(_move_weights)
        if "configure_model" in vars(self):
            self.__dict__["configure_model"] = self._configure_model
        if any(p.requires_grad for p in module.parameters()):
            self._initialize()
        elif "configure_model" not in vars(self) or any(True for _ in module.parameters()):
            raise ValueError(
                f"{type(module).__name__} has no trainable parameters. Make layers in __init__ or configure_model, "
                "since setup is too late; and a module that is in a SubspaceModule already is frozen: give each its "
                "own copy.deepcopy(module)."
            )

    @property
    def n(self) -> int:
        """The number of weights that move."""
        return self.weights.layout.n

    @property
    def blocks(self) -> list[nn.Parameter]:
        """The parts of w, a parameter each: one, or with `max_dim` several of sizes dim, dim, 2 dim, 4 dim, ..."""
        return list(self.w) if isinstance(self.w, nn.ParameterList) else [self.w]

    def coordinates(self) -> Float[Tensor, " dim"]:
        """Return the entries of w that are in use, as one vector of shape (dim,)."""
        return torch.cat(tuple(self.blocks))[: self.directions.dim] if len(self.blocks) > 1 else self.blocks[0]

    def cut(self, vector: Float[Tensor, " dim"]) -> list[Tensor]:
        """Split a vector of the entries in use into blocks as w is split, with zeros for the entries not in use."""
        sizes = [len(block) for block in self.blocks]
        whole = self.blocks[0].new_zeros(sum(sizes))
        whole[: len(vector)] = vector
        return list(whole.split(sizes))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step, and return its output with the loss as a function of w."""
        if self.implicit or self._current_fx_name != "training_step":
            return self._implicit_step(*args, **kwargs)
        self.ready()
        theta = self.weights.parameters()
        with trainable(theta):
            output = call_step(self.module.training_step, *args, **kwargs)
        loss = loss_of(output)
        if loss is None:
            return output
        return with_loss(output, ExplicitGradient.apply(OpaqueLoss(loss, theta), self._gradient, *self.blocks))

    def configure_optimizers(self) -> Any:
        """Configure the module's own optimizer, or that of `optimizer_fn`, to train w."""
        others = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if self.others == "frozen":
            refuse_late(others)
        if self.optimizer_fn is not None:
            return self.optimizer_fn([*self.blocks, *others.values()])
        theta = self.weights.parameters()
        with trainable(theta):
            configured = self.module.configure_optimizers()
        named = dict(zip(self.weights.layout.names, theta, strict=True))
        self._optimizer_proxy = OptimizerProxy(configured, named, self.blocks, self.lr_scale, self.weight_decay)
        return configured

    def groups(self, optimizers: Sequence[Optimizer]) -> Sequence[Mapping[str, Any]]:
        """Return the param groups that a step of these optimizers uses, with w at its own rate."""
        if self._optimizer_proxy is not None:
            return self._optimizer_proxy.groups()
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Run the module's own `optimizer_step`, then move its weights to the new w."""
        try:
            self.module.optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            if self._optimizer_proxy:
                self._optimizer_proxy.close()  # restores the param groups if the step failed
        self.ready()

    @torch.no_grad()
    def ready(self) -> None:
        """Set the weights to θ₀ + Dᵀ w if w has changed since the last call."""
        w = self.coordinates()
        if self._last_w is None or self._last_w.shape != w.shape or not torch.equal(self._last_w, w):
            self.weights.assign(self.directions, w)
            self._last_w = w.clone()

    def materialize(self) -> LightningModule:
        """Return a copy of the module with the trained weights, independent of this one and trainable in full."""
        self.ready()
        plain = copy.deepcopy(self.module)
        plain._current_fx_name = plain._metric_attributes = None  # set while a fit is running
        for name, parameter in plain.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(True)
        return plain

    def double_dim(self) -> None:
        """Double the number of directions, of which the current ones are the first; the weights stay the same."""
        before, self.directions = self.directions, self.directions.doubled()
        with torch.no_grad():
            for block in self.blocks:
                block.mul_((self.directions.dim / before.dim) ** 0.5)

    def theta0(self) -> dict[str, Tensor]:
        """Return the initial weights, by name; of sharded parameters, this rank's shards."""
        return dict(zip(self.weights.layout.names, self.weights.start, strict=True))

    def on_fit_start(self) -> None:
        """Run the module's own hook, and check that all ranks start from the same weights."""
        self.module.on_fit_start()
        refuse_different_starts(self.trainer, self._fingerprint)
        if self.n / 2 < self.directions.dim < self.n:
            rank_zero_info(
                f"{self.directions.dim} random directions of {self.n}: their condition number is "
                f"{self.directions.condition():.3g} or more."
            )

    def get_extra_state(self) -> dict[str, Any]:
        """Return the spec of the directions, the number in use, and a fingerprint of θ₀."""
        return {"directions": self.directions.spec(), "dim": self.directions.dim, "theta0": self._fingerprint}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of directions in use, and the fingerprint of θ₀."""
        self.directions = replace(self.directions, dim=state["dim"])
        self._fingerprint = state["theta0"]

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Return w, the module's buffers, and parameters trained in full; with `save_theta0`, also the initial weights.

        Frozen parameters are contained only if the module has changed them.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        trim_state(self, state, prefix)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the result of `state_dict`; overridden here since a parent module calls this method when it loads."""
        complete_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _configure_model(self) -> None:
        self.module.configure_model()
        if not self._initialized:
            self._initialize()
        elif not self.coordinates().any():  # still at θ₀, but `configure_model` may have sharded the weights
            self.weights.reset_start()

    def _initialize(self) -> None:
        """Make the directions, w = 0, and θ₀ from the module's current weights, and freeze the module."""
        pattern, kind, dim, seed, max_dim = self._arguments
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
        self._last_w = self.coordinates().detach().clone()
        self.frozen = FrozenWeights(self.module, theta)
        self._fingerprint = fingerprint([p for p in self.module.parameters() if not p.requires_grad])
        self._initialized = True

    def _implicit_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step at θ₀ + Dᵀ w, with a loss that can be differentiated in w any number of times."""
        theta = self.weights.values_at(self.directions, self.coordinates())
        with swap_tensors(self.module, self.weights.parameters(), theta):
            return call_step(self.module.training_step, *args, **kwargs)

    def _gradient(self) -> list[Tensor]:
        """Return D g, in blocks as w; zero for entries not in use."""
        return self.cut(self.weights.pop_gradient(self.directions))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SubspaceModule":
        """Convert θ₀ like the weights, and keep w in float32 at least, since it is a sum of many small steps."""
        before = [block.detach() for block in self.blocks] if self._initialized else []
        with self.frozen.cast(fn) if self._initialized else nullcontext():
            super()._apply(fn, recurse)
        if self._initialized:
            for block, old in zip(self.blocks, before, strict=True):
                if block.dtype.itemsize < 4:
                    block.data = old.to(block.device)
            self.weights.to(fn)
            self._last_w = None
            if not self.blocks[0].is_meta:
                self.ready()  # now, since torch.compile cannot do it while it traces a graph
        return self


def _move_weights(sub: SubspaceModule, _: Any) -> None:
    """Move the weights to the w that was loaded."""
    sub._last_w = None
    sub.ready()
