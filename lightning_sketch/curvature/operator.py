"""The base class of the curvature matrices of a loss: weighted means over batches, at a module's parameters.

    A v = sum_b w_b A_b v / sum_b w_b

b      a batch, or a part of one, of weight w_b: its number of examples, or of tokens
A_b    the matrix of that batch, linear in v, which a subclass defines
"""

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_sketch._arguments import kind_of
from lightning_sketch.autodiff.batches import HALF, BatchStructure
from lightning_sketch.autodiff.functional import HeldTargets, following, in_precision
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.plain_formulas import PlainFormulas
from lightning_sketch.autodiff.preserve_state import Mode, Preserved, preserve_state
from lightning_sketch.autodiff.second_derivatives import Product, nowhere_else
from lightning_sketch.autodiff.shards import local
from lightning_sketch.curvature.weighted_batches import Add, WeightedBatches, agreement
from lightning_sketch.operators.base import LinearOperator, check_vectors


class CurvatureOperator(LinearOperator):
    """A symmetric matrix of a module's parameters, averaged over batches.

    Args:
        module: The module at whose present parameters the matrix is computed. `.grad` is never touched; buffers,
            training modes and random state are restored. If it has half-precision tensors, all of them, frozen ones
            too, are copied to float32 during a product.
        batches: A list of batches, or any iterable that can be read again and again.
        parameters: Shell patterns that select parameters by name.
        mode: "eval", or "train" to leave dropout and batch normalization in the mode of each submodule.
        weight_fn: A function batch -> its weight in the mean; its number of examples by default. Where the loss is a
            mean over tokens, use `lightning_sketch.num_labels`.
        num_examples: The number of examples of a batch, or a function batch -> number, where the tensors of a batch
            disagree about it. Or an `autodiff.batches.BatchStructure`, for batches of a class of your own.
        batch_dim: The axis of the examples, 1 for (time, batch, ...).
        micro_batch_size: Most examples differentiated at once; larger batches are cut. Batches are not cut if None.
            If memory runs out, the size is halved with a warning until a product fits.
        distributed: Whether to sum over the ranks of the default process group, each with its own batches. All ranks
            must then call the same methods in the same order.
        noise_samples: The number of draws of random numbers that the loss is averaged over, if it draws any: noise,
            masks, augmentation, dropout in mode "train". For each batch the generators of torch, NumPy and Python, and
            those that the module owns, begin at the same state in every evaluation, so that the matrix is a fixed one:
            that of the mean loss over these draws.
        noise_seed: The seed of these draws.

    Attributes:
        layout: Names and shapes of the selected parameters, in the order of a flat vector.
        dtype: The type of vectors: float64 if a selected parameter is, else float32.
        device: The device of the first selected parameter.

    Raises:
        TypeError: If `module` is no module, `batches` can be read only once, or a parameter is of another type than
            float16, bfloat16, float32 or float64, or is sharded.
        ValueError: If a pattern selects no parameter, a parameter is on the meta device or not initialized yet, or a
            number is out of range. At a product, if the loss is NaN, or not the same at each call though its random
            numbers are.
    """

    _takes_shards = False

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
        noise_samples: int = 1,
        noise_seed: int = 0,
    ):
        if not isinstance(module, nn.Module):
            kind, order = type(self).__name__, list(inspect.signature(self.__init__).parameters)
            order = order[: order.index("batches") + 1]
            raise TypeError(
                f"{kind} takes a module, got {kind_of(module)}; its arguments come in the order "
                f"{kind}({', '.join(order)})."
            )
        if noise_samples < 1:
            raise ValueError(f"need noise_samples >= 1, got {noise_samples}.")
        _check_initialized(module)
        self.module, self.mode = module, mode
        self.layout = Layout.of(module, parameters)
        self._n = self.layout.n
        self.parameters: list[Tensor] = list(self.layout.parameters(module))
        for name, parameter in zip(self.layout.names, self.parameters, strict=True):
            self._check_parameter(name, parameter)
        widest = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.dtype = torch.float32 if widest in HALF else widest
        self.device = local(self.parameters[0]).device
        has_half = any(t.dtype in HALF for t in (*module.parameters(), *module.buffers()))
        structure = (
            num_examples if isinstance(num_examples, BatchStructure) else BatchStructure(num_examples, batch_dim)
        )
        dtype = torch.float32 if has_half else None
        self.batches = WeightedBatches(batches, weight_fn, structure, micro_batch_size, distributed, dtype, self.device)
        self._noise = noise_seed, noise_samples
        self._originals = self.parameters
        self._state: Preserved | None = None  # inside `hold`
        self._targets: HeldTargets | None = None  # while parameters are moved
        self._derives = False  # whether the loss takes a derivative itself
        self._restores = False  # whether the loss is the same at each call only if the state is restored before it
        self._written: list[nn.Parameter] | None = None  # trainable parameters that a forward pass changes, once known
        self._examined_at: tuple[int, ...] = ()  # versions of the parameters when the loss was examined
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
        return self._n, self._n

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return A x for each vector x along the last axis, one after the other.

        Raises:
            TypeError: If x holds no real floating-point numbers.
            ValueError: If its last axis has another size than n, there is no example, or the loss cannot be
                differentiated.
        """
        if not x.is_floating_point() or x.shape[-1:] != (self._n,):
            check_vectors(x, self._n, f"{type(self).__name__}.matvec")
        with self._held(), torch.enable_grad():
            if x.ndim > 1:
                return torch.stack([self.matvec(row) for row in x]) if len(x) else torch.empty_like(x)
            pieces = self._pieces(x.detach().to(self.dtype))
            return self._averaged(lambda batch: self._product(batch)(pieces), x.device).to(x.dtype)

    def rmatvec(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return the same as `matvec`: the matrix is symmetric."""
        return self.matvec(y)

    def loss(self) -> float:
        """Return the mean loss over all batches, L(θ), in loss units."""
        with self._held(), torch.enable_grad():  # a loss may contain a derivative of the module
            total = torch.zeros((), dtype=torch.float64)

            def add(batch: Any, weight: float) -> None:
                total.add_(self.finite(self.batch_loss(batch).detach()).cpu().double(), alpha=weight)

            return float(self._mean(total, add))

    def gradient(self) -> Float[Tensor, " n"]:
        """Return the gradient ∇L(θ) as a flat vector, in loss units per parameter unit."""

        def of(batch: Any) -> Sequence[Tensor | None]:
            return torch.autograd.grad(self.finite(self.batch_loss(batch)), self.parameters, allow_unused=True)

        with self._held(), torch.enable_grad():
            return self._averaged(of, self.device)

    def per_batch(self) -> list[tuple[float, "CurvatureOperator"]]:
        """Return the weight and the matrix A_b of each batch of this rank; A is their weighted mean, over all ranks."""
        found = []
        for index, batch in enumerate(self.batches.batches):
            alone = copy.copy(self)
            alone.batches = self.batches.of_batch(index, batch)
            alone.parameters, alone._state, alone._cached, alone._seen_at = self._originals, None, None, ()
            found.append((self.batches.weight(batch, None), alone))
        return found

    @property
    def noise_samples(self) -> int:
        """The number of draws of random numbers that the matrix is a mean over; 0 if the loss draws none.

        Known after the first product.
        """
        return self.batches.draws if self.batches.is_random else 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Prepare the module once for all products taken inside; the graph of a single fixed batch is built once.

        The caller promises not to change the parameters inside. If sums are over ranks and one of them fails inside,
        the others fail too.

        Raises:
            ValueError: If a selected parameter has been frozen since.
            RuntimeError: If another rank failed.
        """
        if self._state is not None:
            yield
            return
        if self._written is not None and self._examined_at != self._versions:
            self._check_again()
        with self._held():
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        if self._state is not None:
            yield
            return
        with agreement(self.batches.distributed, self.device), ExitStack() as stack:
            self._check_trainable()
            self._state = stack.enter_context(preserve_state(self.module, mode=self.mode))
            stack.callback(self._let_go)
            self._formulas = stack.enter_context(PlainFormulas(derivative_in_loss=self._derives))
            if self.batches.dtype is not None:
                self.parameters = stack.enter_context(in_precision(self.module, self._originals, self.batches.dtype))
                stack.enter_context(self._state.replaced())
            if self._written is None:
                self._written, self._examined_at = self._examine(), self._versions
            for parameter in self._written:
                self._state.keep(parameter)
            if self.batches.anywhere(bool(self._written)):
                self.loss()  # the forward passes of all batches write before the first product is taken
            yield

    def _check_parameter(self, name: str, parameter: Tensor) -> None:
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device and has no values; materialize the module first.")
        if hasattr(parameter, "placements") and not self._takes_shards:
            raise TypeError(
                f"parameter {name} is sharded (a DTensor), and products of {type(self).__name__} need derivatives that "
                "PyTorch has not there; use Hessian, which takes differences of gradients, load the checkpoint into "
                "one process, or train with DDP."
            )
        if parameter.dtype not in (*HALF, torch.float32, torch.float64):
            raise TypeError(f"parameter {name} is {parameter.dtype}; curvature needs floating-point parameters.")

    def _check_trainable(self) -> None:
        for name, parameter in zip(self.layout.names, self.parameters, strict=True):
            if not parameter.requires_grad:
                raise ValueError(
                    f"parameter {name} was frozen after this {type(self).__name__} was made; create it again, or set "
                    "requires_grad=True."
                )

    def _let_go(self) -> None:
        self._state, self._cached, self.parameters = None, None, self._originals

    def evaluate(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(*args), a function of the module, with the random numbers of the part under way."""
        assert self._state is not None
        self._formulas.took_derivative = False
        if self._restores:
            self._state.restore()
        # the weights of a subspace first, since they are no targets of the loss
        with following(self.module), self._targets or nullcontext():
            self.draw()
            result = function(*args)
        if self._formulas.took_derivative and not self._derives:
            self._derives = True
            self._formulas.include(derivative_in_loss=True)
            return self.evaluate(function, *args)
        return result

    def draw(self) -> None:
        """Set all random generators to the state in which the part under way is evaluated."""
        assert self._state is not None
        self._state.draw(self._noise[0], self.batches.rank, *self.batches.key)

    def _examine(self) -> list[nn.Parameter]:
        """Evaluate the loss of one batch three times, and see whether it can be measured.

        Twice with the same random numbers, for whether it is the same; then with others, for whether it draws any.

        Returns:
            The trainable parameters that the forward pass writes into, restored here.

        Raises:
            ValueError: If the loss is not the same at each call.
        """
        assert self._state is not None
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        copies, versions = [p.detach().clone() for p in trainable], [p._version for p in trainable]

        def losses(batch: Any) -> list[Tensor]:
            found = []
            for draw in (0, 0, 1):
                self.batches.key = self.batches.first, 0, draw
                with torch.enable_grad():
                    found.append(self.finite(self.batch_loss(batch).detach()))
            return found

        try:
            found = self.batches.first_that_fits(losses)
            if self._state.restore() or (found and not _same(*found[:2])):
                self._restores = True
                found = self.batches.first_that_fits(losses)
        finally:
            changed = zip(trainable, copies, versions, strict=True)
            written = [(p, before) for p, before, v in changed if p._version != v or not torch.equal(p, before)]
            for p, before in written:
                p.data.copy_(before)
                self._state.keep(p)
        if not found:  # not even one example fits, as a product will say
            return []
        first, again, other = found
        if not _same(first, again):
            raise ValueError(
                f"the loss of one batch is {float(first):.8g} at one call and {float(again):.8g} at the next, although "
                "the random numbers of torch, NumPy, Python and of generators that the module owns were the same, as "
                "were buffers and attributes. So it depends on something else that changes: a generator or counter "
                "outside the module, a file, or a batch that is changed in place; pass a loss_fn that does not."
            )
        self.batches.is_random = not torch.equal(first, other)
        self.batches.draws = self._noise[1] if self.batches.is_random else 1
        return [p for p, _ in written]

    def _check_again(self) -> None:
        """Forget what was found out about the loss at other parameters."""
        self._written = None

    def _product(self, batch: Any) -> Product:
        """Return v -> A_b v for a batch; made only once for a single batch whose loss is the same at each call."""
        if self._cached is not None:
            return self._cached
        if not self.batches.single:
            return self.linearize(batch, keep=False)
        self._cached = self.linearize(batch, keep=True)
        return self._cached

    def _averaged(self, pieces_of: Callable[[Any], Sequence[Tensor | None]], device: torch.device) -> Tensor:
        """Return the weighted mean of tensors in the shapes of the parameters, one list for each batch, as a vector."""
        total = torch.zeros(self._n, dtype=self.dtype, device=device)
        parts = self._pieces(total)

        def add(batch: Any, weight: float) -> None:
            for name, part, piece in zip(self.layout.names, parts, pieces_of(batch), strict=True):
                if piece is None:
                    continue
                if piece.layout != torch.strided:
                    piece = piece.to_dense()
                if not self._all_seen and not piece.isfinite().all():
                    raise ValueError(
                        f"the loss of batch {self.batches.key[0]} is finite, but not its derivative with respect to "
                        f"{name}: an operation such as sqrt, log, norm or division is at a point where it has none. "
                        "Add a small number there, or leave the parameter out with parameters=..."
                    )
                part.add_(piece, alpha=weight)

        return self._mean(total, add)

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """Return views of a flat vector in the shapes of the parameters."""
        sizes = [parameter.numel() for parameter in self.parameters]
        return [part.view(p.shape) for part, p in zip(vector.split(sizes), self.parameters, strict=True)]

    def finite(self, loss: Tensor) -> Tensor:
        """Return the loss of the part under way, or refuse it if it is NaN or infinite.

        It is looked at until every batch has been seen at the present parameters.

        Raises:
            ValueError: If it is.
        """
        if isinstance(loss, Tensor) and not self._all_seen and not loss.isfinite().all():
            raise ValueError(
                f"the loss of batch {self.batches.key[0]} is {float(loss.detach().sum())} at these parameters, so "
                "that there is nothing to differentiate; use the weights of an earlier step."
            )
        return loss

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
                "it may have been computed under no_grad or from detached tensors: return it with its graph."
            )
        replaced = [old for old, new in zip(self._originals, self.parameters, strict=True) if old is not new]
        if replaced:
            nowhere_else(output, replaced)
        return output

    def _forget(self) -> None:
        self._cached = None


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two losses are equal to rounding."""
    return torch.allclose(a, b, rtol=1e-5, atol=0, equal_nan=True)


def _check_initialized(module: nn.Module) -> None:
    """Refuse a module with lazy layers that have not seen a batch."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {name} of a lazy layer has no shape before the first forward pass; run one batch through "
                f"{type(module).__name__} first."
            )
