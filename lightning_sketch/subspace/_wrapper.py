"""A LightningModule around another: the inner one's own steps, hooks, logging and hyper-parameters go on working."""

import functools
from collections.abc import MutableMapping
from typing import Any

from pytorch_lightning.utilities.parsing import AttributeDict

from lightning_sketch._lightning import LightningModule, ModuleBase, changed_hooks, does_itself, like_namespace_of
from lightning_sketch.autodiff.losses import call_step

_STEPS = ("validation_step", "test_step", "predict_step")
_LOGGING = ("log", "log_dict")
_TOLD = ("trainer", "_device_mesh", "_current_fx_name", "_metric_attributes")


class Wrapper(ModuleBase):
    """Hands everything that it does not do itself to `module`.

    Lightning asks a module which hooks it has. So the wrapper has, as an object and not as a class, those of the module
    inside: they are that one's own bound methods. What the module logs goes under its own names.

    Args:
        module: a LightningModule of either namespace.
    """

    def __init__(self, module: LightningModule):
        super().__init__()
        self.module = module
        for name in changed_hooks(module):
            if name in _STEPS:
                self.__dict__[name] = functools.partial(self._evaluate, name)
            elif name not in _LOGGING and not does_itself(self, name):
                self.__dict__[name] = getattr(module, name)
        like_namespace_of(module, self)
        if module.example_input_array is not None:
            self.example_input_array = module.example_input_array

    @property
    def strict_loading(self) -> bool:
        """As the module says."""
        return self.module.strict_loading

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self.module.strict_loading = strict

    @property
    def hparams(self) -> MutableMapping[str, Any]:
        """The module's hyper-parameters and the wrapper's own, which win where names are equal; set where they are."""
        own = super().hparams
        return _Both(self.module.hparams, own) if self.__dict__.get("_begun") else own

    @property
    def hparams_initial(self) -> dict[str, Any]:
        """What is logged: the module's hyper-parameters, and the wrapper's own as `subspace/dim` and so on.

        Loggers refuse a name that both a module and its data have, `seed` for instance.
        """
        own = {f"subspace/{name}": value for name, value in super().hparams_initial.items()}
        return {**self.module.hparams_initial, **own}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The module's own; of hyper-parameters the wrapper's alone, which `load_from_checkpoint` makes it from."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = dict(super().hparams)
        self.module.on_save_checkpoint(checkpoint)

    def ready(self) -> None:
        """Bring the inner module up to date; called before each of its steps."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        self.ready()
        return self.module(*args, **kwargs)

    def _evaluate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.ready()
        return call_step(getattr(self.module, name), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked for, the module may have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not self.__dict__.get("_begun"):  # names that are not taken yet
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What Lightning tells the module that it fits is passed on, across namespaces too.

        What only the module has is set there: a learning rate that `Tuner.lr_find` found, say. So is an optimizer that
        LightningCLI was asked for, which is then reused as the module's own would be.
        """
        theirs = not self._has(name) and hasattr(self.module, name) if self.__dict__.get("_begun") else False
        if theirs or name == "configure_optimizers":
            setattr(self.module, name, value)
            return
        super().__setattr__(name, value)
        if name in _TOLD and "module" in self.__dict__.get("_modules", {}):
            setattr(self.module, name, value)

    def _has(self, name: str) -> bool:
        return name in self.__dict__ or name in self._parameters or name in self._modules or hasattr(type(self), name)


class _Both(AttributeDict):
    """Two sets of hyper-parameters as one; of equal names the second's."""

    def __init__(self, first: MutableMapping[str, Any], second: MutableMapping[str, Any]):
        super().__init__({**first, **second})
        self.__dict__.update(sources=(second, first))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """One by one."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        second, first = self.__dict__["sources"]
        (first if name in first and name not in second else second)[name] = value
