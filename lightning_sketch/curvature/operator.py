"""The base class of the curvature matrices of a loss: weighted means over batches, at a module's parameters.

    A v = sum_b w_b A_b v / sum_b w_b

b      a batch, or a part of one, of weight w_b: its number of examples, or of tokens
A_b    the matrix of that batch, linear in v, which a subclass defines
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF, BatchStructure, differentiable, shapes_of
from lightning_sketch.autodiff.functional import in_float32
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.memory import is_out_of_memory
from lightning_sketch.autodiff.preserve_state import Mode, preserve_state
from lightning_sketch.autodiff.second_derivatives import Product, nowhere_else
from lightning_sketch.operators.base import LinearOperator, check_vectors

Add = Callable[[Any, float], None]  # adds a part of a batch, times its weight, to a total


class _Batches:
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


class CurvatureOperator(LinearOperator):
    """A symmetric matrix of a module's parameters, averaged over batches.

    Args:
        module: The module at whose present parameters the matrix is computed. `.grad` is never touched; buffers,
            training modes and random state are restored. If it has half-precision tensors, all of them, frozen ones
            too, are copied to float32 during a product.
        batches: A list of batches, or any iterable that can be read again and again.
        parameters: Shell patterns that select parameters by name.
        mode: "eval", or "train" to leave dropout and batch normalization in the mode of each submodule; a loss that
            is random at each call has no curvature, and `spectrum` refuses it.
        weight_fn: A function batch -> its weight in the mean; its number of examples by default. Where the loss is a
            mean over tokens, use `lightning_sketch.num_labels`.
        num_examples: The number of examples of a batch, or a function batch -> number, where the tensors of a batch
            disagree about it. Or an `autodiff.batches.BatchStructure`, for batches of a class of your own.
        batch_dim: The axis of the examples, 1 for (time, batch, ...).
        micro_batch_size: Most examples differentiated at once; larger batches are cut. Batches are not cut if None.
            If memory runs out, the size is halved with a warning until a product fits.
        distributed: Whether to sum over the ranks of the default process group, each with its own batches. All ranks
            must then call the same methods in the same order.

    Attributes:
        layout: Names and shapes of the selected parameters, in the order of a flat vector.
        dtype: The type of vectors: float64 if a selected parameter is, else float32.
        device: The device of the first selected parameter.

    Raises:
        TypeError: If `module` is no module, `batches` can be read only once, or a parameter is of another type than
            float16, bfloat16, float32 or float64, or is sharded.
        ValueError: If a pattern selects no parameter, a parameter is on the meta device, or a number is out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        parameters: str | Sequence[str] = "*",
        mode: Mode = "eval",
        weight_fn: Callable[[Any], float] | None = None,
        num_examples: int | Callable[[Any], int] | BatchStructure | None = None,
        batch_dim: int = 0,
        micro_batch_size: int | None = None,
        distributed: bool = False,
    ):
        if not isinstance(module, nn.Module):
            kind = type(self).__name__
            raise TypeError(f"{kind} takes a module, got a {type(module).__name__}; see the order of help({kind}).")
        self.module, self.mode = module, mode
        self.layout = Layout.of(module, parameters)
        self.parameters: list[Tensor] = list(self.layout.parameters(module))
        for name, parameter in zip(self.layout.names, self.parameters, strict=True):
            _check_parameter(name, parameter)
        widest = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.dtype = torch.float32 if widest in HALF else widest
        self.device = self.parameters[0].device
        self._widen = any(t.dtype in HALF for t in (*module.parameters(), *module.buffers()))
        structure = (
            num_examples if isinstance(num_examples, BatchStructure) else BatchStructure(num_examples, batch_dim)
        )
        self.batches = _Batches(batches, weight_fn, structure, micro_batch_size, distributed, self._widen, self.device)
        self._originals, self._inside_hold = self.parameters, False
        self._seen_at: tuple[int, ...] = ()  # versions of the parameters at the last mean over all batches
        self._cached: Product | None = None  # the product of a single batch

    def __repr__(self) -> str:
        try:
            count = len(self.batches.batches)  # type: ignore[arg-type]
        except TypeError:  # a loader of a stream, without a length
            batches = "batches"
        else:
            batches = "1 batch" if count == 1 else f"{count} batches"
        return f"{type(self).__name__} of {self.layout.n:,} parameters over {batches}"

    @abstractmethod
    def linearize(self, batch: Any, keep: bool) -> Product:
        """Return v -> A_b v for one batch, in the shapes of the parameters.

        Args:
            batch: A batch, or a part of one.
            keep: Whether the function is called more than once, so that it has to keep its graph.
        """

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar, in loss units."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (n, n), for n numbers in the selected parameters."""
        return self.layout.n, self.layout.n

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return A x for each vector x along the last axis, one after the other.

        Raises:
            TypeError: If x holds no real floating-point numbers.
            ValueError: If its last axis has another size than n, there is no example, or the loss cannot be
                differentiated.
        """
        check_vectors(x, self.layout.n, f"{type(self).__name__}.matvec")
        if x.ndim > 1:  # each on its own, with its own random numbers put back, so that all see the same matrix
            return torch.stack([self.matvec(row) for row in x]) if len(x) else torch.empty_like(x)
        with self.hold(), torch.enable_grad():
            pieces = self.layout.unflatten(x.detach().to(self.dtype))
            return self._averaged(lambda batch: self._product(batch)(pieces), x.device).to(x.dtype)

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return the same as `matvec`: the matrix is symmetric."""
        return self.matvec(y)

    def loss(self) -> float:
        """Return the mean loss over all batches, L(θ), in loss units."""
        with self.hold(), torch.enable_grad():  # a loss may contain a derivative of the module
            total = torch.zeros((), dtype=torch.float64)

            def add(batch: Any, weight: float) -> None:
                total.add_(self.batch_loss(batch).detach().cpu().double(), alpha=weight)

            return float(self._mean(total, add))

    def gradient(self) -> Float[Tensor, " n"]:
        """Return the gradient ∇L(θ) as a flat vector, in loss units per parameter unit."""

        def of(batch: Any) -> Sequence[Tensor | None]:
            return torch.autograd.grad(self.batch_loss(batch), self.parameters, allow_unused=True)

        with self.hold(), torch.enable_grad():
            return self._averaged(of, self.device)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Prepare the module once for all products taken inside; the graph of a single fixed batch is built once.

        The caller promises not to change the parameters inside.

        Raises:
            ValueError: If a selected parameter has been frozen since.
        """
        if self._inside_hold:
            yield
            return
        for name, parameter in zip(self.layout.names, self.parameters, strict=True):
            if not parameter.requires_grad:
                raise ValueError(
                    f"parameter {name} was frozen after this {type(self).__name__} was made; create it again, or set "
                    "requires_grad=True."
                )
        with ExitStack() as stack:
            stack.enter_context(preserve_state(self.module, mode=self.mode))
            if self._widen:
                self.parameters = stack.enter_context(in_float32(self.module, self._originals))
            self._inside_hold = True
            try:
                yield
            finally:
                self._inside_hold, self._cached, self.parameters = False, None, self._originals

    def _product(self, batch: Any) -> Product:
        """Return v -> A_b v for a batch; made only once for a single batch whose loss is the same at each call."""
        if self._cached is not None:
            return self._cached
        if not self.batches.single:
            return self.linearize(batch, keep=False)
        first, second = (self.batch_loss(batch).detach() for _ in range(2))
        keep = torch.allclose(first, second, rtol=1e-5, atol=0, equal_nan=True)
        product = self.linearize(batch, keep)
        self._cached = product if keep else None
        return product

    def _averaged(self, pieces_of: Callable[[Any], Sequence[Tensor | None]], device: torch.device) -> Tensor:
        """Return the weighted mean of tensors in the shapes of the parameters, one list for each batch, as a vector."""
        total = torch.zeros(self.layout.n, dtype=self.dtype, device=device)
        parts = self.layout.unflatten(total)

        def add(batch: Any, weight: float) -> None:
            for part, piece in zip(parts, pieces_of(batch), strict=True):
                if piece is not None:
                    part.add_(piece, alpha=weight)

        return self._mean(total, add)

    def _mean(self, total: Tensor, add: Add) -> Tensor:
        mean = self.batches.mean(total, add, self.batch_loss, self._forget)
        self._seen_at = self._versions
        return mean

    @property
    def _all_seen(self) -> bool:
        """Whether a mean over all batches was completed at the present parameters."""
        return self._seen_at == self._versions

    @property
    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self._originals)

    def _differentiable(self, output: Tensor) -> Tensor:
        """Return an output of the module, or refuse it if it does not depend on the selected parameters."""
        if not output.requires_grad:
            raise ValueError(
                f"the loss does not depend on the parameters {', '.join(self.layout.names[:5])}, ...; "
                "it may have been computed under no_grad or from detached tensors."
            )
        replaced = [old for old, new in zip(self._originals, self.parameters, strict=True) if old is not new]
        if replaced:
            nowhere_else(output, replaced)
        return output

    def _forget(self) -> None:
        self._cached = None


def _check_parameter(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(f"parameter {name} is on the meta device and has no values; materialize the module first.")
    if hasattr(parameter, "placements"):
        raise TypeError(
            f"parameter {name} is sharded (a DTensor), and sharded modules cannot be differentiated twice; load the "
            "checkpoint into one process, or train with DDP."
        )
    if parameter.dtype not in (*HALF, torch.float32, torch.float64):
        raise TypeError(f"parameter {name} is {parameter.dtype}; curvature needs floating-point parameters.")
