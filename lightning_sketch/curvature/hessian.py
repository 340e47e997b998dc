"""The Hessian of a loss as a linear operator, by double backward.

    H v = ∇(∇L(θ)ᵀ v),     L(θ) = sum_b n_b L_b(θ) / sum_b n_b          H: R^n -> R^n, symmetric

b      a batch, with n_b examples and mean loss L_b
θ      the chosen parameters, as one flat vector in the order of `Layout`

One product costs about two gradients of every batch; nothing of size n² is ever made.

Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian", Neural Computation 6(1),
doi:10.1162/neco.1994.6.1.147.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.curvature.errors import nothing_dropped, second_derivative_errors
from lightning_sketch.gradients import num_examples, undisturbed
from lightning_sketch.operators.base import LinearOperator, check_vectors
from lightning_sketch.params import Layout


class Hessian(LinearOperator):
    """Hessian of the mean loss over batches, at the module's present parameters.

    Args:
        loss_fn: (module, batch) -> mean loss of the batch, a scalar.
        module: its parameters are where the Hessian is taken; `.grad` is never touched, and buffers, modes
            and random state are put back.
        batches: a list of batches, or any iterable that can be read again and again. Each is weighted
            by its number of examples (the first axis of its first tensor).
        parameters: names of the parameters to take, as shell patterns.
        mode: "eval", or "train" to leave dropout and batch statistics as they are; a loss that is drawn
            anew at each call has no Hessian, and `spectrum` refuses it.

    Raises:
        TypeError: if `batches` can be read only once, or parameters are not float32 or float64.
        ValueError: at a product: if the loss is no scalar, does not depend on the parameters, or holds
            an operation that PyTorch cannot differentiate twice; the message names it.

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> h = Hessian(lambda module, batch: module(batch).square().mean(), module, [x])
    >>> h.matvec(torch.tensor([1.0, 1.0]))  # 2 xᵀx / 2 times (1, 1)
    tensor([1., 4.])
    """

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        module: nn.Module,
        batches: Iterable[Any],
        *,
        parameters: str | Sequence[str] = "*",
        mode: str = "eval",
    ):
        if isinstance(batches, Tensor):
            raise TypeError("batches is a list of batches, got one tensor; pass [batch].")
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches is read again for every product, got a {type(batches).__name__} that can be read only "
                "once; pass list(batches)."
            )
        self.loss_fn, self.module, self.batches, self.mode = loss_fn, module, batches, mode
        self.layout = Layout.of(module, parameters)
        self.parameters = self.layout.parameters(module)
        for name, parameter in zip(self.layout.names, self.parameters, strict=True):
            if parameter.is_meta:
                raise ValueError(
                    f"parameter {name} is on the meta device and has no values; materialize the module first."
                )
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"parameter {name} is {parameter.dtype}, too coarse for curvature; "
                    "hold them in float32: module.float(), or Trainer(precision='bf16-mixed')."
                )
        self.dtype = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.device = self.parameters[0].device
        self._held = False
        self._graph: tuple[Tensor | None, ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.layout.n, self.layout.n

    def matvec(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """H x for each vector along the last axis, one after the other."""
        check_vectors(x, self.layout.n, "Hessian.matvec")
        if x.ndim > 1:
            return torch.stack([self.matvec(row) for row in x]) if len(x) else torch.empty_like(x)
        with self.hold(), torch.enable_grad():
            pieces = self.layout.unflatten(x.detach().to(self.dtype))
            total, examples = torch.zeros_like(x), 0
            for batch in self.batches:
                count = num_examples(batch)
                for part, product in zip(self.layout.unflatten(total), self._product(batch, pieces), strict=True):
                    if product is not None:
                        part.add_(product, alpha=count)
                examples += count
            return total.div_(_some(examples))

    rmatvec = matvec

    def loss(self) -> float:
        """L(θ): the mean loss over all batches, in loss units."""
        with self.hold():
            weighted = [(num_examples(batch), float(self._scalar_loss(batch).detach())) for batch in self.batches]
        return sum(count * loss for count, loss in weighted) / _some(sum(count for count, _ in weighted))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the module still over many products; the graph of a single fixed batch is then built once.

        The parameters must not change inside.
        """
        if self._held:
            yield
            return
        with undisturbed(self.module, self.mode):
            self._held = True
            try:
                yield
            finally:
                self._held, self._graph = False, None

    def _product(self, batch: Any, pieces: list[Tensor]) -> Sequence[Tensor | None]:
        """The products of the batch's Hessian with the pieces of one vector, each in a parameter's shape."""
        gradients = self._graph or self._gradients(batch)
        if self._graph is None and self._is_fixed(batch):
            self._graph = gradients
        pairs = [(g, piece) for g, piece in zip(gradients, pieces, strict=True) if g is not None and g.requires_grad]
        if not pairs:  # the loss is linear in the parameters
            return [None] * len(pieces)
        outputs, directions = zip(*pairs, strict=True)
        with second_derivative_errors():
            return torch.autograd.grad(
                outputs, self.parameters, directions, retain_graph=self._graph is not None, allow_unused=True
            )

    def _gradients(self, batch: Any) -> tuple[Tensor | None, ...]:
        loss = self._scalar_loss(batch)
        if not loss.requires_grad:
            raise ValueError(
                f"the loss does not depend on the parameters {', '.join(self.layout.names[:5])}, ...; "
                "it may have been computed under no_grad or from detached tensors."
            )
        with second_derivative_errors(), nothing_dropped(loss):
            return torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)

    def _scalar_loss(self, batch: Any) -> Tensor:
        loss = self.loss_fn(self.module, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"loss_fn returns the mean loss of a batch, a scalar tensor; got {got}; use .mean().")
        return loss

    def _is_fixed(self, batch: Any) -> bool:
        """Whether the graph may be kept: one batch, and a loss that is not drawn anew at each call."""
        if not isinstance(self.batches, list | tuple) or len(self.batches) > 1:
            return False
        first, second = (self._scalar_loss(batch).detach() for _ in range(2))
        return torch.allclose(first, second, rtol=1e-5, atol=0, equal_nan=True)


def _some(examples: int) -> int:
    if not examples:
        raise ValueError("batches holds no example, so there is no loss to differentiate; pass at least one batch.")
    return examples
