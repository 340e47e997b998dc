"""Computes the sketched gradient of each example at the current weights of a module."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_sketch._arguments import check_data, check_loss_fn, kind_of
from lightning_sketch.attribution.fit_preconditioner import fit_preconditioner
from lightning_sketch.attribution.indexed_dataset import batch_ids, indexed, without_index
from lightning_sketch.attribution.preconditioner import Kind as PreconditionerKind
from lightning_sketch.attribution.preconditioner import Preconditioner
from lightning_sketch.autodiff.batches import (
    BatchStructure,
    differentiable,
    has_labels,
    labels_of,
    on_device,
    repeated,
    with_labels,
)
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn, training_step_loss
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.example_sketches import Engine, ExampleSketches
from lightning_sketch.per_example.verify import tolerance
from lightning_sketch.per_example.weights import Reduction
from lightning_sketch.store.sketched_gradients import UNKNOWN_ID, Column, SketchedGradients, Strings, say_rows

# (module, batch) -> loss of each example, probability of its true label.
RowFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]

_IGNORED = -100  # the label that losses of PyTorch ignore


def sketch_gradients(
    module: nn.Module,
    batches: Iterable[Any],
    sketch: Sketch,
    loss_fn: LossFn | None = None,
    *,
    row_fn: RowFn | None = None,
    engine: Engine = "auto",
    parameters: str | list[str] = "*",
    weight_fn: Callable[[Any], float] | None = None,
    reduction: Reduction | None = None,
    index_key: str | int | None = None,
    num_examples: int | Callable[[Any], int] | None = None,
    batch_dim: int = 0,
    split_fn: Callable[[Any], Iterable[Any]] | None = None,
    per_token: bool = False,
    preconditioner: Preconditioner | PreconditionerKind | None = None,
) -> SketchedGradients:
    """Compute the sketched gradient of each example's own loss, in evaluation mode and float32 or wider.

    How the loss weighs the examples of a batch (equally, by their labels that are not -100, shifted or not, by the ones
    of a mask, as a sum) is found on each batch, by comparison with the gradients of two of its examples alone. Where
    none of these ways fits, a warning says so once, and the examples are computed one at a time from then on.

    Args:
        module: The module, which is left as it was.
        batches: Batches of examples as the loss takes them, such as a data loader.
        sketch: The sketch, whose `n` is the number of these parameters.
        loss_fn: (module, batch) -> the mean loss, or one loss per example, or a mapping with the entry "loss". If None,
            the module's own `training_step`, without its logging.
        row_fn: (module, batch) -> (losses, probabilities of the true labels), one per example, for the columns `loss`
            and `prob_true`, which the curvatures "margin" and "trak" need. Without it hooks fill them where the loss is
            a usual one, such as cross-entropy, of the output of `forward` or of one of the module's children. Of a
            document the probability is the geometric mean over its tokens, the exponential of minus its mean loss.
        engine: "hooks", from the ordinary backward pass of a whole batch; "vmap"; "loop", one example at a time, which
            supports every module; "auto": hooks, as long as two examples of each batch show that they are exact, else
            the loop.
        parameters: The parameters, as shell patterns of their names.
        weight_fn: batch -> the weight of the batch in a mean over batches, such as the sum of its class weights, where
            none of the usual ways fits.
        reduction: "mean", or "sum" if the loss is a sum over examples; found by itself if None.
        index_key: Where a batch has the ids of its examples, or "hash"; see `batch_ids`. If it has an id for each
            label, as packed documents have, there is a row for each document of each example, and -1 is no document. A
            document that continues in another example has a row for each part, with its number in the column `part`.
        num_examples: The number of examples of a batch, or batch -> this number, if its tensors disagree; each item of
            a list of this length is then an example.
        batch_dim: The axis of the examples, 1 for (time, batch, ...), with the loop only.
        split_fn: batch -> batches of one example, for graphs, with the loop only.
        per_token: Whether to compute a row for each label that is not -100, of the loss of this token alone, with its
            position in the column `token`, and that of its example among all in the column `example`. The labels are
            the entry "labels" of a batch, or the last of a tuple.
        preconditioner: What gradients are multiplied by before they are sketched, so that `dot` is influence, see
            `fit_preconditioner`; rows and queries need the same. "ekfac" or "kfac" fits it to these batches,
            "optimizer" takes that of the Trainer of the module.

    Returns:
        The rows, (examples, dim), in the order of the examples, with the columns `example_id`, `loss` and `prob_true`
        where they are known, `weight` (the example's weight in a mean over its batch), `scale_known`, `fingerprint` and
        `preconditioner` (its `id`, or 0).

    Raises:
        ValueError: if sizes disagree, or the engine does not support the module; the message has the parameter and the
            reason.

    Cost: with hooks about two training steps per batch, one of them for the sketch, and two passes of one example; with
    the loop a step per example; per token or packed document a pass of its whole example for each row.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> module, x = nn.Linear(3, 1), torch.randn(8, 3)
    >>> rows = sketch_gradients(module, [x], BlockSRHT(4, 4), lambda module, x: module(x).square().mean())
    >>> rows.sketches.shape
    torch.Size([8, 4])
    """
    check_data(module, batches, "sketch_gradients")
    if not isinstance(sketch, Sketch):
        raise TypeError(
            f"sketch_gradients takes a sketch, got {kind_of(sketch)}; pass BlockSRHT(n, dim) with n the number of "
            "parameters, or store.sketch for the one of a store."
        )
    if loss_fn is not None:
        check_loss_fn(loss_fn)
    layout = Layout.of(module, parameters)
    if sketch.n != layout.n:
        raise ValueError(
            f"the sketch takes n={sketch.n} numbers, these parameters have {layout.n}; build it with n={layout.n}, "
            "or pass the parameters that it was made for."
        )
    if loss_fn is None and not hasattr(module, "training_step"):
        raise ValueError(f"{type(module).__name__} has no training_step; pass loss_fn=lambda module, batch: mean loss.")
    structure = BatchStructure(num_examples, batch_dim, split_fn)
    if isinstance(preconditioner, str) and preconditioner == "optimizer":
        preconditioner = _of_trainer(module, layout)
    elif isinstance(preconditioner, str):
        if iter(batches) is batches:
            raise ValueError(
                f"preconditioner={preconditioner!r} is fitted to the batches before their rows are computed, and these "
                "can be read only once; pass a list or a data loader, or what fit_preconditioner returned."
            )
        preconditioner = fit_preconditioner(
            module,
            batches,
            preconditioner,
            parameters=list(layout.names),
            loss_fn=loss_fn,
            weight_fn=weight_fn,
            reduction=reduction,
            num_examples=num_examples,
            batch_dim=batch_dim,
            split_fn=split_fn,
        )
    sketches = ExampleSketches(
        module,
        layout,
        sketch=sketch,
        loss_fn=loss_fn or training_step_loss,
        engine=engine,
        weight_fn=weight_fn,
        reduction=reduction,
        structure=structure,
        gradient_map=None if preconditioner is None else preconditioner.of(layout, module_fingerprint(module)),
    )
    made_by = 0 if preconditioner is None else preconditioner.id
    make = ExampleRows(sketches, row_fn, per_token=per_token, preconditioner=made_by)
    parts: list[SketchedGradients] = []
    for batch in indexed(batches):
        parts.append(make(without_index(batch), batch_ids(batch, index_key, structure=structure)))
        if make.in_doubt:
            parts = [doubted(part) for part in parts[:-1]] + parts[-1:]
    if not parts:
        raise ValueError("sketch_gradients got no batches; pass a list of them or a data loader.")
    make.warn_of_odd_rows()
    return SketchedGradients.cat(parts)


class ExampleRows:
    """A function from a batch and the ids of its examples to their rows.

    The rows have the fingerprint of the module as it was when this object was made.

    Args:
        sketches: Computes the sketched gradients.
        row_fn: As in `sketch_gradients`.
        per_token: As in `sketch_gradients`.
        preconditioner: The `id` of the preconditioner of the rows; 0 for none.

    Attributes:
        fingerprint: The fingerprint of the module.
        in_doubt: Whether the last batch has shown that rows of batches before it may have a wrong scale.
        places: The place in its batch of the example of each row of the last batch.
    """

    def __init__(
        self,
        sketches: ExampleSketches,
        row_fn: RowFn | None = None,
        *,
        per_token: bool = False,
        preconditioner: int = 0,
    ):
        self.sketches, self.row_fn, self.per_token, self.preconditioner = sketches, row_fn, per_token, preconditioner
        self.device = next(iter(sketches.parameters.values())).device
        self.fingerprint = module_fingerprint(sketches.module)
        self.in_doubt, self.places = False, torch.zeros(0, dtype=torch.long)
        self._rows = self._zero = self._not_finite = self._examples = 0
        self._parts: Counter[int] = Counter()  # how often each packed document was seen
        self._warned = False

    def __call__(self, batch: Any, ids: Column) -> SketchedGradients:
        """Return the rows, on the CPU."""
        with preserve_state(self.sketches.module):
            batch = on_device(differentiable(batch), self.device)
            if self.per_token or (isinstance(ids, Tensor) and ids.ndim == 2):
                rows = SketchedGradients.cat(list(self._of_labels(batch, ids)))
            else:
                rows, self.in_doubt = self._of_examples(batch, {"example_id": ids})
                self.places = torch.arange(len(rows))
        sizes = rows.sketches.norm(dim=1)
        self._rows += len(rows)
        self._zero += int((sizes == 0).sum())
        self._not_finite += int((~sizes.isfinite()).sum())
        return rows

    def warn_of_odd_rows(self) -> None:
        """Warn of rows that are zero or not finite, with their number."""
        if self._not_finite:
            warnings.warn(
                f"{self._not_finite} of {self._rows} rows are not finite, as their loss or its gradient is not; they "
                "are marked (column 'finite') and never scored.",
                stacklevel=3,
            )
        what = "are zero: their loss does not depend on the parameters, or all of their labels are ignored"
        say_rows(self._zero, self._rows, what)

    def _of_examples(self, batch: Any, columns: dict[str, Any]) -> tuple[SketchedGradients, bool]:
        """Return the rows of a batch on the device, with these columns and those that are found."""
        found = self.sketches(batch)
        count = len(found.rows)
        columns = {
            **columns,
            "fingerprint": torch.full((count,), self.fingerprint),
            "preconditioner": torch.full((count,), self.preconditioner),
            "weight": found.weights.float(),
            "scale_known": torch.full((count,), found.scale_known),
        }
        if found.losses is not None:
            columns["loss"] = found.losses.float().cpu()
        if found.probabilities is not None:
            columns["prob_true"] = found.probabilities.float().cpu()
        if self.row_fn is not None:
            losses, probabilities = self.row_fn(self.sketches.module, batch)  # not under no_grad, see bitsandbytes
            columns |= {"loss": losses.detach().float().cpu(), "prob_true": probabilities.detach().float().cpu()}
        return SketchedGradients(found.rows.cpu(), self.sketches.sketch, columns), found.in_doubt

    def _of_labels(self, batch: Any, ids: Column) -> Iterator[SketchedGradients]:
        """Yield rows for parts of the labels of each example: one for each token, or for each packed document.

        A part is a copy of the example in which all other labels are ignored.
        """
        if not has_labels(batch) or labels_of(batch).ndim != 2 or labels_of(batch).is_floating_point():
            raise ValueError(
                "rows of tokens or packed documents need labels of whole numbers, (examples, tokens), as the entry "
                "'labels' of the batch or the last item of a tuple; those to ignore are -100."
            )
        examples, places, self.in_doubt = self.sketches.structure.count(batch), [], False
        batch = _with_decoder_inputs(self.sketches.module, batch)
        for place in range(examples):
            example = self.sketches.structure.one(batch, place, examples)
            labels = labels_of(example)
            counted = labels[0] != _IGNORED
            columns: dict[str, Any]
            if self.per_token:
                tokens = counted.nonzero()[:, 0].cpu()
                keep = torch.nn.functional.one_hot(tokens, len(counted)).bool()
                named = ids if isinstance(ids, Strings) or ids.ndim == 1 else None
                of_rows = ids[place, tokens] if named is None else named[torch.full((len(tokens),), place)]
                columns = {
                    "example_id": of_rows,
                    "token": tokens,
                    "example": torch.full_like(tokens, self._examples + place),
                }
            else:
                documents = ids[place][counted.cpu()].unique()
                documents = documents[documents != UNKNOWN_ID]
                keep = (ids[place] == documents[:, None]) & counted.cpu()
                self._parts.update(documents.tolist())
                columns = {"example_id": documents, "part": [self._parts[i] - 1 for i in documents.tolist()]}
            if not len(keep):
                continue
            rows = SketchedGradients.cat(list(self._of_copies(example, labels, keep, columns, examples)))
            rows = self._compared(
                rows, with_labels(example, torch.where(keep.any(0).to(labels.device), labels, _IGNORED))
            )
            rows = rows.where(rows.weight != 0)  # the first label of a causal model is predicted by nothing
            places.append(torch.full((len(rows),), place))
            yield rows
        self._examples += examples
        if not places:
            raise ValueError("no label of the batch counts, all are -100 or belong to no document, so it has no rows.")
        self.places = torch.cat(places)

    def _of_copies(
        self, example: Any, labels: Tensor, keep: Tensor, columns: Mapping[str, Any], most: int
    ) -> Iterator[SketchedGradients]:
        """Yield the rows of copies of an example, each with a part of its labels, at most `most` copies at a time."""
        for start in range(0, len(keep), most):
            part = slice(start, start + most)
            masked = torch.where(keep[part].to(labels.device), labels, _IGNORED)
            copies = with_labels(repeated(example, len(masked)), masked)
            rows, in_doubt = self._of_examples(copies, {name: column[part] for name, column in columns.items()})
            self.in_doubt |= in_doubt
            counts = keep[part].sum(1).float()
            yield SketchedGradients(
                rows.sketches, rows.sketch, {**rows.columns, "weight": rows.weight.where(~rows.weight.isnan(), counts)}
            )

    def _compared(self, rows: SketchedGradients, example: Any) -> SketchedGradients:
        """Return the rows of parts of an example's labels, marked if they do not add up to the example's own gradient.

        They do not if the loss is no mean over labels that are not -100, or the model reads its labels.
        """
        whole, _ = self.sketches.alone(example, 0, 1)
        total = (rows.weight[:, None] * rows.sketches).sum(0) / rows.weight.sum()
        error = tolerance(self.sketches.parameters)
        if (total - whole.cpu()).norm() <= 5 * error * whole.cpu().norm() or not whole.isfinite().all():
            return rows
        if not self._warned:
            self._warned = True
            warnings.warn(
                "rows of tokens or documents do not add up to the gradient of their example, as the loss is no mean "
                "over the labels that are not -100, or the model makes its inputs from them: they are marked as of "
                "unknown scale. Give the batch all inputs of the model, and mark what does not count by -100.",
                stacklevel=4,
            )
        return doubted(rows)


def _with_decoder_inputs(module: nn.Module, batch: Any) -> Any:
    """Return a batch with the inputs of the decoder that a model of Hugging Face would make from the labels."""
    makers = [
        part.prepare_decoder_input_ids_from_labels
        for part in module.modules()
        if getattr(getattr(part, "config", None), "is_encoder_decoder", False)
        and hasattr(part, "prepare_decoder_input_ids_from_labels")
    ]
    if not makers or not isinstance(batch, Mapping) or "decoder_input_ids" in batch:
        return batch
    return {**batch, "decoder_input_ids": cast(Any, makers[0])(labels=labels_of(batch))}


def doubted(rows: SketchedGradients) -> SketchedGradients:
    """Return rows with their scale marked as not known."""
    unknown = torch.zeros(len(rows), dtype=torch.bool)
    return SketchedGradients(rows.sketches, rows.sketch, {**rows.columns, "scale_known": unknown})


def _of_trainer(module: nn.Module, layout: Layout) -> Preconditioner:
    """Return the preconditioner of the optimizers that train a LightningModule."""
    optimizers = getattr(getattr(module, "_trainer", None), "optimizers", None)
    if not optimizers:
        raise ValueError(
            f"preconditioner='optimizer' takes that of the Trainer that has trained the module, and this "
            f"{type(module).__name__} has none; pass Preconditioner.from_optimizer(module, optimizer)."
        )
    return Preconditioner.from_optimizer(module, optimizers, parameters=list(layout.names))
