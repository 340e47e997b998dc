"""The spectrum of a checkpoint, from the configuration file of LightningCLI that made it."""

import pickle
import sys
import warnings
import zipfile
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement
from lightning_sketch.callbacks.spectrum_monitor.monitor import SpectrumMonitor

_READ = ("seed_everything", "trainer", "model", "data")  # what is needed of a configuration
_ONE_DEVICE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
_QUIET = {
    "logger": False,
    "callbacks": None,
    "profiler": None,
    "fast_dev_run": False,
    "barebones": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
_MEANT = ["shuffling enabled", "not have many workers", "isinstance.treespec", "GPU available", "following callbacks"]
_VALIDATION = ["validation_step", "on_validation_epoch_start", "on_validation_epoch_end"]
_VALIDATION += ["on_validation_batch_start", "on_validation_batch_end"]


def spectrum_of_run(
    config: Path,
    ckpt: str | None = None,
    model: str | None = None,
    data: str | None = None,
    *,
    num_batches: int = 4,
    **options: Any,
) -> Measurement:
    """Compute the spectrum of a checkpoint as a SpectrumMonitor would, on batches of the training data.

    Args:
        config: The YAML file.
        ckpt: The checkpoint; the initial weights if None.
        model: The class of the model, package.module.Class, if the file does not say it.
        data: The class of the data module, if there is one and the file does not say it.
        num_batches: How many batches of the training data to use.
        **options: Further arguments of `SpectrumMonitor`.

    Raises:
        ValueError: If the file does not say what the model is, or there are no training data.
        FileNotFoundError: If there is no such file.
        ImportError: If a class cannot be imported.
    """
    import yaml

    if ckpt is not None and not Path(ckpt).exists():
        raise FileNotFoundError(f"there is no checkpoint {ckpt}.")
    try:
        read = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is no YAML: {error}; pass the config.yaml that LightningCLI wrote.") from error
    if not isinstance(read, dict):
        raise ValueError(f"{config} is no configuration; pass the config.yaml that LightningCLI wrote.")
    found = {key: value for key, value in read.items() if key in _READ and value is not None}
    if ckpt is not None and not found.get("trainer", {}).get("plugins") and not _is_of_torch(Path(ckpt)):
        raise ValueError(f"{ckpt} is no checkpoint, or not a whole one; pass a file that ModelCheckpoint wrote.")
    sys.path.insert(0, "")  # classes of the working directory, as in the program that was run
    model_class = _class_of(found, "model", model)
    data_class = _class_of(found, "data", data)
    if model_class is None:
        raise ValueError(f"{config} does not say the class of the model; pass --model package.module.Class.")
    if isinstance(found.get("data"), dict) and data_class is None:
        raise ValueError(f"{config} does not say the class of the data; pass --data package.module.Class.")
    lightning = "lightning.pytorch" if _is_of(model_class, "lightning.pytorch") else "pytorch_lightning"
    found["trainer"] = {**found.get("trainer", {}), **_ONE_DEVICE, **_QUIET, "limit_val_batches": num_batches}
    asked = found["trainer"].get("accelerator", "auto")
    if not _is_here(asked):
        warnings.warn(f"there is no {asked} here, for which the file was made; another is used.", stacklevel=2)
        found["trainer"]["accelerator"] = "auto"
    if found.get("seed_everything") in (None, False):
        found["seed_everything"] = 0  # so that a loader that shuffles has the same batches each time
    fixed = [kind if "class_path" not in found.get(key, {}) else None for key, kind in
             {"model": model_class, "data": data_class}.items()]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # which is meant
        cli = _instantiated(lightning, found, *fixed)
    trainer, module, datamodule = cli.trainer, cli.model, getattr(cli, "datamodule", None)
    if ckpt is not None:
        _take_up(ckpt, module, trainer)
    monitor = SpectrumMonitor(stages=["validate"], num_batches=num_batches, **options)
    trainer.callbacks.append(monitor)
    source = module if datamodule is None else datamodule
    plain = import_module(lightning).LightningModule
    if type(source).train_dataloader is plain.train_dataloader:
        raise ValueError(f"{config} has neither `data` nor a model with a train_dataloader; pass --data.")
    for part in (module, datamodule):
        if part is not None:
            part.setup = partial(_set_up_to_fit, part.setup)
    source.val_dataloader = lambda: _one(source.train_dataloader())  # so that the hooks of a data module are called
    for hook in _VALIDATION:  # the monitor takes the loss of training_step, on batches that validation may not know
        setattr(module, hook, lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*({'|'.join(_MEANT)}).*")
        trainer.validate(module, datamodule=datamodule, ckpt_path=ckpt, verbose=False)
    return monitor.history[-1]


def _set_up_to_fit(setup: Any, stage: str | None = None) -> None:
    """Set a module or its data up as for training, whose loss is measured."""
    setup("fit")


def _one(loader: Any) -> Any:
    """Refuse several loaders, whose batches validation would draw one after the other."""
    if isinstance(loader, list | tuple | dict) or type(loader).__name__ == "CombinedLoader":
        raise ValueError("the training data have several loaders; measure by SpectrumMonitor while training.")
    return loader


def _take_up(ckpt: str, module: Any, trainer: Any) -> None:
    """Take up the epoch and the step of a checkpoint, on which a loss may depend.

    Refuse a module that has other arguments than the checkpoint's, such as linked ones, which no file has.
    """
    try:
        read = torch.load(ckpt, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(ckpt))
    except Exception:  # what other objects say is not known without running their code
        warnings.warn(
            "the checkpoint holds objects beside tensors and numbers, so that its epoch, step and arguments are not "
            "taken up or compared with the file's.",
            stacklevel=3,
        )
        return
    if "loops" in read:
        trainer.fit_loop.load_state_dict(read["loops"]["fit_loop"])
    saved = read.get("hyper_parameters", {})
    plain = {key: value for key, value in saved.items() if isinstance(value, str | int | float | bool)}
    now = {key: module.hparams[key] for key in plain.keys() & dict(module.hparams).keys() if not key.startswith("_")}
    if wrong := [key for key, value in now.items() if value != plain[key]]:
        listed = ", ".join(f"{key}={plain[key]!r} (file: {now[key]!r})" for key in sorted(wrong))
        raise ValueError(
            f"the checkpoint was made with {listed}, as by linked arguments; write these into `model` of the file."
        )


def _class_of(config: dict[str, Any], key: str, given: str | None) -> type | None:
    """Return the class that an argument, or else the file, names."""
    said = config[key].get("class_path") if isinstance(config.get(key), dict) else None
    if said is not None and said.startswith("__main__."):  # of the program that was run
        if given is None:
            raise ValueError(f"the file says that `{key}` is {said}, of a program; pass --{key} program.{said[9:]}.")
        config[key]["class_path"] = said = given
    named = given or said
    if named is None:
        return None
    package, _, name = str(named).rpartition(".")
    try:
        found = getattr(import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(f"cannot import the class {named} of `{key}`: {error}; run from the folder of it.") from error
    if given and said not in (None, given):
        raise ValueError(f"the file says that `{key}` is {said}, got {given}; leave it out.")
    return found


def _is_of_torch(ckpt: Path) -> bool:
    """Return whether a path may be what torch.save wrote, now or long ago, or a folder of shards."""
    if ckpt.is_dir() or zipfile.is_zipfile(ckpt):
        return True
    with open(ckpt, "rb") as file:
        return file.read(1) == pickle.PROTO


def _is_here(accelerator: Any) -> bool:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    known = {"cuda": cuda, "mps": mps, "gpu": cuda or mps}
    return not isinstance(accelerator, str) or known.get(accelerator, True)


def _is_of(model: type, namespace: str) -> bool:
    return any(base.__module__.startswith(namespace + ".") for base in model.__mro__)


def _instantiated(lightning: str, config: dict[str, Any], model: type | None, data: type | None) -> Any:
    """Return the LightningCLI that has made the Trainer, on one device and without loggers, and the model."""
    try:
        cli = import_module(f"{lightning}.cli").LightningCLI
    except ImportError as error:
        raise ImportError(
            f"a configuration needs jsonargparse: pip install 'lightning-sketch[cli]': {error}"
        ) from error
    return cli(
        model,
        data,
        run=False,
        save_config_callback=None,
        parser_kwargs={"exit_on_error": False},
        auto_configure_optimizers=False,
        args=config,
    )
