"""Preconditioners of the rows that a writer stores: fitted at a checkpoint, or an optimizer's at each of its steps."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sketch._lightning import (
    EvaluatedBatches,
    LightningModule,
    Trainer,
    load_optimizers,
    loss_scale,
    print_on_rank_zero,
)
from lightning_sketch.attribution.fit_preconditioner import fit_preconditioner
from lightning_sketch.attribution.preconditioner import DAMPING, FOLDER, Preconditioner
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.optimizer_state import check_adaptive, divisors
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.callbacks.gradient_sketch_writer._store_session import StoreRun
from lightning_sketch.per_example.factors import Factor
from lightning_sketch.per_example.hooks import Accumulator
from lightning_sketch.per_example.precondition import Block, Preconditioned

# What a writer takes: the name of one that it fits, the optimizer's, or one that was fitted before.
Choice = Literal["ekfac", "kfac", "optimizer"] | Preconditioner


def of_checkpoint(
    choice: Choice,
    trainer: Trainer,
    module: LightningModule,
    run: StoreRun,
    optimizer_states: Sequence[Mapping[str, Any]],
    **fit_options: Any,
) -> Preconditioner:
    """Return the preconditioner of rows at the module's present weights, and save it in the store; all ranks call it.

    One that the store has for these weights is used again, so that rows that are written in parts can be compared.

    Args:
        choice: Which one.
        trainer: The Trainer that evaluates the module.
        module: The module.
        run: The run of the store that rows are written to.
        optimizer_states: The states of the optimizers in the checkpoint that was loaded, if one was.
        **fit_options: Arguments of `fit_preconditioner`.

    Raises:
        MisconfigurationException: If there is no optimizer with a state.
        ValueError: As `fit_preconditioner`, or if the one that was passed is of other weights.
    """
    layout, weights = run.spec.parameters, module_fingerprint(module)
    folder = run.folder / FOLDER
    kept = trainer.strategy.broadcast(_kept(choice, folder, layout, weights) if trainer.is_global_zero else None)
    if kept is None:
        if isinstance(choice, Preconditioner):
            found = choice
        elif choice == "optimizer":
            found = _of_optimizer(trainer, module, layout, optimizer_states)
        else:
            passes = "two passes" if choice == "ekfac" else "one pass"
            print_on_rank_zero(
                trainer,
                f"preconditioner={choice!r}: {passes} over the data loader before its rows are written, of about three "
                "training steps a batch",
            )
            with preserve_state(module):  # a pass over a data loader draws random numbers
                found = fit_preconditioner(
                    module,
                    EvaluatedBatches(trainer),
                    choice,
                    parameters=list(layout.names),
                    processes=Ranks(trainer),
                    **fit_options,
                )
        if trainer.is_global_zero:
            run.keep(lambda: found.save(folder))
        if trainer.world_size == 1 or run.appender is None:
            return found
        kept = trainer.strategy.broadcast(found.id)
    else:
        again = f"preconditioner={choice!r}: that of earlier rows at these weights is used again"
        print_on_rank_zero(trainer, f"{again}: {Preconditioner.load(folder, kept)}")
    trainer.strategy.barrier()
    found = Preconditioner.load(folder, kept)  # eigenvectors have a sign, which may differ between machines
    return found if trainer.strategy.root_device.type == "cpu" else found.to(trainer.strategy.root_device)


def _kept(choice: Choice, folder: Path, layout: Layout, weights: int) -> int | None:
    """Return the id of the first preconditioner of this choice, these weights and parameters that a store has."""
    if isinstance(choice, Preconditioner):
        return None
    for path in Preconditioner.stored(folder):
        found = Preconditioner.read(path)
        with contextlib.suppress(ValueError):
            if found.kind == choice and found.damping == DAMPING:
                found.of(layout, weights)
                return found.id
    return None


class Ranks:
    """The ranks of a Trainer, each of which has other examples.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over ranks."""
        if self.trainer.world_size == 1:
            return tensor
        device = self.trainer.strategy.root_device
        return self.trainer.strategy.reduce(tensor.to(device), reduce_op="sum").to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        return [self.trainer.strategy.broadcast(value, rank) for rank in range(self.trainer.world_size)]


def _of_optimizer(
    trainer: Trainer, module: LightningModule, layout: Layout, states: Sequence[Mapping[str, Any]]
) -> Preconditioner:
    """Return the preconditioner of the optimizers that have trained the module, in this process or a checkpoint."""
    if states:
        try:
            load_optimizers(trainer, states)
        except Exception as error:
            raise MisconfigurationException(
                f"preconditioner='optimizer' calls configure_optimizers for the checkpoint's optimizers, which failed: "
                f"{error} Validate with the Trainer that has fitted, or pass Preconditioner.from_optimizer(...)."
            ) from error
    optimizers = [getattr(own, "optimizer", own) for own in trainer.optimizers]
    if not any(optimizer.state for optimizer in optimizers):
        raise MisconfigurationException(
            "preconditioner='optimizer' needs the optimizer that has trained these weights: validate with the Trainer "
            "that has fitted them, or pass ckpt_path=...; or use preconditioner='ekfac'."
        )
    return Preconditioner.from_optimizer(module, optimizers, parameters=list(layout.names))


class StepPreconditioner:
    """The diagonal P_t by which optimizers divide their steps, with the gradient of the step under way in it.

    A row of training is S P_t⁻¹ g, so that its product with S g of a query is how much the step lowers the query's
    loss, per learning rate.

    Args:
        trainer: The Trainer that runs the fit.
        parameters: The parameters that rows cover, by name.

    Raises:
        MisconfigurationException: If an optimizer has no such diagonal that is known.
    """

    def __init__(self, trainer: Trainer, parameters: Mapping[str, nn.Parameter]):
        self.trainer, self.parameters = trainer, dict(parameters)
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.held: dict[str, list[Factor]] = {}
        self.handles: list[Any] = []
        self.batches = 0  # of the step under way
        self.clipped = 1.0  # the factor of the last step that was clipped by its norm
        self.steps_done = -1
        self.accumulator: Accumulator | None = None
        for optimizer in trainer.optimizers:
            try:
                check_adaptive(optimizer)
            except ValueError as error:
                raise MisconfigurationException(f"preconditioner='optimizer': {error}") from error

    def clip(self, gradients: Mapping[str, Tensor | None], scale: float) -> dict[str, Tensor | None]:
        """Return the gradients of a step, by name, as the Trainer is going to clip them.

        Args:
            gradients: The gradients, without the factor of a loss scaler.
            scale: This factor, which the gradients of all parameters, whose norm counts, still have.
        """
        most = self.trainer.gradient_clip_val
        groups = (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        known = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not most or not known:
            return dict(gradients)
        if getattr(self.trainer.gradient_clip_algorithm, "value", None) == "value":
            return {name: None if g is None else g.clamp(-most, most) for name, g in gradients.items()}
        norm = torch.stack([g.detach().float().norm() for g in known]).norm() / scale
        self.clipped = float((most / (norm + 1e-6)).clamp(max=1.0))
        return {name: None if g is None else g * self.clipped for name, g in gradients.items()}

    def divided(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return P_t⁻¹ g of the gradients of the step, by name, which P_t has in it; None where none steps."""
        found = self._divisors({id(self.parameters[name]): g for name, g in gradients.items() if g is not None})
        return {name: g / found[name] if g is not None and name in found else None for name, g in gradients.items()}

    def begin_batch(self, accumulator: Accumulator) -> None:
        """Pass factors of the next batch on to an accumulator, divided once the gradient of their parameter is known.

        With accumulated batches that gradient is the mean of those so far; in DDP it is that of this process. Its
        clipping is that of the step before.
        """
        self.stop()
        if self.steps_done != self.trainer.global_step:
            self.steps_done, self.batches = self.trainer.global_step, 0
        self.batches += 1
        self.accumulator = accumulator
        for parameter in self.parameters.values():
            self.handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_known))

    def add(self, factor: Factor) -> None:
        """Hold a factor until the gradient of its parameter is known."""
        self.held.setdefault(self.names[id(factor.parameter)], []).append(factor)

    def stop(self) -> None:
        """Remove all hooks, and forget what is held."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.held.clear()

    @torch.no_grad()
    def _gradient_known(self, parameter: Tensor) -> None:
        """Pass on the factors of a parameter, divided; a hook."""
        name = self.names[id(parameter)]
        factors = self.held.pop(name, [])
        if not factors or parameter.grad is None or self.accumulator is None:
            return
        scale = self.clipped * self.trainer.accumulate_grad_batches / self.batches / loss_scale(self.trainer)
        found = self._divisors({id(parameter): parameter.grad * scale})
        if name in found:
            block = Block(0, found[name].square().view(1, -1))  # L = (P²)^-1/2
            own = Preconditioned({name: [block]}, 0.0, {name: self.parameters[name]})
            for factor in factors:
                for divided in own.factors(factor):
                    self.accumulator.add(divided)

    def _divisors(self, gradients: Mapping[int, Tensor]) -> dict[str, Tensor]:
        found: dict[int, Tensor] = {}
        for optimizer in self.trainer.optimizers:
            found |= divisors(optimizer, gradients)
        return {self.names[key]: divisor for key, divisor in found.items() if key in self.names}
