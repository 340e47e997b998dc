"""The callback that logs the spectrum of the loss's curvature while the Trainer of Hugging Face trains."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import OutputLossName
from lightning_sketch.autodiff.optimizer_state import check_adaptive
from lightning_sketch.autodiff.preserve_state import Mode
from lightning_sketch.callbacks._optimizers import UNKNOWN
from lightning_sketch.callbacks.hugging_face import _trainer as hf
from lightning_sketch.callbacks.spectrum_monitor._console import Console
from lightning_sketch.callbacks.spectrum_monitor._estimator import Curvature, SpectrumEstimator
from lightning_sketch.callbacks.spectrum_monitor._logging import over_time
from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement, appended
from lightning_sketch.callbacks.spectrum_monitor._probe_batches import ProbeBatches
from lightning_sketch.callbacks.spectrum_monitor._scalars import Keys
from lightning_sketch.callbacks.spectrum_monitor._validate import check_arguments, check_preconditioned
from lightning_sketch.curvature import Preconditioned, stability_edge
from lightning_sketch.curvature.critical_learning_rate import copy_weights, critical_learning_rate
from lightning_sketch.curvature.hessian import HVP
from lightning_sketch.curvature.result import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SpectrumCallback(TrainerCallback):
    """Log the eigenvalues of the loss's curvature, every epoch or every given number of steps.

    The matrix, what is logged under which key, error bars and cost are those of `SpectrumMonitor`. Numbers go through
    `trainer.log` to every logger and to `trainer.state.log_history`, with NaN where an eigenvalue has not converged;
    `callback.history` has the measurements of this process, `callback.plot()` draws them, and a line in the console
    says what they mean for the learning rate. AdamW, the default, has an edge of stability only with
    `preconditioner="optimizer"`; a step that was clipped has none that is known.

    The matrix is that of the mean over fixed examples, drawn from the training data by `seed`, with the dropout of
    evaluation, in float32. A batch counts by its labels that are not -100, and without whole labels by its examples.
    (For some causal models, GPT-2 among them, transformers 5 divides by all labels, also the first of each row, which
    nothing predicts: the loss that it trains on rows of T labels is (T - 1) / T of this mean.)

    Training is unaffected: the final weights are the same, bit for bit, with and without the callback. Under DDP each
    rank has its own examples.

    Args:
        trainer: The Trainer, whose loss is measured.
        curvature: "hessian", "ggn" or "fisher".
        top_k: The number of largest eigenvalues to compute.
        bottom_k: The number of smallest eigenvalues to compute.
        num_matvecs: The maximal number of products of one measurement.
        every_n_epochs: The number of epochs between measurements; 1 if neither interval is set.
        every_n_train_steps: The number of optimizer steps between measurements, instead of epochs.
        num_batches: The number of batches, of `per_device_train_batch_size` examples.
        batches: The batches to measure on, as the data collator makes them, instead of examples that are drawn; for
            streams, and data that draws random numbers from elsewhere than Python, NumPy, torch and its own generators.
        at_start: Whether to measure the initial weights too.
        parameters: Which parameters to include, as a shell pattern on their names.
        seed: The seed of the examples, the start vectors and the sketches.
        loss_fn: (module, batch) -> mean loss; what the Trainer trains if None, called without `num_items_in_batch`.
        weight_fn: batch -> its weight in the mean over batches.
        name: The prefix of the keys; that of SpectrumMonitor if None.
        on_error: What to do if a measurement fails during training: "warn" logs NaN, "raise" stops.
        preconditioner: "optimizer" for the matrix that the edge of stability of Adam and its like is one of.
        method: As in `SpectrumMonitor`, as are all that follow.
        dim: The size of the sketches.
        tol: The largest relative residual of an eigenvalue that counts as converged.
        density_probes: The number of further random starts, for the density of all eigenvalues.
        per_layer: Whether to log the top eigenvalue and the trace of each layer's own block too.
        model_fn: (module, batch) -> output, for "ggn".
        output_loss_fn: (output, batch) -> mean loss, for "ggn".
        num_examples: The number of examples in a batch, or batch -> this number.
        batch_dim: The axis of the examples.
        micro_batch_size: The maximal number of examples to differentiate at once.
        hvp: How Hessian products are computed.
        mode: "eval", or "train" for the curvature with live dropout.
        noise_samples: The number of draws that a loss with random numbers is averaged over.
        over_batches: Whether to measure how far lambda_max depends on the choice of batches.

    Raises:
        ValueError: If an argument is out of its range. Before training, if the Trainer shards parameters, examples
            cannot be drawn, or three products on the batches fail.

    Example::

        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.add_callback(SpectrumCallback(trainer))
        trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        curvature: Curvature = "hessian",
        *,
        top_k: int = 10,
        bottom_k: int = 3,
        num_matvecs: int = 96,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        num_batches: int = 4,
        batches: Iterable[Any] | None = None,
        at_start: bool = False,
        parameters: str = "*",
        seed: int = 0,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        weight_fn: Callable[[Any], float] | None = None,
        name: str | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        preconditioner: Literal["optimizer"] | None = None,
        method: Method = "lanczos",
        dim: int = 1024,
        tol: float = 1e-2,
        density_probes: int = 0,
        per_layer: bool | list[str] = False,
        model_fn: Callable[[Any, Any], Any] | None = None,
        output_loss_fn: OutputLossName | Callable[[Tensor, Any], Tensor] | None = None,
        num_examples: int | Callable[[Any], int] | None = None,
        batch_dim: int = 0,
        micro_batch_size: int | None = None,
        hvp: HVP = "auto",
        mode: Mode = "eval",
        noise_samples: int = 1,
        over_batches: bool = False,
    ):
        check_arguments(on_error, "train", ["fit"], every_n_epochs, every_n_train_steps, num_batches, over_batches)
        check_preconditioned(preconditioner, ["fit"], at_start)
        hf.check(trainer, "SpectrumCallback")
        self.estimator = SpectrumEstimator(
            curvature=curvature,
            method=method,
            top_k=top_k,
            bottom_k=bottom_k,
            num_matvecs=num_matvecs,
            dim=dim,
            tol=tol,
            density_probes=density_probes,
            parameters=parameters,
            loss_fn=loss_fn or hf.loss_of(trainer),
            seed=seed,
            per_layer=per_layer,
            model_fn=model_fn,
            output_loss_fn=output_loss_fn,
            weight_fn=weight_fn or (None if loss_fn else hf.weight_of(trainer)),
            num_examples=num_examples,
            batch_dim=batch_dim,
            micro_batch_size=micro_batch_size,
            hvp=hvp,
            mode=mode,
            noise_samples=noise_samples,
            over_batches=over_batches,
        )
        self.trainer, self.batches, self.seed = trainer, batches, seed
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs or (None if every_n_train_steps else 1)
        self.name = name or (f"{curvature}_preconditioned" if preconditioner else curvature)
        self.preconditioner, self.at_start, self.on_error = preconditioner, at_start, on_error
        self.history: list[Measurement] = []
        self._probes, self._num_batches = ProbeBatches(num_batches), num_batches
        self._keys = Keys.of(self.name, self.estimator)
        cadence = "every_n_train_steps" if every_n_train_steps else "every_n_epochs"
        self._console = Console(self.name, cadence, getattr(self, cadence), top_k)
        self._steps, self._now, self._groups = hf.BeforeSteps(), UNKNOWN, list[dict[str, Any]]()
        self._weights: dict[str, Tensor] = {}  # before the step under way, if a measurement may follow it
        self._ends: set[int] = set()  # numbers of steps that an epoch may have

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Draw the examples and take three products on them, as a sanity check; measure the initial weights if due."""
        model, optimizer, loader = objects["model"], hf.bare(objects["optimizer"]), objects["train_dataloader"]
        hf.check(self.trainer, "SpectrumCallback")
        if self.preconditioner and type(optimizer) is not torch.optim.SGD:
            check_adaptive(optimizer)
        drawn = self.batches
        if drawn is None:
            drawn = hf.training_batches(self.trainer, loader, self._num_batches, self.seed)
        self._probes = ProbeBatches(len(batches := list(drawn)))
        for batch in batches:
            self._probes.offer(batch)
        probes, distributed = self._probes.on_device(args.device), args.world_size > 1
        with hf.without_autocast(model):
            self.estimator.check(model, probes, distributed)
            self.estimator.check_weights(model, probes, distributed)
        self._keys = Keys.of(self.name, self.estimator, Layout.of(model, self.estimator.parameters))
        self.history = [m for m in self.history if m.step <= state.global_step] if state.global_step else []
        with suppress(TypeError):  # a stream without a length
            whole, rest = divmod(len(loader), args.gradient_accumulation_steps)
            self._ends = {whole, whole + (rest > 0)} - {0}
        self._steps.attach(optimizer, self._before_step)
        self._console.start()
        if self.at_start and not state.global_step:
            self._note_rates(optimizer)
            self._measure(args, state, control, model, optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Copy the weights before a step that a measurement may follow."""
        step = state.global_step + 1
        if self.every_n_train_steps:
            due = step % self.every_n_train_steps == 0
        else:
            due = step == state.max_steps or any(step % (n * (self.every_n_epochs or 1)) == 0 for n in self._ends)
        self._weights = copy_weights(objects["model"]) if due else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Measure if it is due."""
        if self.every_n_train_steps and state.global_step % self.every_n_train_steps == 0:
            self._measure(args, state, control, objects["model"], hf.bare(objects["optimizer"]))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Measure if it is due."""
        if self.every_n_epochs and (hf.epoch_of(state, ended=True) + 1) % self.every_n_epochs == 0:
            self._measure(args, state, control, objects["model"], hf.bare(objects["optimizer"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Look at no more steps."""
        self._steps.detach()

    def plot(self) -> "Figure":
        """Draw the eigenvalues over all measurements, as a matplotlib figure.

        Raises:
            ValueError: If there is no measurement yet.
            ImportError: If matplotlib is missing.
        """
        if not self.history:
            raise ValueError("nothing to plot: there is no measurement yet; run trainer.train() first.")
        return over_time(self.history, self.estimator, self.name)

    def _note_rates(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = [dict(group) for group in optimizer.param_groups]  # a scheduler changes them after the step
        self._now = stability_edge(optimizer, preconditioned=self.preconditioner is not None, groups=self._groups)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rate of a step, and whether its gradient was clipped."""
        self._note_rates(optimizer)
        largest = self.trainer.args.max_grad_norm
        if self._weights and largest:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if float(torch.nn.utils.get_total_norm(gradients)) > 0.999 * largest * hf.gradient_scale(optimizer):
                why = "the gradient was clipped, by a factor that the Trainer does not tell"
                self._now = self._now._replace(edge=math.nan, reason=self._now.reason or why)

    def _measure(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Measure, and log the result, or NaN where that fails."""
        before, self._weights = self._weights, {}
        scalars, step = self._keys.all_nan(), state.global_step
        try:
            with hf.without_autocast(model):
                measured = self.estimator.measure(
                    model,
                    self._probes.on_device(args.device),
                    hf.epoch_of(state, ended=True),
                    step,
                    args.world_size > 1,
                    None,
                    (lambda matrix: Preconditioned.from_optimizer(matrix, optimizer, groups=self._groups))
                    if self.preconditioner
                    else None,
                    (lambda matrix: critical_learning_rate(matrix, before, self._now.lr)) if before else None,
                )
        except Exception as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"{self.name}: no measurement at step {step}: {error}", stacklevel=2)
        else:
            now = self.estimator.compared(self._now)
            self.history, measured = appended(self.history, measured, now, self.estimator.top_k)
            scalars = self._keys.values(measured)
            self._console.measured(lambda text: hf.say(self.trainer, text), measured)
        due = control.should_log  # which `log` resets, though the Trainer's own numbers are still to come
        self.trainer.log(scalars)
        control.should_log = due
        self._console.resume()
