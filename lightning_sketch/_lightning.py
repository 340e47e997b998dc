"""Uses of Lightning beyond its documented interface, for both of its namespaces.

They concern base classes, loggers, what Lightning says, the progress bar, the scale of gradients, batches before the
module sees them, and settings of a Trainer.
"""

import copy
import itertools
import logging
import math
import os
import secrets
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import lightning_fabric
import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from pytorch_lightning.utilities.compile import _maybe_unwrap_optimized
from pytorch_lightning.utilities.rank_zero import rank_zero_module
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_sketch._private import required

# The two namespaces define each class twice. The Trainer and the CLI of a namespace accept only subclasses of that
# namespace's Callback.
if TYPE_CHECKING or find_spec("lightning") is not None:
    import lightning.pytorch as lp

    Trainer = pl.Trainer | lp.Trainer
    LightningModule = pl.LightningModule | lp.LightningModule

    # The two bases differ in the types of their arguments only, each those of its own namespace.
    class CallbackBase(pl.Callback, lp.Callback):  # type: ignore[misc]
        """A callback for `pytorch_lightning` and for `lightning.pytorch`."""

    class CheckpointBase(pl.callbacks.Checkpoint, lp.callbacks.Checkpoint):  # type: ignore[misc]
        """A callback of either namespace that runs after all other callbacks of a hook."""

    class ModuleBase(pl.LightningModule, lp.LightningModule):  # type: ignore[misc]
        """Base class that the Trainers of both namespaces accept as a LightningModule."""

    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher as _SpawnLauncher

    _MODULES = (pl.LightningModule, lp.LightningModule)
    _CALLBACKS = (pl.Callback, lp.Callback)
    _SPAWN_LAUNCHERS = (_MultiProcessingLauncher, _SpawnLauncher)
    _PACKAGES = (pl, lp, lightning_fabric, sys.modules["lightning.fabric"])
else:
    Trainer = pl.Trainer
    LightningModule = pl.LightningModule

    class CallbackBase(pl.Callback):
        """A callback for `pytorch_lightning`."""

    class CheckpointBase(pl.callbacks.Checkpoint):
        """A callback that runs after all other callbacks of a hook."""

    class ModuleBase(pl.LightningModule):
        """Base class that the Trainer accepts as a LightningModule."""

    _MODULES = (pl.LightningModule,)
    _CALLBACKS = (pl.Callback,)
    _SPAWN_LAUNCHERS = (_MultiProcessingLauncher,)
    _PACKAGES = (pl, lightning_fabric)


def batches_done(trainer: Trainer) -> int:
    """Return the step at which Lightning's own callbacks log during training."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def steps_done(trainer: Trainer, *, in_batch: bool = False) -> int:
    """Return the number of optimizer steps done; with manual optimization, Lightning's count of batches for loggers.

    Args:
        trainer: The Trainer.
        in_batch: Whether the batch that has just made a step is still running, which is not counted before its end.
    """
    if trainer.lightning_module is None or trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return batches_done(trainer) + in_batch


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the Trainer's callbacks, an attribute that type checkers do not see."""
    untyped: Any = trainer
    return untyped.callbacks


def is_dev_run(trainer: Trainer) -> bool:
    """Return whether the Trainer runs under `fast_dev_run`, an attribute that type checkers do not see."""
    untyped: Any = trainer
    return bool(untyped.fast_dev_run)


@contextmanager
def muted_loggers(trainer: Trainer) -> Iterator[None]:
    """Replace the Trainer's loggers, for as long as the context lasts, by ones that discard everything.

    These accept calls such as `self.logger.experiment.log(...)` in a training_step, as under `fast_dev_run`.
    """
    untyped: Any = trainer  # each namespace has its own type of logger
    loggers = untyped.loggers
    untyped.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        untyped.loggers = loggers


def state_key(callback: CallbackBase, **identity: str) -> str:
    """Return the key of a callback's state in a checkpoint, which contains these names and values."""
    return callback._generate_state_key(**identity)


class BarText:
    """Show a text in front of the training progress bar, for as long as the context lasts.

    Args:
        trainer: The Trainer whose progress bar is used, if it has one that is enabled.
    """

    def __init__(self, trainer: Trainer):
        bar: Any = trainer.progress_bar_callback
        self.bar: Any = bar if bar is not None and bar.is_enabled else None

    def __enter__(self) -> "BarText":
        self.before = self._description()
        return self

    def show(self, text: str) -> None:
        """Replace the text in front of the bar."""
        if self.before is not None:
            self._describe(text)

    def __exit__(self, *_: object) -> None:
        self.show(self.before or "")

    def _description(self) -> str | None:
        """Return the text that is there now, or None if no training bar is shown."""
        if self.bar is None or getattr(self.bar, "_train_progress_bar", True) is None:
            return None
        if getattr(self.bar, "train_progress_bar_id", True) is None:
            return None
        line = getattr(self.bar, "train_progress_bar", None)
        return None if line is None else str(getattr(line, "desc", getattr(line, "description", "")))

    def _describe(self, text: str) -> None:
        """Set the text, by the interface of either kind of bar."""
        line = self.bar.train_progress_bar
        if hasattr(line, "set_description_str"):  # tqdm
            line.set_description_str(text)
        else:  # rich
            self.bar.progress.update(self.bar.train_progress_bar_id, description=text)
            self.bar.refresh()


