"""The LightningModule that trains another one in a random subspace of its weights: θ = θ₀ + Dᵀ w, w is trained."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_sketch._arguments import kind_of
from lightning_sketch._lightning import (
    LightningModule,
    accumulates,
    callbacks_of,
    changed_hooks,
    gradient_scale,
    keep_hyperparameters_inside,
    loss_scale,
    overridden_hooks,
    unwrapped,
)
from lightning_sketch.autodiff.losses import call_step
from lightning_sketch.subspace._doubling import carry_over
from lightning_sketch.subspace._gradient import as_function_of_w
from lightning_sketch.subspace._optimizer import (
    OwnDecay,
    only,
    optimizers_in,
    refuse_in_groups,
    refuse_late,
    scale_of_rate,
    train_w,
)
from lightning_sketch.subspace._replicas import refuse_different_starts
from lightning_sketch.subspace._wrapper import Wrapper
from lightning_sketch.subspace.subspace_model import Others, Structure, Subspace

# Hooks that see gradients before the optimizer does.
_SEE_GRADIENTS = {"backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"}
_SEE_GRADIENTS |= {"optimizer_step"}


class SubspaceModule(Subspace, Wrapper):  # type: ignore[misc]  # two namespaces, see ModuleBase
    """A LightningModule that trains another one along `dim` random directions of its weights.

    Use it in place of the module, with the same Trainer, data and callbacks. It runs the module's own `training_step`,
    `validation_step` and hooks, logs under the module's names, and lets the module's optimizer train `w` instead of the
    weights. The directions are the rows of a sketch, which is described by a few integers: of vectors of length n, only
    θ₀ is stored.

    D is scaled so that E‖D x‖² = scale² ‖x‖². A step of Adam then moves the weights by scale · lr √n whatever `dim` is.
    The best scale differs between tasks and dims: `IntrinsicDimensionTuner` tries several.

    Hooks of the module and of callbacks find gradients of the weights, and what they do to them counts, as does
    freezing layers while training (before training, freeze them before they are wrapped). Gradients of w are clipped in
    units of gradients of the weights, by the threshold that full training needs. Weights that are loaded before the
    first step become θ₀; later ones are refused.

    Cost of a training step: the module's own, one product with D and one with Dᵀ; a second product with D if hooks see
    gradients. Under DDP, `dim` numbers are reduced between processes, or n if hooks see gradients. Memory: one more
    vector of length n, for θ₀.

    Args:
        module: The LightningModule to train, of `pytorch_lightning` or `lightning.pytorch`. Its parameters are frozen
            from here on, except during a fit.
        dim: The number of trained coordinates, 0 < dim <= n; with dim = n and no `max_dim`, the weights themselves.
        sketch: The kind of sketch whose rows are the directions: block_srht, affd, afjl, qk, ffd, fjl, gaussian or
            count_sketch, or a kind of your own.
        seed: The seed of the directions.
        parameters: A shell-style pattern, or several, of the names of the parameters that w moves; n is the number of
            their entries.
        max_dim: The number up to which `dim` can be doubled during training, see `IntrinsicDimensionFinder`; None if it
            stays.
        others: What is done with the other trainable parameters: "frozen", or "full" to train them as usual.
        head: A pattern of names, or several, of parameters that are outside of the subspace and trained as usual, such
            as a new classifier on a pretrained model. Whether it is inside decides how large `dim` has to be.
        structure: "layers" to multiply the step of each layer by a learned number; one of `dim` for each layer (SAID).
        scale: The factor of D.
        lr_scale: The factor of the learning rate that `scale` has the effect of, in its place: `scale=lr_scale` for
            optimizers of the Adam family, `scale=lr_scale ** 0.5` for SGD.
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
        RuntimeError: While training, if others write into the weights.

    Example::

        sub = SubspaceModule(module, 1024, scale=3)
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
    arXiv:1804.08838, eq. (2); for `structure`, Aghajanyan, Gupta & Zettlemoyer (2021), "Intrinsic dimensionality
    explains the effectiveness of language model fine-tuning", ACL 2021, arXiv:2012.13255; Schioppa (2024),
    arXiv:2402.03994.
    """

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
        head: str | Sequence[str] | None = None,
        structure: Structure | None = None,
        scale: float | int = 1.0,
        lr_scale: float | int | None = None,
        weight_decay: float | int | None = None,
        optimizer_fn: Callable[[list[nn.Parameter]], Any] | None = None,
        save_theta0: bool = False,
    ):
        module = unwrapped(module)
        if not isinstance(module, LightningModule) or isinstance(module, SubspaceModule):
            raise TypeError(
                f"SubspaceModule wraps a LightningModule, got {kind_of(module)}; wrap another module by "
                "SubspaceModel, and materialize() one that is in a subspace."
            )
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(module).__name__} uses manual optimization, for weights that are not trained here; use "
                "automatic optimization, or SubspaceModel in a loop of your own."
            )
        if lr_scale is not None and (scale != 1 or not lr_scale > 0):
            raise ValueError(f"lr_scale stands for a scale, so give one of them, above 0; got {lr_scale} and {scale}.")
        super().__init__(module)
        asked = scale if lr_scale is None else None
        self._configure(dim, sketch, seed, parameters, max_dim, others, head, structure, asked, save_theta0)
        dim, seed = self._arguments[0], self._arguments[2]  # whole numbers, as they are saved
        self.save_hyperparameters(ignore=["module", "optimizer_fn"])
        self.lr_scale, self.weight_decay, self.optimizer_fn = lr_scale, weight_decay, optimizer_fn
        self._own_decay: OwnDecay | None = None
        self._hooked = self._by_ddp = self._in_fit = False
        self._loaded_scale: float | None = None
        self._theta: tuple[nn.Parameter, ...] = ()
        self._last_gradient: tuple[Tensor | None, list[Tensor | None], float] | None = None
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

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "SubspaceModule":
        """Load a checkpoint, as `LightningModule.load_from_checkpoint`; `module` is required, at its initial weights.

        Raises:
            TypeError: If there is no `module`.
        """
        if "module" not in kwargs:
            raise TypeError(
                "a checkpoint of a SubspaceModule has w, without the module that it moves; pass module=Model(...) with "
                "the weights that training began with, by the same seed_everything or from the same pretrained file."
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module, as a function of w where gradients are on."""
        self.ready()
        # the Trainer's step differentiates in the weights, and a traced graph has no Dᵀ in it
        differentiable = torch.is_grad_enabled() and not self._in_step() and not torch.jit.is_tracing()
        with self.following() if differentiable else nullcontext():
            return self.module(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step, and return its output."""
        if not self._in_step():  # a measurement, or a loop of the user's own
            with self.following():
                return call_step(self.module.training_step, *args, **kwargs)
        self.ready()
        self._theta = tuple(self.weights.parameters())  # shards are not in the module during the step
        output = call_step(self.module.training_step, *args, **kwargs)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None or not self._by_ddp:
            return output
        loss = as_function_of_w(loss, self.blocks, [], self._reduced_by_ddp)
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _in_step(self) -> bool:
        """Return whether the Trainer runs a training step now; after a fit that failed, the name of its hook stays."""
        return self._current_fx_name == "training_step" and self._trainer is not None and bool(self._trainer.training)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the module's own backward pass, then set the gradient of w if the optimizer steps next."""
        self.weights.follow_flags(self.coordinates().detach())
        if self._by_ddp:  # which does it in the backward pass, to reduce it
            self.module.backward(loss, *args, **kwargs)
            return
        scale = loss_scale(self.trainer) if self._hooked else 1.0
        self._multiply_gradients(scale)
        self.module.backward(loss, *args, **kwargs)
        self._multiply_gradients(1 / scale)  # for hooks; the gradient of w stays scaled for the GradScaler
        self._last_gradient = None
        if not accumulates(self.trainer):
            self._set_gradient(scale)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of w by the module's own hook, after what hooks did to gradients of the weights."""
        if self._hooked or (self.leaves[0].grad is None and not self._by_ddp):
            self._set_gradient(gradient_scale(self.trainer, optimizer) if self._hooked else 1.0)
        scale = self.directions.scale
        self._divide_gradient(scale)
        self.module.configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._divide_gradient(1 / scale)
        if "configure_gradient_clipping" in changed_hooks(self.module):
            self._set_gradient(gradient_scale(self.trainer, optimizer))

    def configure_optimizers(self) -> Any:
        """Configure the module's own optimizer, or that of `optimizer_fn`, to train w."""
        theta = dict(zip(self.weights.layout.names, self.weights.parameters(), strict=True))
        ids, head = {id(parameter) for parameter in theta.values()}, set(map(id, self.weights.head))
        others = {n: p for n, p in self.module.named_parameters() if p.requires_grad and id(p) not in ids}
        if self.others == "frozen":
            refuse_late([name for name, parameter in others.items() if id(parameter) not in head])
        if self.optimizer_fn is not None:
            configured = self.optimizer_fn([*self.leaves, *others.values()])
        else:
            configured = self._configured_in_full()
            self._own_decay = train_w(configured, theta, self.leaves, self.weight_decay)
        if self.lr_scale is not None:
            self.set_scale(scale_of_rate(only(optimizers_in(configured)), self.lr_scale))
            self.ready()
        for optimizer in optimizers_in(configured):
            refuse_in_groups(optimizer, theta)
        return configured

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Run the module's own `optimizer_step`, then move its weights to the new w."""
        try:
            self.module.optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            if self._own_decay is not None:
                self._own_decay.join(only(optimizers_in(self.trainer.optimizers)))
        self._last_gradient = None
        self.ready()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Drop the gradients of w and of the weights."""
        self.module.optimizer_zero_grad(epoch, batch_idx, optimizer)
        for parameter in self._theta:
            parameter.grad = None

    def configure_callbacks(self) -> Any:
        """Return the module's own callbacks; Lightning calls this first, before callbacks can freeze weights."""
        self._set_flags(self.trainer.state.fn == "fit")
        return self.module.configure_callbacks()

    def on_fit_start(self) -> None:
        """Run the module's own hook, and check that all ranks start from the same weights."""
        self.module.on_fit_start()
        self.ready()
        refuse_different_starts(self.trainer, self._fingerprint)
        ddp = isinstance(self.trainer.strategy.model, DistributedDataParallel)
        self._shows_weights = False
        self._hooked = self._gradients_are_seen()
        self._by_ddp = ddp and not self._hooked
        if ddp and self._hooked:
            rank_zero_info(f"hooks see gradients of the weights, so all {self.n:,} numbers are reduced, not w alone.")
        if self.n / 2 < self.directions.dim < self.n:
            rank_zero_info(
                f"{self.directions.dim} random directions of {self.n}: their condition number is "
                f"{self.directions.condition():.3g} or more."
            )

    def on_train_start(self) -> None:
        """Run the module's own hook, and convert the optimizer's state if it was loaded with a w of another scale."""
        ratio = self.directions.scale / (self._loaded_scale or self.directions.scale)
        for block in self.blocks if ratio != 1 else ():
            factor = torch.full_like(block, ratio)
            factor[len(block) - self.weights.num_layers :] = 1
            for optimizer in self.trainer.optimizers:
                carry_over(optimizer, [block], [], factor)
        self._loaded_scale = None
        self.module.on_train_start()

    def teardown(self, stage: str) -> None:
        """Run the module's own hook, and freeze the weights again."""
        self.module.teardown(stage)
        self._set_flags(False)

    def materialize(self) -> LightningModule:
        """Return a copy of the module with the trained weights, independent of this one and trainable in full."""
        plain = super().materialize()
        plain._current_fx_name = plain._metric_attributes = None  # set while a fit is running
        return plain

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The names of parameters that DDP does not reduce: the weights, or w if hooks see gradients of the weights."""
        if not self._gradients_are_seen():
            return super()._ddp_params_and_buffers_to_ignore
        self._shows_weights = True  # DDP asks for parameters next, and has two names for those of the outermost module
        of_w = [name for name, _ in self.named_parameters() if not name.startswith("module.")]
        return [*of_w, *(f".{name}" for name in of_w)]

    def _gradients_are_seen(self) -> bool:
        """Return whether hooks of the module, or of callbacks other than this package's, see gradients of weights."""
        if _SEE_GRADIENTS & set(changed_hooks(self.module)):
            return True
        return any(_SEE_GRADIENTS & overridden_hooks(callback) for callback in callbacks_of(self.trainer))

    def _configured_in_full(self) -> Any:
        """Return what the module's own `configure_optimizers` makes for weights that are trainable."""
        before = self._in_fit
        self._set_flags(True)
        try:
            return self.module.configure_optimizers()
        finally:
            self._set_flags(before)

    def _set_flags(self, in_fit: bool) -> None:
        """Let the weights require gradients during a fit, as far as they have not been frozen while training."""
        if not self._initialized or in_fit == self._in_fit:
            return
        if not in_fit:
            self.weights.follow_flags(self.coordinates().detach())
        between_fits = [p for p in self.weights.parameters() if p.requires_grad and in_fit]  # unfrozen by the user
        self._in_fit = in_fit
        self._restore_flags()
        for parameter in between_fits:
            parameter.requires_grad_(True)

    def _restore_flags(self) -> None:
        for parameter, motion in zip(self.weights.parameters(), self.weights.motions, strict=True):
            parameter.requires_grad_(self._in_fit and motion.trained)

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` returned, and which weights are frozen if some have been."""
        super().set_extra_state(state)
        self._loaded_scale = self.directions.scale
        if any(motion != type(motion)() for motion in self.weights.motions):
            self._restore_flags()

    def _set_gradient(self, factor: float) -> None:
        """Set the gradient of w to D g times a factor, unless the gradients g of the weights are as at the last call.

        Raises:
            MisconfigurationException: If hooks changed g, and that of w too.
        """
        gradient = self.weights.gradient(self.directions, self.coordinates().detach())
        before, of_w, unit = self._last_gradient or (None, [], 1.0)
        if before is None or gradient is None or not torch.equal(before, gradient):
            pairs = zip(self.leaves, of_w, strict=False)
            if not all(_close(leaf.grad, old, factor / unit) for leaf, old in pairs):
                raise MisconfigurationException(
                    f"hooks of {type(self.module).__name__}, or of callbacks, change gradients both of the weights and "
                    "of w, which follows from them; change either those of the module's parameters() or the "
                    "optimizer's."
                )
            self.set_gradient(gradient if gradient is None else gradient * factor)
        of_w = [None if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves]
        self._last_gradient = gradient, of_w, factor

    def _reduced_by_ddp(self) -> list[Tensor]:
        """Return D g in the backward pass, for DDP to reduce; zeros while gradients are accumulated."""
        if accumulates(self.trainer):
            return self._gradient_blocks(None)
        return self._gradient_blocks(self.weights.gradient(self.directions, self.coordinates().detach()))

    @torch.no_grad()
    def _multiply_gradients(self, factor: float) -> None:
        gradients = [] if factor == 1 else [p.grad for p in self.weights.parameters() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    @torch.no_grad()
    def _divide_gradient(self, factor: float) -> None:
        for leaf in self.leaves:
            if leaf.grad is not None and factor != 1:
                leaf.grad.div_(factor)

    def _configure_model(self) -> None:
        known = {name for name, _ in self.module.named_parameters()}
        self.module.configure_model()
        made = [name for name, p in self.module.named_parameters() if name not in known and p.requires_grad]
        if self._initialized and made and not self.coordinates().any():  # layers beside those that were there before
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(name in self._trainable or name in made)
            self._initialized = self._in_fit = False
        if not self._initialized:
            self._initialize()
            self._set_flags(self.trainer.state.fn == "fit")
        elif not self.coordinates().any():  # still at θ₀, but `configure_model` may have sharded the weights
            self.weights.reset_start()


keep_hyperparameters_inside(SubspaceModule)


def _close(found: Tensor | None, old: Tensor | None, factor: float) -> bool:
    """Return whether a gradient is an older one times a factor."""
    if found is None or old is None:
        return found is old
    return torch.allclose(found, old * factor, rtol=1e-4, atol=0.0, equal_nan=True)
