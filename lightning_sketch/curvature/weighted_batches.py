"""Weighted means over batches: over parts of them, draws of random numbers, and ranks."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lightning_sketch._arguments import check_batches
from lightning_sketch.autodiff.batches import BatchStructure, differentiable, shapes_of
from lightning_sketch.autodiff.memory import is_out_of_memory
from lightning_sketch.autodiff.preserve_state import raise_interrupt
from lightning_sketch.autodiff.second_derivatives import NoSecondDerivative

Add = Callable[[Any, float], None]  # adds a part of a batch, times its weight, to a total

_NO_EXAMPLE = "batches holds no example, so there is no loss to differentiate; pass at least one batch."
AGREED = "known_to_all_ranks"  # the attribute of an error that all ranks have been informed of
_DRAWS_COMPARED = 8  # draws over which the loss of a whole batch is compared with that of its parts


class WeightedBatches:
    """Batches over which weighted means are taken.

    Args:
        batches: A list of batches, or any iterable that can be read again and again.
        weight_fn: A function batch -> its weight in the mean; its number of examples if None.
        structure: How many examples a batch has, and along which axes.
        micro_batch_size: Most examples at once; larger batches are cut. Never cut if None.
        distributed: Whether to sum over the ranks of the default process group, each with its own batches.
        dtype: The type to which narrower tensors of a batch are converted; None if the module has no narrow ones.
        device: Device on which ranks sum; NCCL cannot sum on the CPU.

    Attributes:
        key: The place of the part under way: batch, first example, draw of random numbers. The same key, the same
            random numbers.
        draws: The number of draws of random numbers that the mean is taken over.
        is_random: Whether the loss draws random numbers.

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
        dtype: torch.dtype | None,
        device: torch.device,
    ):
        check_batches(batches)
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches is read again for every product, got a {type(batches).__name__} that can be read only "
                "once; pass list(batches)."
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"need micro_batch_size >= 1, got {micro_batch_size}.")
        self.batches, self.weight_fn, self.structure = batches, weight_fn, structure
        self.micro_batch_size = micro_batch_size
        self.distributed, self.dtype, self.device = distributed, dtype, device
        self.first, self.rank = 0, torch.distributed.get_rank() if distributed else 0
        self.key, self.draws, self.is_random = (0, 0, 0), 1, False
        self._may_be_cut: set[int] = set()  # indices of batches that passed the check

    @property
    def single(self) -> bool:
        """Whether there is only one batch, never cut and the same each time, with one draw of random numbers."""
        return (
            self.draws == 1
            and isinstance(self.batches, list | tuple)
            and len(self.batches) == 1
            and not self._is_cut(self.batches[0])
        )

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
            weight.fill_(torch.inf if isinstance(error, NoSecondDerivative) else torch.nan)
            failure = error
        if self.distributed:
            weight = _agree(weight, self.device, failure)
            total = _summed(total, self.device)
        if not weight:
            raise ValueError(_NO_EXAMPLE)
        return total.div_(float(weight))

    def _all_fit(self, total: Tensor, weight: Tensor, add: Add, loss: Callable[[Any], Tensor]) -> bool:
        """Add all parts to the total, or halve the size of parts; return whether all of them fit in memory."""
        part: Any = None
        examples: int | None = None
        try:
            for part, examples in self._parts(loss):
                raise_interrupt()
                share = self.weight(part, examples) / self.draws
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
        """Yield the parts of all batches, each with its number of examples, or None if it is a whole batch.

        A part is yielded once for each draw of random numbers.
        """
        size = self.micro_batch_size
        for index, batch in enumerate(self.batches, start=self.first):
            self.key = index, 0, 0
            batch = differentiable(batch, self.dtype)
            whole = size is None or not self._is_cut(batch)
            if size is not None and not whole and index not in self._may_be_cut:
                self._check_cut(batch, size, loss)
                self._may_be_cut.add(index)
            start = 0
            for part, examples in [(batch, None)] if whole else self.structure.parts(batch, size or 1):
                for draw in range(self.draws):
                    self.key = index, start, draw
                    yield part, examples
                start += examples or 0

    def first_that_fits(self, function: Callable[[Any], Any]) -> Any:
        """Return function(part), of as much of the first batch with any weight as fits in memory, or None."""
        for batch in self.batches:
            batch = differentiable(batch, self.dtype)
            if not (self.single or self.weight(batch, None)):
                continue
            size = self.micro_batch_size
            while True:
                try:
                    return function(batch if size is None else self.few(batch, size))
                except (RuntimeError, MemoryError) as error:
                    size = (self._examples_in(batch, None) if size is None else size) // 2
                    if not is_out_of_memory(error):
                        raise
                    if not size:
                        return None
        raise ValueError(_NO_EXAMPLE)

    def few(self, batch: Any, most: int) -> Any:
        """Return the first few examples of a batch, or the whole batch if it cannot be cut."""
        try:
            return next(self.structure.parts(batch, most))[0]
        except (ValueError, TypeError, IndexError):
            return batch

    def weight(self, part: Any, examples: int | None) -> float:
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

    def of_batch(self, index: int, batch: Any) -> "WeightedBatches":
        """Return one batch alone, on this rank alone, with the random numbers that it has among the others."""
        alone = copy.copy(self)
        alone.batches, alone.first, alone.distributed = [batch], self.first + index, False
        return alone

    def check_weights(self) -> None:
        """Refuse batches whose weights are not known, before anything is computed.

        Raises:
            ValueError: If the number of examples of a batch is not known; the message says how to pass it.
        """
        for part in self.batches if self.micro_batch_size is None else ():
            self.weight(part, None)

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

    def anywhere(self, here: bool) -> bool:
        """Return whether something is so on any rank.

        Raises:
            RuntimeError: If another rank failed.
        """
        return bool(_agree(torch.tensor(float(here), dtype=torch.float64), self.device)) if self.distributed else here

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order; of this rank alone if sums are not over ranks.

        Raises:
            RuntimeError: If another rank failed.
        """
        if not self.distributed:
            return [value]
        _agree(torch.zeros((), dtype=torch.float64), self.device)
        values: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
        return values

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
        halves = [(self.weight(half, count), half) for half, count in self.structure.parts(part, size, examples)]
        weight = sum(w for w, _ in halves)
        if len(halves) == 1 or not weight:
            return

        def value(part: Any) -> tuple[float, float]:
            """Return the loss, over some draws if it is random, and its standard error."""
            values = []
            for draw in range(_DRAWS_COMPARED if self.is_random else 1):
                self.key = *self.key[:2], draw
                values.append(float(loss(part)))
            found = torch.tensor(values, dtype=torch.float64)
            return float(found.mean()), float(found.std() / len(found) ** 0.5) if self.is_random else 0.0

        (whole, error), parts = value(part), [(w / weight, value(half)) for w, half in halves if w]
        mean = sum(w * found for w, (found, _) in parts)
        error = math.hypot(error, *(w * e for w, (_, e) in parts))
        if not (math.isclose(whole, mean, rel_tol=1e-3, abs_tol=1e-6 + 5 * error) or math.isnan(whole)):
            raise ValueError(
                f"the loss of {examples} examples, {whole:.6g}, is not the weighted mean of those of its parts of "
                f"{size}, {mean:.6g}, so that a batch cannot be cut; pass weight_fn (num_labels for a mean over "
                "tokens), or load smaller batches."
            )


@contextmanager
def agreement(distributed: bool, device: torch.device) -> Iterator[None]:
    """Let all ranks fail together: if one fails anywhere inside, the others raise too, where they next meet it.

    Ranks meet in every product, and at the end of this context.

    Args:
        distributed: Whether there are other ranks.
        device: Device on which ranks sum.

    Raises:
        RuntimeError: If another rank failed. An error of this rank is raised after all ranks have been informed.
    """
    if not distributed:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not getattr(error, AGREED, False):
            _agree(torch.full((), torch.nan, dtype=torch.float64), device, error)
        raise
    _agree(torch.zeros((), dtype=torch.float64), device)


def _agree(weight: Tensor, device: torch.device, failure: BaseException | None = None) -> Tensor:
    """Return the sum of a number over all ranks, or raise on all of them.

    NaN says that a rank has failed, and infinity that a second derivative is missing, which may be mended.
    """
    weight = _summed(weight, device)
    if weight.isfinite():
        return weight
    other = "another rank could not take its part of this measurement; see its output."
    if weight.isinf():
        failure = failure or NoSecondDerivative(other)
    elif failure is None or isinstance(failure, NoSecondDerivative):
        failure = RuntimeError(other)
    setattr(failure, AGREED, True)
    raise failure


def _summed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    summed = tensor.to(device)
    torch.distributed.all_reduce(summed)
    return summed.to(tensor.device)