def print_on_rank_zero(trainer: Trainer, text: str) -> None:
    """Print one line on rank zero, without breaking the progress bar."""
    bar: Any = trainer.progress_bar_callback
    if bar is not None and bar.is_enabled:
        bar.print(text)
    else:
        pl.utilities.rank_zero_info(text)


def precision_of_training(module: Any) -> AbstractContextManager[Any]:
    """Return the context in which the Trainer of a LightningModule runs training steps: autocast, types of new tensors.

    Nothing is changed for a module without a Trainer.
    """
    try:
        return module.trainer.precision_plugin.train_step_context()
    except (AttributeError, RuntimeError):
        return nullcontext()


def loss_scale(trainer: Trainer) -> float:
    """Return the factor by which a GradScaler multiplies the loss; 1 if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return the loss scale that gradients still contain in `on_before_optimizer_step`; 1 if they are unscaled.

    Lightning unscales gradients before this hook, except those of fused optimizers, which do it in their step.

    Raises:
        RuntimeError: If a fused optimizer of PyTorch lacks the private attribute that marks it.
    """
    scale, plain = loss_scale(trainer), getattr(optimizer, "optimizer", optimizer)
    if scale == 1.0:
        return scale
    of_torch = any(kind.__module__.startswith("torch.optim.") for kind in type(plain).__mro__ if kind is not Optimizer)
    if of_torch and plain.defaults.get("fused"):  # as constructed; a checkpoint may replace its groups' options
        return scale if required(plain, "_step_supports_amp_scaling") else 1.0
    return scale if getattr(plain, "_step_supports_amp_scaling", False) else 1.0


@contextmanager
def changed_batches(
    module: LightningModule, note: Callable[[Any], None], change: Callable[[Any], Any]
) -> Iterator[None]:
    """Pass every batch that the Trainer loads to `note`, and replace it by `change(batch)` before the module sees it.

    If several contexts are active, each one notes the original batch, and the outermost one changes it.

    Args:
        module: The module that the Trainer runs.
        note: Called with each batch as it was loaded.
        change: Returns the batch that the module gets.
    """
    before, outermost = module._on_before_batch_transfer, "_on_before_batch_transfer" not in vars(module)

    def hook(batch: Any, dataloader_idx: int = 0) -> Any:
        note(batch)
        return before(change(batch) if outermost else batch, dataloader_idx)

    module.__dict__["_on_before_batch_transfer"] = hook
    try:
        yield
    finally:
        module.__dict__.pop("_on_before_batch_transfer", None)


