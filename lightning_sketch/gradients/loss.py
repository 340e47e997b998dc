"""A module's own training loss on a batch, and how many examples a batch has."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

LossFn = Callable[[nn.Module, Any], Tensor]
"""(module, batch) -> mean loss of the batch, a scalar."""


def training_step_loss(module: nn.Module, batch: Any) -> Tensor:
    """The loss that the module's own `training_step` returns, with its logging silenced.

    Raises:
        ValueError: if the step uses manual optimization or returns no loss.
    """
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"{type(module).__name__} optimizes by hand, so its training_step has side effects and need not return a "
            "loss; pass loss_fn=lambda module, batch: ..."
        )
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError(
            "training_step(dataloader_iter) fetches its own batches; pass loss_fn=lambda module, batch: ..."
        )
    with _silent(module):
        output = module.training_step(batch, 0) if _takes_two(parameters) else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise ValueError(
            f"training_step of {type(module).__name__} returned no loss for this batch; return a scalar, "
            "or pass loss_fn=lambda module, batch: ..."
        )
    return loss


def _takes_two(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether Lightning would pass `batch_idx` as well; further arguments keep their defaults."""
    kinds = [parameter.kind for parameter in parameters.values()]
    named = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) + kinds.count(inspect.Parameter.POSITIONAL_ONLY)
    return named > 1 or inspect.Parameter.VAR_POSITIONAL in kinds


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Replace `log` and `log_dict` of every submodule: a second call would overwrite what the user logged."""
    parts = [part for part in module.modules() if hasattr(type(part), "log_dict")]
    before = [{name: vars(part)[name] for name in ("log", "log_dict") if name in vars(part)} for part in parts]
    for part in parts:
        part.__dict__["log"] = part.__dict__["log_dict"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            del part.__dict__["log"], part.__dict__["log_dict"]
            part.__dict__.update(own)


def num_examples(batch: Any) -> int:
    """How many examples a batch has: the first axis of the first tensor in it, as Lightning counts.

    >>> import torch
    >>> num_examples({"x": (torch.zeros(8, 3), torch.zeros(8))})
    8
    """
    size = next(_sizes(batch), None)
    if size is None:
        raise ValueError(
            f"found no tensor with a first axis in a batch of type {type(batch).__name__}, so its number of examples "
            "is unknown; use batches that are tensors or collections of tensors."
        )
    return size


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch.shape[0]
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _sizes(value)
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from _sizes(getattr(batch, field.name))
