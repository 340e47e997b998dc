"""A weighted mean over batches: in parts that fit into memory, and over the ranks of a process group."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lightning_sketch.gradients import differentiable, num_examples, split_batch

Add = Callable[[Any, float], None]
"""Adds a part of this weight to a total."""


class Batches:
    """Batches that are read again for each mean.

    Args:
        batches: a list of them, or any iterable that can be read again and again.
        weight_fn: batch -> its weight.
        micro_batch_size: most examples at once; larger batches are cut. None: as they come.
        distributed: sum over the ranks of the default process group, each with its own batches.
        widen: turn half-precision tensors into float32.
        device: where ranks sum up; NCCL knows no CPU.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        weight_fn: Callable[[Any], float],
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
        self.batches, self.weight_fn, self.micro_batch_size = batches, weight_fn, micro_batch_size
        self.distributed, self.widen, self.device = distributed, widen, device
        self._may_be_cut: set[int] = set()  # indices of batches that were looked at

    @property
    def single(self) -> bool:
        """Whether there is one part only, the same each time."""
        return isinstance(self.batches, list | tuple) and len(self.batches) == 1 and not self._is_cut(self.batches[0])

    def mean(self, total: Tensor, add: Add, loss: Callable[[Any], Tensor], restart: Callable[[], None]) -> Tensor:
        """`total`, to which add(part, weight) adds each part of each batch, over the sum of all weights.

        Out of memory, parts are halved, with a warning, and all is done again after restart(). loss(part), its mean
        loss, tells whether a batch may be cut.

        Raises:
            ValueError: if there is no example, or a batch may not be cut.
            RuntimeError: if another rank failed; what fails here is raised here, once all ranks know.
        """
        weight, failure = torch.zeros((), dtype=torch.float64), None
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
        """Whether all parts went through in this size; if not, the next size is half."""
        largest = 0
        try:
            for part in self._parts(loss):
                largest = max(largest, num_examples(part))
                share = float(self.weight_fn(part))
                if share:  # the mean over nothing is NaN
                    add(part, share)
                    weight.add_(share)
        except RuntimeError as error:
            largest = largest or self.micro_batch_size or 0
            if not _is_out_of_memory(error) or largest < 2:
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

    def _parts(self, loss: Callable[[Any], Tensor]) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            batch = differentiable(batch, self.widen)
            if not self._is_cut(batch):
                yield batch
                continue
            if index not in self._may_be_cut:
                self._check_cut(batch, loss)
                self._may_be_cut.add(index)
            yield from split_batch(batch, self.micro_batch_size)

    def _summed(self, tensor: Tensor) -> Tensor:
        """Over all ranks."""
        there = tensor.to(self.device)
        torch.distributed.all_reduce(there)
        return there.to(tensor.device)

    def _is_cut(self, batch: Any) -> bool:
        return self.micro_batch_size is not None and num_examples(batch) > self.micro_batch_size

    def _check_cut(self, batch: Any, loss: Callable[[Any], Tensor]) -> None:
        """Refuse to cut a batch whose loss is not the mean of the losses of its parts: halves of each part tell."""
        size = self.micro_batch_size
        try:
            with torch.no_grad():
                for part in split_batch(batch, max(2, size)):  # the whole batch may not fit
                    self._check_halves(part, max(1, size // 2), loss)
        except RuntimeError as error:
            if not _is_out_of_memory(error) or size > 1:  # else two examples are too many
                raise

    def _check_halves(self, part: Any, size: int, loss: Callable[[Any], Tensor]) -> None:
        halves = [(float(self.weight_fn(half)), half) for half in split_batch(part, size)]
        weight = sum(w for w, _ in halves)
        if len(halves) == 1 or not weight:
            return
        whole, mean = float(loss(part)), sum(w * float(loss(half)) for w, half in halves if w) / weight
        if not (math.isclose(whole, mean, rel_tol=1e-3, abs_tol=1e-6) or math.isnan(whole)):
            raise ValueError(
                f"the loss of {num_examples(part)} examples, {whole:.6g}, is not the weighted mean of those of its "
                f"parts of {size}, {mean:.6g}, so that a batch cannot be cut; pass weight_fn (num_labels for a mean "
                "over tokens), or load smaller batches."
            )


def _is_out_of_memory(error: RuntimeError) -> bool:
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in words or "allocate memory" in words
