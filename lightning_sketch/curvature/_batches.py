"""Weighted means over batches that are read again for every mean, whole or cut into parts that fit in memory."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lightning_sketch.autodiff.batches import BatchStructure, differentiable, shapes_of
from lightning_sketch.autodiff.memory import is_out_of_memory

Add = Callable[[Any, float], None]  # adds a part of a batch, times its weight, to a total


class Batches:
    """Batches over which weighted means are taken.

    Args:
        batches: A list of batches, or any iterable that can be read again and again.
        weight_fn: A function batch -> its weight in the mean; its number of examples if None.
        structure: How many examples a batch has, and along which axes.
        micro_batch_size: Most examples at once; larger batches are cut. Never cut if None.
        distributed: Whether to sum over the ranks of the default process group, each with its own batches.
        widen: Whether to convert half-precision tensors to float32.
        device: Device on which ranks sum; NCCL cannot sum on the CPU.

    Raises:
        TypeError: If `batches` is a tensor or can be read only once.
        ValueError: If `micro_batch_size` is below 1.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        weight_fn: Callable[[Any], float] | None,
        structure: BatchStructure,
        micro_batch_size: int | None,
        distributed: bool,
        widen: bool,
        device: torch.device,
    ):
        if isinstance(batches, Tensor):
            raise TypeError("batches is a list of batches, got one tensor; pass [batch].")
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches is read again for every product, got a {type(batches).__name__} that can be read only "
                "once; pass list(batches)."
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"need micro_batch_size >= 1, got {micro_batch_size}.")
        self.batches, self.weight_fn, self.structure = batches, weight_fn, structure
        self.micro_batch_size = micro_batch_size
        self.distributed, self.widen, self.device = distributed, widen, device
        self._may_be_cut: set[int] = set()  # indices of batches that passed the check

    @property
    def single(self) -> bool:
        """Whether there is only one batch, never cut and the same each time."""
        return isinstance(self.batches, list | tuple) and len(self.batches) == 1 and not self._is_cut(self.batches[0])

    def mean(self, total: Tensor, add: Add, loss: Callable[[Any], Tensor], restart: Callable[[], None]) -> Tensor:
        """Return the weighted mean over all batches, in the memory of `total`.

        If memory runs out, parts are halved with a warning, and the mean starts again.

        Args:
            total: Zeros, the sum to start from.
            add: Called as add(part, weight) for each part of each batch; adds the part, times its weight, to `total`.
            loss: A function part -> its mean loss, by which it is checked that a batch may be cut.
            restart: Called before the mean starts again.

        Raises:
            ValueError: If there is no example, or a batch may not be cut.
            RuntimeError: If another rank failed. An error of this rank is raised after all ranks have been informed.
        """
        weight = torch.zeros((), dtype=torch.float64)
        failure: Exception | None = None
        try:
            while not self._all_fit(total, weight, add, loss):
                restart()
                total.zero_()
                weight.zero_()
        except Exception as error:
            if not self.distributed:
                raise
            weight.fill_(torch.nan)
            failure = error
        if self.distributed:
            weight = self._summed(weight)
            if weight.isnan():
                raise failure or RuntimeError("another rank could not take its part of this product; see its output.")
            total = self._summed(total)
        if not weight:
            raise ValueError("batches holds no example, so there is no loss to differentiate; pass at least one batch.")
        return total.div_(float(weight))

    def _all_fit(self, total: Tensor, weight: Tensor, add: Add, loss: Callable[[Any], Tensor]) -> bool:
        """Add all parts to the total, or halve the size of parts; return whether all of them fit in memory."""
        part: Any = None
        examples: int | None = None
        try:
            for part, examples in self._parts(loss):
                share = self._weight(part, examples)
                if share:  # the mean loss of a part without weight is NaN
                    add(part, share)
                    weight.add_(share)
        except (RuntimeError, MemoryError) as error:
            largest = self._examples_in(part, examples) if is_out_of_memory(error) else 0
            if largest < 2:
                raise
        else:
            return True
        self.micro_batch_size, self._may_be_cut = largest // 2, set()
        torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory with {largest} examples at once; going on with micro_batch_size={self.micro_batch_size}.",
            stacklevel=2,
        )
        return False

    def _parts(self, loss: Callable[[Any], Tensor]) -> Iterator[tuple[Any, int | None]]:
        """Yield the parts of all batches, each with its number of examples, or None if it is a whole batch."""
        size = self.micro_batch_size
        for index, batch in enumerate(self.batches):
            batch = differentiable(batch, self.widen)
            if size is None or not self._is_cut(batch):
                yield batch, None
                continue
            if index not in self._may_be_cut:
                self._check_cut(batch, size, loss)
                self._may_be_cut.add(index)
            yield from self.structure.parts(batch, size)

    def _weight(self, part: Any, examples: int | None) -> float:
        """Return the weight of a part: that of `weight_fn`, or its number of examples.

        Where the number is not known but all batches have equal shapes, they have equal weights, and 1 is returned.
        """
        if self.weight_fn is not None:
            return float(self.weight_fn(part))
        if examples is not None:
            return float(examples)
        try:
            return float(self.structure.count(part))
        except ValueError:
            if self.distributed or not self._alike():
                raise
            return 1.0

    def check_weights(self) -> None:
        """Refuse batches whose weights are not known, before anything is computed.

        Raises:
            ValueError: If the number of examples of a batch is not known; the message says how to pass it.
        """
        for part in self.batches if self.micro_batch_size is None else ():
            self._weight(part, None)

    def _alike(self) -> bool:
        """Return whether all batches have equal shapes, and so equal weights."""
        return isinstance(self.batches, list | tuple) and len({shapes_of(batch) for batch in self.batches}) == 1

    def _examples_in(self, part: Any, examples: int | None) -> int:
        """Return the number of examples of a part that did not fit in memory; 0 if unknown: it cannot be halved."""
        if examples is not None or part is None:
            return examples or self.micro_batch_size or 0
        try:
            return self.structure.count(part)
        except ValueError:
            return 0

    def _summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        summed = tensor.to(self.device)
        torch.distributed.all_reduce(summed)
        return summed.to(tensor.device)

    def _is_cut(self, batch: Any) -> bool:
        return self.micro_batch_size is not None and self.structure.count(batch) > self.micro_batch_size

    def _check_cut(self, batch: Any, size: int, loss: Callable[[Any], Tensor]) -> None:
        """Refuse to cut a batch whose loss is not the mean of the losses of its parts, compared by halves of parts."""
        self._check_weights(batch, size)
        try:
            with torch.no_grad():
                for part, examples in self.structure.parts(batch, max(2, size)):  # the whole may not fit in memory
                    self._check_halves(part, examples, max(1, size // 2), loss)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size > 1:  # at size 1 the check itself needs two examples at once
                raise

    def _check_weights(self, batch: Any, size: int) -> None:
        """Refuse to cut a batch whose weight is not the sum of the weights of its parts."""
        if self.weight_fn is None:
            return
        whole, parts = float(self.weight_fn(batch)), [p for p, _ in self.structure.parts(batch, size)]
        added = sum(float(self.weight_fn(part)) for part in parts)
        if not math.isclose(whole, added, rel_tol=1e-6):
            raise ValueError(
                f"weight_fn gives {whole:g} for a batch and {added:g} for its {len(parts)} parts together, so "
                "the parts do not consist of what it counts; pass num_examples (len for a list of examples), or leave "
                "micro_batch_size out."
            )

    def _check_halves(self, part: Any, examples: int, size: int, loss: Callable[[Any], Tensor]) -> None:
        halves = [(self._weight(half, count), half) for half, count in self.structure.parts(part, size, examples)]
        weight = sum(w for w, _ in halves)
        if len(halves) == 1 or not weight:
            return
        whole, mean = float(loss(part)), sum(w * float(loss(half)) for w, half in halves if w) / weight
        if not (math.isclose(whole, mean, rel_tol=1e-3, abs_tol=1e-6) or math.isnan(whole)):
            raise ValueError(
                f"the loss of {examples} examples, {whole:.6g}, is not the weighted mean of those of its parts of "
                f"{size}, {mean:.6g}, so that a batch cannot be cut; pass weight_fn (num_labels for a mean over "
                "tokens), or load smaller batches."
            )
