"""A LightningModule around another one, whose steps, hooks, logging and hyper-parameters keep working."""

import functools
from collections.abc import MutableMapping
from typing import Any

from pytorch_lightning.utilities.parsing import AttributeDict

from lightning_sketch._lightning import LightningModule, ModuleBase, changed_hooks, does_itself, like_namespace_of
from lightning_sketch.autodiff.losses import call_step
from lightning_sketch.subspace._state_dict import note_kind

_STEPS = ("validation_step", "test_step", "predict_step")
_LOGGING = ("log", "log_dict")
# What Lightning sets on the module that it fits, and the inner module needs too.
_FORWARDED = ("trainer", "_device_mesh", "_current_fx_name", "_metric_attributes")


class Wrapper(ModuleBase):
    """Delegate to an inner module everything that the wrapper does not do itself.

    Lightning inspects which hooks a module overrides. The wrapper therefore gets those of the inner module as
    attributes of the object, bound to the inner module; its class overrides none of them. The inner module logs under
    its own names.

    Args:
        module: A LightningModule of either namespace.
    """

    def __init__(self, module: LightningModule):
        super().__init__()
        self.module = module
        for name in changed_hooks(module):
            if name in _STEPS:
                self.__dict__[name] = functools.partial(self._evaluate, name)
            elif name not in _LOGGING and not does_itself(self, name):
                self.__dict__[name] = getattr(module, name)
        if module.example_input_array is not None:
            self.example_input_array = module.example_input_array

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must match all keys, as the inner module says."""
        return self.module.strict_loading

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self.module.strict_loading = strict

    @property
    def hparams(self) -> MutableMapping[str, Any]:
        """The hyper-parameters of both modules; the wrapper's win if names are equal, and writes go to their owner."""
        own = super().hparams
        return _MergedHparams(self.module.hparams, own) if self.__dict__.get("_initialized") else own

    @property
    def hparams_initial(self) -> dict[str, Any]:  # type: ignore[override]  # loggers need a dict, not Lightning's class
        """The hyper-parameters that are logged: the inner module's, and the wrapper's with the prefix `subspace/`.

        The prefix is there since loggers refuse a name that both a module and its data have, for instance `seed`.
        """
        own = {f"subspace/{name}": value for name, value in super().hparams_initial.items()}
        return {**self.module.hparams_initial, **own}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the wrapper's hyper-parameters, the arguments of `load_from_checkpoint`; then run the module's hook."""
        own = super().hparams.items()  # of how LightningCLI made it only the class, by which it resumes
        kept = {key: value for key, value in own if key == "_class_path" or not key.startswith("_")}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = kept
        note_kind(checkpoint["state_dict"])
        self.module.on_save_checkpoint(checkpoint)

    def ready(self) -> None:
        """Update the inner module; called before each of its steps."""

    def _evaluate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.ready()
        return call_step(getattr(self.module, name), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner module if the wrapper has none of this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not self.__dict__.get("_initialized"):  # the wrapper sets its own names first
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute on the module that has it, and forward to the inner module what Lightning sets.

        An attribute that only the inner module has is set there, such as a learning rate found by `Tuner.lr_find`. So
        is `configure_optimizers`, which LightningCLI replaces for an optimizer of the command line; the wrapper then
        uses it as it would use the module's own.
        """
        theirs = not self._has(name) and hasattr(self.module, name) if self.__dict__.get("_initialized") else False
        if theirs or name == "configure_optimizers":
            setattr(self.module, name, value)
            return
        super().__setattr__(name, value)
        if name in _FORWARDED and "module" in self.__dict__.get("_modules", {}):
            setattr(self.module, name, value)
        if name == "trainer" and value is not None:
            like_namespace_of(value, self)

    def _has(self, name: str) -> bool:
        return name in self.__dict__ or name in self._parameters or name in self._modules or hasattr(type(self), name)


class _MergedHparams(AttributeDict):
    """Two sets of hyper-parameters as one; the second wins if names are equal.

    Args:
        first: The hyper-parameters of the inner module.
        second: Those of the wrapper, which also get new names.
    """

    def __init__(self, first: MutableMapping[str, Any], second: MutableMapping[str, Any]):
        super().__init__({**first, **second})
        self.__dict__.update(sources=(second, first))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update each entry through `__setitem__`."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        second, first = self.__dict__["sources"]
        (first if name in first and name not in second else second)[name] = value
