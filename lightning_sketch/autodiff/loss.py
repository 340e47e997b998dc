"""A module's own training loss on a batch."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import copied

LossFn = Callable[[nn.Module, Any], Tensor]
"""(module, batch) -> mean loss of the batch, a scalar."""


def training_step_loss(module: nn.Module, batch: Any, batch_idx: int = 0) -> Tensor:
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
        try:
            output = module.training_step(batch, batch_idx) if _takes_two(parameters) else module.training_step(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            mode = "training" if module.training else "evaluation"
            raise RuntimeError(
                f"training_step of {type(module).__name__} failed when called for its loss, in {mode} mode: "
                f"{type(error).__name__}: {error}. Pass loss_fn=lambda module, batch: ..."
            ) from error
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise ValueError(
            f"training_step of {type(module).__name__} returned no loss for this batch; return a scalar, "
            "or pass loss_fn=lambda module, batch: ..."
        )
    return loss


def on_copies(loss_fn: LossFn) -> LossFn:
    """The same loss, of a copy of the batch: a step may change its batch in place, and is called again on it."""
    return lambda module, batch: loss_fn(module, copied(batch))


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
