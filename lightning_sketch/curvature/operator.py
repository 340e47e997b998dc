"""What the curvature matrices of a loss have in common: weighted sums over batches, at a module's parameters.

    A v = sum_b w_b A_b v / sum_b w_b

b      a batch, or a part of one, of weight w_b: its number of examples, or of tokens
A_b    the batch's own matrix, linear in v: what a subclass gives
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
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.autodiff.second_derivatives import Product, nowhere_else
from lightning_sketch.operators.base import LinearOperator, check_vectors

Add = Callable[[Any, float], None]
"""Adds a part of this weight to a total."""


class CurvatureOperator(LinearOperator):
    """A symmetric matrix of a module's parameters, averaged over batches.

    Args:
        module: its parameters are where the matrix is taken; `.grad` is never touched, and buffers, modes
            and random state are put back. If it holds half-precision tensors, all of them, frozen ones too, are
            copied to float32 meanwhile.
        batches: a list of batches, or any iterable that can be read again and again.
        parameters: names of the parameters to take, as shell patterns.
        mode: "eval", or "train" to leave dropout and batch statistics as they are; a loss that is drawn
            anew at each call has no curvature, and `spectrum` refuses it.
        weight_fn: batch -> its weight in the mean; its number of examples by default. Where the loss is a mean
            over tokens, `lightning_sketch.num_labels`.
        num_examples: how many examples a batch has, or batch -> how many, where its tensors do not agree on that;
            see `autodiff.batches.BatchStructure`. Or such an object, where batches are of a class of one's own.
        batch_dim: the axis of the examples, 1 for (time, batch, ...).
        micro_batch_size: most examples differentiated at once; larger batches are cut. None: as they come. Out of
            memory, it is halved, with a warning, until a product fits.
        distributed: sum over the ranks of the default process group, each with its own batches; all of them must
            then call the same methods in the same order.

    Raises:
        TypeError: if `batches` can be read only once, or a parameter is of another type than float16, bfloat16,
            float32 or float64, or is sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        parameters: str | Sequence[str] = "*",
        mode: str = "eval",
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
            _check(name, parameter)
        widest = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.dtype = torch.float32 if widest in HALF else widest
        self.device = self.parameters[0].device
        self._widen = any(t.dtype in HALF for t in (*module.parameters(), *module.buffers()))
        given = isinstance(num_examples, BatchStructure)
        structure = num_examples if given else BatchStructure(num_examples, batch_dim)
        self.batches = Batches(batches, weight_fn, structure, micro_batch_size, distributed, self._widen, self.device)
        self._originals, self._held = self.parameters, False
        self._seen_at: tuple[int, ...] = ()  # versions of the parameters when all batches last went through a mean
        self._kept: Product | None = None

    @abstractmethod
    def linearize(self, batch: Any, keep: bool) -> Product:
        """The batch's own matrix A_b, as a function that is called once, or again and again if `keep`."""

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """The mean loss of the batch, a scalar."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.layout.n, self.layout.n

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """A x for each vector along the last axis, one after the other."""
        check_vectors(x, self.layout.n, f"{type(self).__name__}.matvec")
        if x.ndim > 1:
            return torch.stack([self.matvec(row) for row in x]) if len(x) else torch.empty_like(x)
        with self.hold(), torch.enable_grad():
            pieces = self.layout.unflatten(x.detach().to(self.dtype))
            return self._averaged(lambda batch: self._product(batch)(pieces), x.device).to(x.dtype)

    rmatvec = matvec

    def loss(self) -> float:
        """L(θ): the mean loss over all batches, in loss units."""
        with self.hold(), torch.enable_grad():  # a loss may hold a derivative of the module
            total = torch.zeros((), dtype=torch.float64)

            def add(batch: Any, weight: float) -> None:
                total.add_(self.batch_loss(batch).detach().cpu().double(), alpha=weight)

            return float(self._mean(total, add))

    def gradient(self) -> Float[Tensor, " n"]:
        """∇L(θ), in loss units per parameter unit."""

        def of(batch: Any) -> Sequence[Tensor | None]:
            return torch.autograd.grad(self.batch_loss(batch), self.parameters, allow_unused=True)

        with self.hold(), torch.enable_grad():
            return self._averaged(of, self.device)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the module still over many products; the graph of a single fixed batch is then built once.

        The parameters must not change inside.
        """
        if self._held:
            yield
            return
        for name, parameter in zip(self.layout.names, self.parameters, strict=True):
            if not parameter.requires_grad:
                raise ValueError(
                    f"parameter {name} was frozen after this {type(self).__name__} was made; make it anew, or set "
                    "requires_grad=True."
                )
        with ExitStack() as stack:
            stack.enter_context(preserve_state(self.module, mode=self.mode))
            if self._widen:
                self.parameters = stack.enter_context(in_float32(self.module, self._originals))
            self._held = True
            try:
                yield
            finally:
                self._held, self._kept, self.parameters = False, None, self._originals

    def _product(self, batch: Any) -> Product:
        """The matrix of a batch: made once if there is one only, and a loss that is not drawn anew at each call."""
        if self._kept is not None:
            return self._kept
        if not self.batches.single:
            return self.linearize(batch, keep=False)
        first, second = (self.batch_loss(batch).detach() for _ in range(2))
        keep = torch.allclose(first, second, rtol=1e-5, atol=0, equal_nan=True)
        product = self.linearize(batch, keep)
        self._kept = product if keep else None
        return product

    def _averaged(self, pieces_of: Callable[[Any], Sequence[Tensor | None]], device: torch.device) -> Tensor:
        """The mean of what each batch gives in the parameters' shapes, as one vector."""
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
        """Whether all batches went through a mean at these weights."""
        return self._seen_at == self._versions

    @property
    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self._originals)

    def _differentiable(self, output: Tensor) -> Tensor:
        """What the module made, if it can be differentiated for the chosen parameters."""
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
        self._kept = None