@contextmanager
def changed_loaders(trainer: Trainer, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace every data loader that the Trainer sets up by `change(loader)`, for as long as the context lasts."""
    strategy = trainer.strategy
    before = strategy.process_dataloader
    strategy.__dict__["process_dataloader"] = lambda loader: change(before(loader))
    try:
        yield
    finally:
        strategy.__dict__.pop("process_dataloader", None)


def log_scalars(trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Log scalars to every logger of the Trainer."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step)


def param_groups(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Return the param groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def load_optimizers(trainer: Any, states: Sequence[Mapping[str, Any]]) -> None:
    """Give the states that a checkpoint has to the optimizers of the last fit, or else to new ones."""
    if len(trainer.strategy.optimizers) != len(states):
        trainer.strategy.setup_optimizers(trainer)
    trainer.strategy.load_optimizer_state_dict({"optimizer_states": states})


def common_lr(groups: Sequence[Mapping[str, Any]]) -> float:
    """Return the learning rate of param groups if all have the same; otherwise NaN."""
    rates = {float(group["lr"]) for group in groups}
    return rates.pop() if len(rates) == 1 else math.nan


def evaluated_loader(trainer: Trainer, index: int) -> Any:
    """Return the data loader of this index on which the Trainer validates, tests or predicts."""
    loop: Any = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else trainer._active_loop
    return loop._combined_loader.flattened[index]


class EvaluatedBatches:
    """The batches on which the Trainer validates, tests or predicts, as its module gets them; they can be read again.

    Args:
        trainer: The Trainer.

    Raises:
        ValueError: When they are read, if a loader or its data set can be read only once.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        loop: Any = self.trainer._active_loop
        strategy, module = self.trainer.strategy, self.trainer.lightning_module
        for i, (loader, count) in enumerate(zip(loop._combined_loader.flattened, loop.max_batches, strict=True)):
            dataset = getattr(loader, "dataset", None)
            if any(hasattr(source, "__next__") for source in (loader, dataset)):
                once = type(dataset if hasattr(dataset, "__next__") else loader).__name__
                raise ValueError(
                    f"a {once} can be read only once, and a preconditioner is fitted before rows are written; use data "
                    "that can be read again, or pass preconditioner=fit_preconditioner(model, some_batches)."
                )
            own = copy.copy(loader) if isinstance(loader, DataLoader) else loader
            if isinstance(own, DataLoader):  # persistent workers and a sampler that iterates serve the Trainer
                own.__dict__["_iterator"] = None
                own.__dict__["batch_sampler"] = copy.copy(own.batch_sampler)
            for batch in itertools.islice(own, None if count == math.inf else int(count)):
                batch = self.trainer.precision_plugin.convert_input(batch)
                batch = module._on_before_batch_transfer(batch, dataloader_idx=i)
                yield strategy.batch_to_device(batch, dataloader_idx=i)


def changed_hooks(module: LightningModule) -> list[str]:
    """Return the names of the hooks and steps that a LightningModule, or its class, overrides."""
    base = lightning_class(module)
    return [name for name in _hooks(base) if _code(getattr(module, name)) is not _code(getattr(base, name))]


def overridden_hooks(callback: Any) -> set[str]:
    """Return the names of the hooks that a callback of the user overrides; none for one of this package."""
    if isinstance(callback, CallbackBase):
        return set()
    bases = [kind for kind in type(callback).__mro__ if kind in (pl.Callback, *_CALLBACKS)]
    return {name for name in dir(bases[0]) if _code(getattr(callback, name)) is not _code(getattr(bases[0], name))}


def accumulates(trainer: Trainer) -> bool:
    """Return whether gradients of the present batch are accumulated, without a step of the optimizer after it."""
    return trainer.fit_loop._should_accumulate()


def does_itself(module: LightningModule, name: str) -> bool:
    """Return whether the class of a `ModuleBase` overrides this hook of Lightning."""
    return getattr(type(module), name, None) is not getattr(pl.LightningModule, name, None)


def like_namespace_of(trainer: Trainer, wrapper: LightningModule) -> None:
    """Give a `ModuleBase` the default hooks of a Trainer's namespace.

    Lightning decides whether a hook is overridden by comparing its code with the default of its own namespace.

    Args:
        trainer: The Trainer.
        wrapper: The `ModuleBase` that gets the hooks.
    """
    for name, hook in list(vars(wrapper).items()):
        if isinstance(hook, _Default):
            del wrapper.__dict__[name]
    theirs = pl.LightningModule if isinstance(trainer, pl.Trainer) else _MODULES[-1]
    for name in _hooks(theirs):
        if theirs is not pl.LightningModule and name not in vars(wrapper) and not does_itself(wrapper, name):
            wrapper.__dict__[name] = _Default(getattr(theirs, name), wrapper)  # a method is pickled by name only


class _Default(partial[Any]):
    """A hook that a `ModuleBase` has got from a namespace."""


def keep_hyperparameters_inside(wrapper: type) -> None:
    """Let a module inside a wrapper save its own hyper-parameters when LightningCLI makes both.

    LightningCLI gives every module that it makes for `model` the arguments of the outermost one to save.

    Args:
        wrapper: The class of the outermost module.
    """
    for namespace in {kind.__module__.removesuffix(".core.module") for kind in _MODULES}:
        instantiator = required(import_module(f"{namespace}.cli"), "_InstantiatorFn")
        if not hasattr(instantiator.__call__, "__wrapped__"):
            instantiator.__call__ = _with_own_hyperparameters(instantiator.__call__, wrapper)


def _with_own_hyperparameters(instantiate: Callable[..., Any], wrapper: type) -> Callable[..., Any]:
    @wraps(instantiate)  # jsonargparse reads the signature
    def own(self: Any, kind: type, *args: Any, **kwargs: Any) -> Any:
        config = self.cli.config.get(self.cli.config.get("subcommand"), self.cli.config)
        path = getattr(config.get(self.key), "class_path", "")
        home, _, name = path.rpartition(".")
        outermost = getattr(sys.modules.get(home), name, None)
        if isinstance(outermost, type) and issubclass(outermost, wrapper) and not issubclass(kind, wrapper):
            kwargs.pop("applied_instantiation_links", None)
            return kind(*args, **kwargs)
        return instantiate(self, kind, *args, **kwargs)

    return own


def unwrapped(module: Any) -> Any:
    """Return the LightningModule inside the wrapper of torch.compile; its compiled steps stay compiled."""
    return _maybe_unwrap_optimized(module) if hasattr(module, "_orig_mod") else module


def lightning_class(module: LightningModule) -> type:
    """Return the class LightningModule of the namespace that a module belongs to."""
    return next(base for base in _MODULES if isinstance(module, base))


def _hooks(base: type) -> list[str]:
    """Return the names of the public functions that a LightningModule adds to a module of PyTorch."""
    return [
        name
        for name in dir(base)
        if not name.startswith("_") and isinstance(getattr(base, name), FunctionType) and not hasattr(nn.Module, name)
    ]


def _code(function: Any) -> Any:
    """Return the code of a function, without a decorator around it."""
    return getattr(getattr(function, "__wrapped__", function), "__code__", None)


def trainer_class(module: LightningModule) -> type:
    """Return the class Trainer of a module's namespace."""
    return pl.Trainer if lightning_class(module) is pl.LightningModule else lp.Trainer


def train_for(trainer: Trainer, steps: int) -> None:
    """Override the length of training of an existing Trainer: this many optimizer steps, over any number of epochs."""
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.fit_loop.max_epochs = -1


def validation_schedule(trainer: Trainer) -> tuple[Any, ...]:
    """Return the Trainer's validation schedule and minimum length."""
    loop = trainer.fit_loop
    return trainer.val_check_interval, trainer.check_val_every_n_epoch, loop.min_epochs, loop.epoch_loop.min_steps


def set_validation_schedule(
    trainer: Trainer,
    val_check_interval: float | int,
    check_val_every_n_epoch: int | None = None,
    min_epochs: int | None = 0,
    min_steps: int | None = None,
) -> None:
    """Set the validation schedule; the defaults validate by batch count and allow an early stop."""
    trainer.val_check_interval, trainer.check_val_every_n_epoch = val_check_interval, check_val_every_n_epoch
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = min_epochs, min_steps


def validate_now(trainer: Trainer) -> None:
    """Run the validation of a fit between two batches, as the Trainer's schedule does."""
    loop, before = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector._first_loop_iter
    loop.restarting = False  # from its first batch, also where training goes on from a checkpoint
    trainer.validating = True
    loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = before


def loses_callback_state(trainer: Trainer) -> bool:
    """Return whether fit runs in spawned processes, whose callback state is lost: ddp_spawn, ddp_fork, ddp_notebook."""
    return isinstance(trainer.strategy.launcher, _SPAWN_LAUNCHERS)


_BEGUN: weakref.WeakSet[Any] = weakref.WeakSet()  # loggers whose W&B run is begun, and finished, for one run


def name_run(trainer: Trainer, name: str, group: str) -> None:
    """Set the name and the group of a W&B run that has not started, unless the user has set them.

    A run that is active, which Lightning's logger would take for its own, is left alone; so is one that the logger was
    given.
    """
    loggers: Sequence[Any] = trainer.loggers
    for logger in loggers:
        if not _is_wandb(logger) or logger._experiment is not None:
            continue
        options = required(logger, "_wandb_init")
        wandb: Any = sys.modules["wandb"]
        options["name"] = options.get("name") or name
        options["group"] = options.get("group") or group
        _BEGUN.add(logger)
        if wandb.run is not None and trainer.is_global_zero:
            options.update(reinit="create_new", id=options.get("id") or secrets.token_hex(4))
            active, wandb.run = wandb.run, None
            try:
                _ = logger.experiment
            finally:
                wandb.run = active


def close_run(trainer: Trainer, values: dict[str, float]) -> None:
    """Log the last values of a run, and finish it in W&B, where the next run would otherwise continue it."""
    loggers: Sequence[Any] = trainer.loggers
    for logger in loggers:
        logger.log_metrics(values, step=trainer.global_step)
        logger.save()
        if trainer.is_global_zero and logger in _BEGUN:
            logger.experiment.finish()


def _is_wandb(logger: Any) -> bool:
    """Return whether this is a WandbLogger, by class name, so that neither namespace's class is imported."""
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)


@contextmanager
def said_once() -> Iterator[None]:
    """Drop what Lightning itself logs of one more Trainer or fit if it has said the same before; keep warnings."""
    folders = tuple(f"{Path(str(package.__file__)).parent}{os.sep}" for package in _PACKAGES)
    said = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        known = text in said and record.levelno < logging.WARNING and record.pathname.startswith(folders)
        said.add(text)
        return not known

    log = rank_zero_module.log
    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


def without_summary(trainer: Trainer) -> None:
    """Remove the callbacks that print a summary of the module."""
    untyped: Any = trainer
    untyped.callbacks = [
        callback
        for callback in untyped.callbacks
        if not any(kind.__name__ == "ModelSummary" for kind in type(callback).__mro__)
    ]
