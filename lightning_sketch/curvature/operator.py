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

from lightning_sketch.gradients import differentiable, num_examples, split_batch, substituted, undisturbed
from lightning_sketch.operators.base import LinearOperator, check_vectors
from lightning_sketch.params import Layout

Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""A_b v from the pieces of v, each in a parameter's shape; None is zero."""

_HALF = (torch.float16, torch.bfloat16)


class CurvatureOperator(LinearOperator):
    """A symmetric matrix of a module's parameters, averaged over batches.

    Args:
        module: its parameters are where the matrix is taken; `.grad` is never touched, and buffers, modes
            and random state are put back. Half-precision parameters are computed with in float32.
        batches: a list of batches, or any iterable that can be read again and again.
        parameters: names of the parameters to take, as shell patterns.
        mode: "eval", or "train" to leave dropout and batch statistics as they are; a loss that is drawn
            anew at each call has no curvature, and `spectrum` refuses it.
        weight_fn: batch -> its weight in the mean; its number of examples by default. Where the loss is a mean
            over tokens, `gradients.num_labels`.
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
        weight_fn: Callable[[Any], float] = num_examples,
        micro_batch_size: int | None = None,
        distributed: bool = False,
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
        self.module, self.batches, self.mode = module, batches, mode
        self.weight_fn, self.micro_batch_size, self.distributed = weight_fn, micro_batch_size, distributed
        self.layout = Layout.of(module, parameters)
        self.parameters: list[Tensor] = list(self.layout.parameters(module))
        for name, parameter in zip(self.layout.names, self.parameters, strict=True):
            _check(name, parameter)
        widest = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.dtype = torch.float32 if widest in _HALF else widest
        self.device = self.parameters[0].device
        self._widen = any(t.dtype in _HALF for t in (*module.parameters(), *module.buffers()))
        self._held = False
        self._kept: Product | None = None
        self._cut_agrees = False  # not looked yet

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
            total = torch.zeros(self.layout.n, dtype=self.dtype, device=x.device)
            parts = self.layout.unflatten(total)

            def add(batch: Any, weight: float) -> None:
                for part, product in zip(parts, self._product(batch)(pieces), strict=True):
                    if product is not None:
                        part.add_(product, alpha=weight)

            return self._mean(total, add).to(x.dtype)

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
        with self.hold(), torch.enable_grad():
            total = torch.zeros(self.layout.n, dtype=self.dtype, device=self.device)
            parts = self.layout.unflatten(total)

            def add(batch: Any, weight: float) -> None:
                gradients = torch.autograd.grad(self.batch_loss(batch), self.parameters, allow_unused=True)
                for part, gradient in zip(parts, gradients, strict=True):
                    if gradient is not None:
                        part.add_(gradient, alpha=weight)

            return self._mean(total, add)

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
            originals = self.parameters
            stack.enter_context(undisturbed(self.module, self.mode))
            if self._widen:
                self.parameters = stack.enter_context(_in_float32(self.module, originals))
            self._held = True
            try:
                yield
            finally:
                self._held, self._kept, self.parameters = False, None, originals

    def _product(self, batch: Any) -> Product:
        """The matrix of a batch: made once if there is one only, and a loss that is not drawn anew at each call."""
        if self._kept is not None:
            return self._kept
        if not isinstance(self.batches, list | tuple) or len(self.batches) > 1 or self._is_cut(self.batches[0]):
            return self.linearize(batch, keep=False)
        first, second = (self.batch_loss(batch).detach() for _ in range(2))
        keep = torch.allclose(first, second, rtol=1e-5, atol=0, equal_nan=True)
        product = self.linearize(batch, keep)
        self._kept = product if keep else None
        return product

    def _is_cut(self, batch: Any) -> bool:
        return self.micro_batch_size is not None and num_examples(batch) > self.micro_batch_size

    def _parts(self) -> Iterator[Any]:
        for batch in self.batches:
            batch = differentiable(batch, self._widen)
            if not self._is_cut(batch):
                yield batch
                continue
            if not self._cut_agrees:
                self._check_cut(batch)
            yield from split_batch(batch, self.micro_batch_size)

    def _check_cut(self, batch: Any) -> None:
        """Refuse to cut a batch whose loss is not the mean of the losses of its parts."""
        parts = list(split_batch(batch, self.micro_batch_size))
        weights = [float(self.weight_fn(part)) for part in parts]
        with torch.no_grad():
            losses = [float(self.batch_loss(part)) for part in parts]
            whole = float(self.batch_loss(batch))
        mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
        if not math.isclose(whole, mean, rel_tol=1e-3, abs_tol=1e-6) and not math.isnan(whole):
            raise ValueError(
                f"the loss of a batch, {whole:.6g}, is not the weighted mean of those of its parts of "
                f"{self.micro_batch_size} examples, {mean:.6g}, so that it cannot be cut; pass weight_fn (num_labels for "
                "a mean over tokens), or load smaller batches."
            )
        self._cut_agrees = True

    def _mean(self, total: Tensor, add: Callable[[Any, float], None]) -> Tensor:
        """Call add(part, weight) for each part of each batch; what that makes of `total`, over the sum of weights."""
        weight, failure = torch.zeros((), dtype=torch.float64), None
        try:
            while not self._all_fit(total, weight, add):
                self._kept = None
                total.zero_()
                weight.zero_()
        except Exception as error:
            if not self.distributed:
                raise
            weight.fill_(torch.nan)
            failure = error
        if self.distributed:
            weight = weight.to(self.device)  # NCCL knows no CPU
            torch.distributed.all_reduce(weight)
            if failure is not None or weight.isnan():
                raise failure or RuntimeError("another rank could not take its part of this product; see its output.")
            on_device = total.to(self.device)
            torch.distributed.all_reduce(on_device)
            total.copy_(on_device)
        if not weight:
            raise ValueError("batches holds no example, so there is no loss to differentiate; pass at least one batch.")
        return total.div_(float(weight))

    def _all_fit(self, total: Tensor, weight: Tensor, add: Callable[[Any, float], None]) -> bool:
        """Whether all parts went through in this size; if not, the next size is half."""
        largest = 0
        try:
            for batch in self._parts():
                largest = max(largest, num_examples(batch))
                part = float(self.weight_fn(batch))
                add(batch, part)
                weight.add_(part)
        except RuntimeError as error:
            if not _is_out_of_memory(error) or largest < 2:
                raise
        else:
            return True
        self.micro_batch_size = largest // 2
        torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory with {largest} examples at once; going on with micro_batch_size={self.micro_batch_size}.",
            stacklevel=2,
        )
        return False


@contextmanager
def _in_float32(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The module on float32 copies of what it holds in half precision; yields what stands for these parameters."""
    half = [t for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values() if t.dtype in _HALF]
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in half]
    table = {id(old): new for old, new in zip(half, wide, strict=True)}
    with substituted(module, half, wide):
        yield [table.get(id(p), p) for p in parameters]


def _is_out_of_memory(error: RuntimeError) -> bool:
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in words or "allocate memory" in words


def _check(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(f"parameter {name} is on the meta device and has no values; materialize the module first.")
    if hasattr(parameter, "placements"):
        raise TypeError(
            f"parameter {name} is sharded (a DTensor), and sharded modules cannot be differentiated twice; load the "
            "checkpoint into one process, or train with DDP."
        )
    if parameter.dtype not in (*_HALF, torch.float32, torch.float64):
        raise TypeError(f"parameter {name} is {parameter.dtype}; curvature needs floating-point parameters.")
