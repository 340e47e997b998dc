"""Where we lean on Lightning beyond its documented interface.

Both namespaces, the step of the loggers, the bar, the scale of gradients, batches on their way to the module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from pytorch_lightning.utilities.compile import _maybe_unwrap_optimized
from torch import nn
from torch.optim import Optimizer

from lightning_sketch._private import required

# The two namespaces hold two copies of each class. A callback is one for the Trainer and the CLI of a namespace only
# if it descends from that namespace's Callback.
if find_spec("lightning") is not None:
    import lightning.pytorch as lp

    Trainer = pl.Trainer | lp.Trainer
    LightningModule = pl.LightningModule | lp.LightningModule

    class CallbackBase(pl.Callback, lp.Callback):
        """A callback for `pytorch_lightning` and for `lightning.pytorch`."""

    class ModuleBase(pl.LightningModule, lp.LightningModule):
        """A module for `pytorch_lightning` and for `lightning.pytorch`."""

    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher as _Spawning

    _MODULES = (pl.LightningModule, lp.LightningModule)
    _SPAWNING = (_MultiProcessingLauncher, _Spawning)
else:
    Trainer = pl.Trainer
    LightningModule = pl.LightningModule

    class CallbackBase(pl.Callback):
        """A callback for `pytorch_lightning`."""

    class ModuleBase(pl.LightningModule):
        """A module for `pytorch_lightning`."""

    _MODULES = (pl.LightningModule,)
    _SPAWNING = (_MultiProcessingLauncher,)


def batches_done(trainer: Trainer) -> int:
    """Return the step at which Lightning's own callbacks log during training."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def muted_loggers(trainer: Trainer) -> Iterator[None]:
    """Loggers that swallow everything, as under `fast_dev_run`: a training_step may log to `self.logger.experiment`."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def state_key(callback: CallbackBase, **identity: str) -> str:
    """Return the key of a callback's state in a checkpoint, told apart by what identifies it."""
    return callback._generate_state_key(**identity)


class BarText:
    """Words in front of the Trainer's training progress bar, for as long as the context lasts."""

    def __init__(self, trainer: Trainer):
        bar = trainer.progress_bar_callback
        self.bar = bar if bar is not None and bar.is_enabled else None

    def __enter__(self) -> "BarText":
        self.before = self._description()
        return self

    def show(self, text: str) -> None:
        """Replace the words."""
        if self.before is not None:
            self._describe(text)

    def __exit__(self, *_: object) -> None:
        self.show(self.before or "")

    def _description(self) -> str | None:
        if self.bar is None or getattr(self.bar, "_train_progress_bar", True) is None:
            return None
        if getattr(self.bar, "train_progress_bar_id", True) is None:
            return None
        line = getattr(self.bar, "train_progress_bar", None)
        return None if line is None else str(getattr(line, "desc", getattr(line, "description", "")))

    def _describe(self, text: str) -> None:
        line = self.bar.train_progress_bar
        if hasattr(line, "set_description_str"):  # tqdm
            line.set_description_str(text)
        else:  # rich
            self.bar.progress.update(self.bar.train_progress_bar_id, description=text)
            self.bar.refresh()


def say(trainer: Trainer, text: str) -> None:
    """One line for a person, on rank zero, without breaking the progress bar."""
    bar = trainer.progress_bar_callback
    if bar is not None and bar.is_enabled:
        bar.print(text)
    else:
        pl.utilities.rank_zero_info(text)


def loss_scale(trainer: Trainer) -> float:
    """Return what a GradScaler multiplies the loss with; 1 where there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return the scale that gradients still have in `on_before_optimizer_step`: fused optimizers unscale by themselves.

    Raises:
        RuntimeError: if a fused optimizer of PyTorch does not say so under the name that this version knows.
    """
    scale, plain = loss_scale(trainer), getattr(optimizer, "optimizer", optimizer)
    if scale == 1.0:
        return scale
    of_torch = any(kind.__module__.startswith("torch.optim.") for kind in type(plain).__mro__ if kind is not Optimizer)
    if of_torch and plain.defaults.get("fused"):  # as it was made; groups may come from the checkpoint of another one
        return scale if required(plain, "_step_supports_amp_scaling") else 1.0
    return scale if getattr(plain, "_step_supports_amp_scaling", False) else 1.0