def _check(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(f"parameter {name} is on the meta device and has no values; materialize the module first.")
    if hasattr(parameter, "placements"):
        raise TypeError(
            f"parameter {name} is sharded (a DTensor), and sharded modules cannot be differentiated twice; load the "
            "checkpoint into one process, or train with DDP."
        )
    if parameter.dtype not in (*HALF, torch.float32, torch.float64):
        raise TypeError(f"parameter {name} is {parameter.dtype}; curvature needs floating-point parameters.")


class Batches:
    """Batches that are read again for each mean.

    Args:
        batches: a list of them, or any iterable that can be read again and again.
        weight_fn: batch -> its weight; None for its number of examples.
        structure: how many examples a batch has, and where.
        micro_batch_size: most examples at once; larger batches are cut. None: as they come.
        distributed: sum over the ranks of the default process group, each with its own batches.
        widen: turn half-precision tensors into float32.
        device: where ranks sum up; NCCL knows no CPU.
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
        part, examples = None, None
        try:
            for part, examples in self._parts(loss):
                share = self._weight(part, examples)
                if share:  # the mean over nothing is NaN
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
        """Parts of all batches, each with its number of examples; None where it is the batch's own."""
        for index, batch in enumerate(self.batches):
            batch = differentiable(batch, self.widen)
            if not self._is_cut(batch):
                yield batch, None
                continue
            if index not in self._may_be_cut:
                self._check_cut(batch, loss)
                self._may_be_cut.add(index)
            yield from self.structure.parts(batch, self.micro_batch_size)

    def _weight(self, part: Any, examples: int | None) -> float:
        """Its own, or its number of examples; for a batch that is alone any will do."""
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
            ValueError: saying how to tell them.
        """
        for part in self.batches if self.micro_batch_size is None else ():
            self._weight(part, None)

    def _alike(self) -> bool:
        """Whether all batches have equal shapes, so that they have equal weights, whatever these are."""
        return isinstance(self.batches, list | tuple) and len({shapes_of(batch) for batch in self.batches}) == 1

    def _examples_in(self, part: Any, examples: int | None) -> int:
        """How many a part has that did not fit into memory; 0 if that is not known, so that it cannot be halved."""
        if examples is not None or part is None:
            return examples or self.micro_batch_size or 0
        try:
            return self.structure.count(part)
        except ValueError:
            return 0

    def _summed(self, tensor: Tensor) -> Tensor:
        """Over all ranks."""
        there = tensor.to(self.device)
        torch.distributed.all_reduce(there)
        return there.to(tensor.device)

    def _is_cut(self, batch: Any) -> bool:
        return self.micro_batch_size is not None and self.structure.count(batch) > self.micro_batch_size

    def _check_cut(self, batch: Any, loss: Callable[[Any], Tensor]) -> None:
        """Refuse to cut a batch whose loss is not the mean of the losses of its parts: halves of each part tell."""
        size = self.micro_batch_size
        self._check_weights(batch, size)
        try:
            with torch.no_grad():
                for part, examples in self.structure.parts(batch, max(2, size)):  # the whole batch may not fit
                    self._check_halves(part, examples, max(1, size // 2), loss)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size > 1:  # else two examples are too many
                raise

    def _check_weights(self, batch: Any, size: int) -> None:
        """Refuse to cut a batch whose weight is not the sum of those of its parts: these are not made of examples."""
        if self.weight_fn is None:
            return
        whole, parts = float(self.weight_fn(batch)), [p for p, _ in self.structure.parts(batch, size)]
        added = sum(float(self.weight_fn(part)) for part in parts)
        if not math.isclose(whole, added, rel_tol=1e-6):
            raise ValueError(
                f"weight_fn gives {whole:g} for a batch and {added:g} for its {len(parts)} parts together, so that "
                "these are not made of what it counts; pass num_examples (len for a list of examples), or leave "
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
