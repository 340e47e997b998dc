"""What the Trainer of Hugging Face trains on: its loss, batches of its data set, and its optimizer's steps."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_sketch.autodiff.batches import num_examples, num_labels
from lightning_sketch.autodiff.losses import LossFn
from lightning_sketch.autodiff.preserve_state import preserve_state, restorer_of_generator
from lightning_sketch.autodiff.shards import is_sharded

_FEW = 64  # most parts of an object that are looked at, which are no examples
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def model_of(trainer: Trainer) -> nn.Module:
    """Return the model that is trained, without the wrappers of DDP and torch.compile."""
    model: Any = trainer.model
    return model


def check(trainer: Trainer, name: str) -> None:
    """Check before training that parameters are whole.

    Raises:
        ValueError: If they are sharded; the message says what to do.
    """
    sharded = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    sharded["tensor parallelism"] = is_sharded(model_of(trainer))
    for kind, used in sharded.items():
        if used:
            raise ValueError(
                f"{name} needs whole parameters and gradients, got a Trainer with {kind}, which has them in shards. "
                "Train with DDP or on one device, measure checkpoints in one process, or use SpectrumMonitor and "
                "GradientSketchWriter in a Trainer of Lightning with ModelParallelStrategy (FSDP2)."
            )


def model_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model of transformers returns for a batch with labels."""
    returned = module(**batch)
    return returned["loss"] if isinstance(returned, Mapping) else returned[0]


def loss_of(trainer: Trainer) -> LossFn:
    """Return the loss that a Trainer trains, as a mean over one batch: the model's own unless the Trainer has another.

    It is called without `num_items_in_batch`, and logs nothing.
    """
    functions = trainer.label_smoother, getattr(trainer, "compute_loss_func", None)
    if getattr(trainer.compute_loss, "__func__", None) is Trainer.compute_loss and functions == (None, None):
        return model_loss

    def loss(module: nn.Module, batch: Any) -> Tensor:
        kept = _containers(vars(trainer))  # where a compute_loss of one's own counts or collects
        trainer.__dict__["log"] = lambda *args, **kwargs: None
        try:  # it takes the labels out of the batch
            found: Any = trainer.compute_loss(module, dict(batch) if isinstance(batch, Mapping) else batch)
            return found
        except TypeError as error:
            raise TypeError(
                f"the Trainer's loss failed without num_items_in_batch: {error}. Pass loss_fn=lambda module, batch: "
                "the mean loss of the batch."
            ) from error
        finally:
            for container, before in kept:
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(before)

    return loss


def _containers(owner: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Return a dictionary, and those and the lists in it, each with a copy; data sets are left out."""
    found: list[tuple[Any, Any]] = [(owner, dict(owner))]
    for name, value in owner.items():
        if name in ("train_dataset", "eval_dataset"):
            continue
        if isinstance(value, dict) and value is not owner:
            found += _containers(value)
        elif isinstance(value, list):
            found.append((value, list(value)))
    return found


def weight_of(trainer: Trainer) -> Callable[[Any], float]:
    """Return the function batch -> its number of labels that count, or of examples where it has no such labels."""
    model = next((part for part in model_of(trainer).modules() if isinstance(part, PreTrainedModel)), None)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # and what inherits from these
    causal = any(kind.__name__ in known for kind in type(model).__mro__)

    def weight(batch: Any) -> float:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return float(num_examples(batch))
        return float(num_labels(batch, shift=causal and labels.ndim > 1))

    return weight


def training_batches(trainer: Trainer, loader: Any, number: int, seed: int) -> list[Any]:
    """Return batches of examples that are drawn from the training data, on each rank others.

    No random number of the training is drawn, and no iterator of the loader is begun.

    Args:
        trainer: The Trainer.
        loader: Its data loader, whose data set and collate function are used.
        number: The number of batches; fewer if the data set has no more.
        seed: The seed of the draw, and of random numbers of the data set.

    Raises:
        ValueError: If the data set cannot be read at any place.
    """
    dataset: Any = getattr(loader, "dataset", None)
    size = trainer.args.per_device_train_batch_size
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"SpectrumCallback draws examples of the training data, got a {type(dataset).__name__}, which is read in "
            "its own order only; pass batches=[...], some batches as the data collator makes them."
        )
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    with preserve_state(model_of(trainer)) as preserved, _unchanged(dataset), _unchanged(loader.collate_fn):
        preserved.draw(seed)
        most = min(len(dataset), number * size * ranks)
        mine = random.Random(seed).sample(range(len(dataset)), most)[rank::ranks]
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        return [loader.collate_fn([_copied(dataset[place]) for place in part]) for part in parts]


def _copied(example: Any) -> Any:
    """Return a copy of an example that is a dictionary, from which a collate function may take parts."""
    return dict(example) if type(example) is dict else example


@contextmanager
def _unchanged(owner: Any) -> Iterator[None]:
    """Restore the attributes of a data set or a collate function, and of the one inside, with random generators."""
    kept, generators = [], [restorer_of_generator(each) for each in _generators(owner)]
    while hasattr(owner, "__dict__"):
        own = vars(owner)
        kept.append((own, dict(own)))
        owner = own.get("dataset", own.get("data_collator"))
    try:
        yield
    finally:
        for own, before in kept:
            own.clear()
            own.update(before)
        for restore in generators:
            restore()


def _generators(owner: Any) -> list[Any]:
    """Return the random generators that an object has, also in data sets and transforms that it holds."""
    found, seen, waiting = [], set[int](), [owner]
    while waiting:
        owner = waiting.pop()
        if id(owner) in seen or isinstance(owner, type | ModuleType | Tensor | nn.Module):
            continue
        seen.add(id(owner))
        if isinstance(owner, _GENERATORS):
            found.append(owner)
            continue
        inside = owner if isinstance(owner, dict) else getattr(owner, "__dict__", None)
        parts = owner if inside is None else list(inside.values())
        if isinstance(parts, list | tuple) and len(parts) <= _FEW:
            waiting += parts
    return found


@contextmanager
def without_autocast(module: nn.Module) -> Iterator[None]:
    """Call a module by its own `forward`, without the autocast that accelerate puts around it."""
    wrapped = vars(module).pop("forward", None) if "_original_forward" in vars(module) else None
    try:
        yield
    finally:
        if wrapped is not None:
            vars(module)["forward"] = wrapped


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside the wrapper of accelerate."""
    while hasattr(optimizer, "accelerator_state"):
        optimizer = optimizer.optimizer
    return optimizer


class BeforeSteps:
    """Call a function with an optimizer whenever that is about to step: after unscaling, clipping and averaging.

    A step that a GradScaler skips is none.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def attach(self, optimizer: torch.optim.Optimizer, function: Callable[[torch.optim.Optimizer], object]) -> None:
        """Begin to call the function."""
        self.detach()

        def call(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            function(optimizer)

        self._handle = optimizer.register_step_pre_hook(call)

    def detach(self) -> None:
        """Call it no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def gradient_scale(optimizer: torch.optim.Optimizer) -> float:
    """Return the factor that gradients still have: a GradScaler leaves it to fused optimizers to divide by it."""
    scale: Any = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def epoch_of(state: Any, *, ended: bool = False) -> int:
    """Return the epoch under way, from 0; after the last step of an epoch, with `ended`, still that one."""
    epoch = float(state.epoch or 0)
    return max(0, math.ceil(epoch - 1e-6) - 1) if ended else int(epoch + 1e-6)


def say(trainer: Trainer, text: str) -> None:
    """Print one line in the first process, without breaking a progress bar."""
    if trainer.is_world_process_zero():
        tqdm.write(text)