@contextmanager
def changed_batches(
    module: LightningModule, note: Callable[[Any], None], change: Callable[[Any], Any]
) -> Iterator[None]:
    """Every batch that the Trainer takes from a loader: noted as it is, and changed before anybody else sees it.

    Of several contexts all note the batch, and the first one changes it.
    """
    before, first = module._on_before_batch_transfer, "_on_before_batch_transfer" not in vars(module)

    def hook(batch: Any, dataloader_idx: int = 0) -> Any:
        note(batch)
        return before(change(batch) if first else batch, dataloader_idx)

    module.__dict__["_on_before_batch_transfer"] = hook
    try:
        yield
    finally:
        module.__dict__.pop("_on_before_batch_transfer", None)


def evaluated_loader(trainer: Trainer, index: int) -> Any:
    """Return the data loader of this index that is being validated, tested or predicted on."""
    loop = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer._active_loop
    return loop._combined_loader.flattened[index]


def changed_hooks(module: LightningModule) -> list[str]:
    """Names of the hooks and steps of a LightningModule that its class, or itself, has made its own."""
    base = lightning_class(module)
    return [name for name in _hooks(base) if _code(getattr(module, name)) is not _code(getattr(base, name))]


def does_itself(module: LightningModule, name: str) -> bool:
    """Whether a `ModuleBase`'s class has a hook of its own, other than Lightning's default."""
    return getattr(type(module), name, None) is not getattr(pl.LightningModule, name, None)


def like_namespace_of(module: LightningModule, wrapper: LightningModule) -> None:
    """Give a `ModuleBase` the default hooks of another module's namespace: Lightning compares their code."""
    theirs = lightning_class(module)
    for name in _hooks(theirs):
        if theirs is not pl.LightningModule and name not in vars(wrapper) and not does_itself(wrapper, name):
            wrapper.__dict__[name] = partial(getattr(theirs, name), wrapper)  # a method is pickled as a name only


def unwrapped(module: Any) -> Any:
    """Return the LightningModule in what torch.compile made of it; its compiled steps stay compiled."""
    return _maybe_unwrap_optimized(module) if hasattr(module, "_orig_mod") else module


def lightning_class(module: LightningModule) -> type:
    """Return the LightningModule class, of its namespace, that a module is one of."""
    return next(base for base in _MODULES if isinstance(module, base))


def _hooks(base: type) -> list[str]:
    """Functions that a LightningModule has and a module of PyTorch has not."""
    return [
        name
        for name in dir(base)
        if not name.startswith("_") and isinstance(getattr(base, name), FunctionType) and not hasattr(nn.Module, name)
    ]


def _code(function: Any) -> Any:
    return getattr(getattr(function, "__wrapped__", function), "__code__", None)


def trainer_class(module: LightningModule) -> type:
    """Return the Trainer class of a module's namespace."""
    return pl.Trainer if lightning_class(module) is pl.LightningModule else lp.Trainer


def train_for(trainer: Trainer, steps: int) -> None:
    """Override max_steps of an existing Trainer."""
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.fit_loop.max_epochs = -1


def rhythm(trainer: Trainer) -> tuple[Any, ...]:
    """Return the Trainer's validation schedule and minimum length."""
    loop = trainer.fit_loop
    return trainer.val_check_interval, trainer.check_val_every_n_epoch, loop.min_epochs, loop.epoch_loop.min_steps


def set_rhythm(
    trainer: Trainer,
    val_check_interval: float | int,
    check_val_every_n_epoch: int | None = None,
    min_epochs: int | None = 0,
    min_steps: int | None = None,
) -> None:
    """Set the validation schedule; the defaults validate by batch count and allow an early stop."""
    trainer.val_check_interval, trainer.check_val_every_n_epoch = val_check_interval, check_val_every_n_epoch
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = min_epochs, min_steps


def forgets(trainer: Trainer) -> bool:
    """Return whether fit runs in spawned processes, whose callbacks are lost: ddp_spawn, ddp_fork, ddp_notebook."""
    return isinstance(trainer.strategy.launcher, _SPAWNING)


def name_run(trainer: Trainer, name: str, group: str) -> None:
    """Give a run of W&B that has not begun a name and a group, unless it has its own."""
    for logger in filter(_is_wandb, trainer.loggers):
        options = required(logger, "_wandb_init")
        options["name"] = options.get("name") or name
        options["group"] = options.get("group") or group


def close_run(trainer: Trainer, values: dict[str, float]) -> None:
    """Log the last values of a run; end it where a next one would go on with it, as in W&B."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
        logger.save()
        if _is_wandb(logger) and trainer.is_global_zero:
            logger.experiment.finish()


def _is_wandb(logger: Any) -> bool:
    """By the name of its class, so that neither namespace's is imported."""
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)
