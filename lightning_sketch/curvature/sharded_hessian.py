"""The Hessian of a loss of a sharded module, by differences of gradients in the module's own parallel step.

PyTorch has no second derivatives under FSDP2, which frees gathered weights between forward and backward pass. Gradients
it has. So each rank moves its own shards along its part of a vector, all of them run the module forward and backward as
in training, and each keeps its part of the gradient: see `autodiff.differences`. Compute in bfloat16, fused attention
and activation checkpointing stay as they are.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF
from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.autodiff.differences import CentralDifferences
from lightning_sketch.autodiff.preserve_state import interrupts_held_back, preserve_state, raise_interrupt
from lightning_sketch.autodiff.shards import (
    Shards,
    checksums,
    local,
    reduced_gradients,
    reshard,
    summed,
    tensor_parallel_groups,
)
from lightning_sketch.curvature.hessian import Hessian
from lightning_sketch.curvature.operator import CurvatureOperator
from lightning_sketch.curvature.weighted_batches import agreement
from lightning_sketch.linalg.lanczos import start_vector
from lightning_sketch.operators.random import Key, words
from lightning_sketch.operators.space import VectorSpace, chunk_size

_POWERS = 3  # products after which a vector is typical of the largest
_NEAR = 1e-3  # the first step that is tried, relative to the length of parameters of typical size
_SLOPE = 1e-3  # relative error of a loss's slope along its gradient above which this is not its derivative


class ShardedHessian(Hessian):
    """The Hessian of a module whose parameters are DTensors; `Hessian(...)` returns one where they are.

    Vectors are sharded as the parameters are: `matvec` takes and returns the `space.size` numbers of this rank, and all
    ranks call the same methods in the same order. Lengths and sketches are summed over the ranks. A product costs four
    gradients of every batch, and memory for three vectors of this rank's shards and a copy of them, beside the
    gradients themselves; the first one, which chooses the step, some thirty gradients more and three vectors.
    Parameters are restored to the bit, and gradients that are there are kept.

    An error in `loss_fn` on one rank is raised on all, unless the others wait for it inside the module already.

    Args:
        loss_fn: (module, batch) -> mean loss of this rank's batch, a scalar. It runs the module as training does.
        module: The module.
        batches: The batches of this rank; ranks of one tensor-parallel group have the same. A rank with fewer batches
            than another one repeats one with weight zero.
        options: The other arguments of `Hessian`. A step of None is chosen before the first product.

    Raises:
        ValueError: If `hvp` needs second derivatives, or `micro_batch_size` is given. At a product, if the gradient is
            not the derivative of the loss, or differences of gradients do not agree for any step.
    """

    _takes_shards = True

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        module: nn.Module,
        batches: Iterable[Any],
        **options: Any,
    ):
        super().__init__(loss_fn, module, batches, **options)
        if self.hvp not in ("auto", "finite_differences"):
            raise ValueError(
                f"hvp={self.hvp!r} needs second derivatives, and PyTorch has none of a sharded module; use "
                "hvp='finite_differences', or 'auto', which is that here."
            )
        if self.batches.micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={self.batches.micro_batch_size} cuts batches on each rank by itself, while ranks of "
                "a sharded module run each batch together; pass smaller batches."
            )
        self.hvp = "finite_differences"
        self._space = Shards(self.layout, self.parameters, self.dtype)
        self._ranks = distributed.get_world_size()
        self.device = self._space.device
        # The module converts its inputs itself, and ranks that share an example have to draw the same numbers.
        self.batches.dtype, self.batches.device, self.batches.rank = None, self.device, 0
        self.batches.distributed = self._ranks > 1
        self._differences = CentralDifferences(self._space, options.get("step"))
        self._moved = False  # whether the parameters are not at θ
        self._loss_type = torch.float32
        self._weight, self._rounds = 0.0, 0  # of the batches of all ranks, inside `hold`
        self._checksums: list[int] | None = None  # of the parameters when `hold` was last entered
        self._changes, self._prepared_after = 0, 0  # how often they were others, and how often when a step was chosen

    def __repr__(self) -> str:
        return f"{super().__repr__()}, {self._space.size:,} of them on this rank"

    @property
    def space(self) -> VectorSpace:
        """The vectors, of which each rank has its part."""
        return self._space

    def last_error(self) -> Float[Tensor, " size"] | None:
        """Return a vector about as long as the error of the last product."""
        return self._differences.error

    def matvec(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        """Return this rank's part of H x for each vector x along the last axis, one after the other."""
        if x.shape[-1:] != (self._space.size,) or not x.is_floating_point():
            raise ValueError(
                f"a vector of this sharded module has {self._space.size:,} numbers on this rank ({self._n:,} on all), "
                f"got {x.dtype} of shape {tuple(x.shape)}; pass this rank's part."
            )
        with self._held():
            if x.ndim > 1:
                return torch.stack([self.matvec(row) for row in x]) if len(x) else torch.empty_like(x)
            with self._moving():
                self._prepare()
                return self._differences.product(self._difference, x.detach().to(self.dtype)).to(x.dtype)

    def gradient(self) -> Float[Tensor, " size"]:
        """Return this rank's part of the gradient ∇L(θ), in loss units per parameter unit."""
        total = torch.zeros(self._space.size, dtype=self.dtype, device=self.device)
        with self._held(), reduced_gradients(self.module):
            self._add_gradient(total, 1.0)
        return self._space.mean_of_copies_(total)

    def loss(self) -> float:
        """Return the mean loss over the batches of all ranks, L(θ), in loss units."""
        with self._held():
            return self._loss()

    def _loss(self) -> float:
        """Return the mean loss at the parameters as they are now."""
        reshard(self.module)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch, share in self._together():
                total += share * self._agreed_loss(batch).double()
        return float(summed(total)) / self._weight

    def per_batch(self) -> list[tuple[float, CurvatureOperator]]:
        """Refuse: ranks of a sharded module run their batches together.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "over_batches=True takes the batches of each rank apart, while ranks of a sharded module run each batch "
            "together; leave it out, or measure a checkpoint in one process."
        )

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of this rank's batch, L_b(θ)."""
        loss: Any = super().batch_loss(batch)
        return loss.full_tensor() if hasattr(loss, "full_tensor") else loss

    def evaluate(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(*args), a function of the module, with the random numbers of the batch under way."""
        if self._restores:
            assert self._state is not None
            self._state.restore()
        self.draw()
        return function(*args)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Prepare the module once for all products taken inside, during which its parameters must not be changed."""
        with self._held():
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        if self._state is not None:
            yield
            return
        with agreement(self.batches.distributed, self.device), ExitStack() as stack:
            stack.callback(reshard, self.module)
            self._check_trainable()
            _check_module(self.module)
            self._state = stack.enter_context(preserve_state(self.module, mode=self.mode, as_trained=True))
            stack.callback(self._let_go)
            now = checksums(self.parameters)
            if self.batches.anywhere(now != self._checksums):
                self._changes += 1
                differing = [self.layout.names[i] for i in self._space.differing(self.batches.gathered(now))]
                self._check_all(
                    not differing,
                    f"parameter {', '.join(differing[:3])} is whole on several ranks and not the same on all: FSDP2 "
                    "averages gradients of what it shards alone; apply fully_shard to the outermost module too.",
                )
                self._examine()
                self._weigh()
                self._loss()  # raises if it is NaN, of any batch
                self._seen_at, self._checksums = self._versions, now  # only if all ranks can take part
            self._weigh()
            yield

    @property
    def _versions(self) -> tuple[int, ...]:
        return (self._changes,)

    def _examine(self) -> None:  # type: ignore[override]
        """Evaluate the loss of one batch three times, and see whether it is the same with the same random numbers."""
        batch = next((batch for batch, share in self._own() if share), None)
        self._check_all(batch is not None, "batches of this rank hold no example with a weight, so there is no loss.")
        for last in (False, True):
            with torch.no_grad():
                found = []
                for draw in (0, 0, 1):
                    self.batches.key = self.batches.first, 0, draw
                    found.append(self._agreed_loss(batch))
            changes = not torch.allclose(found[0], found[1], rtol=1e-5, atol=0)
            if not self.batches.anywhere(changes):
                break
            self._restores = True
            self._check_all(
                not last or not changes,
                f"the loss of one batch is {float(found[0]):.8g} at one call and {float(found[1]):.8g} at the next, "
                "although random numbers, buffers and attributes were the same; pass a loss_fn whose value is fixed.",
            )
        groups = tensor_parallel_groups(self.module)
        self._check_all(
            not groups or self._batches_are_those_of(groups),
            "the batches of this rank are others than those of the ranks in its tensor-parallel group, which split the "
            "work on each example and have to get the same ones; see the sampler of the data loader.",
        )
        self.batches.is_random = self.batches.anywhere(not torch.equal(found[0], found[2]))
        self.batches.draws = self._noise[1] if self.batches.is_random else 1

    def _batches_are_those_of(self, groups: list[Any]) -> bool:
        """Return whether the batches of this rank have the contents of those of all others in some process groups."""
        try:
            own = content_hash([batch for batch, _ in self._own()])
        except (TypeError, RuntimeError):  # objects that cannot be read, batches that are DTensors
            own = 0
        equal = True
        for group in groups:
            ends = torch.tensor([own, -own], device=self.device)
            distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=group)
            equal &= bool(ends[0] == -ends[1])
        return equal

    def _prepare(self) -> None:
        """Choose a step before the first product at the present parameters, and check the gradient."""
        if self._prepared_after == self._changes:
            return
        near = _NEAR * (self._space.typical_length(self.parameters) or 1.0)
        v = torch.zeros(self._space.size, dtype=self.dtype, device=self.device)
        self._add_gradient(v, 1.0)
        size = self._space.norm(self._space.mean_of_copies_(v))
        # A gradient lies mostly along eigenvectors of large eigenvalues, so that its product stands out of noise.
        v = v.div_(size) if size else start_vector(self, 0, name="finite differences")
        self._differences.choose(self._difference, v, near)
        if size:
            self._check_slope(v, size)
        for _ in range(_POWERS):
            image = self._differences.product(self._difference, v)
            length = self._space.norm(image)
            v = image.div_(length) if length else start_vector(self, 1, name="finite differences")
        self._differences.choose(self._difference, v, self._differences.step)
        self._prepared_after = self._changes

    def _check_slope(self, along: Tensor, size: float) -> None:
        """Refuse a gradient that is not the derivative of the loss.

        Args:
            along: The gradient over its length.
            size: Its length.

        Raises:
            ValueError: If the loss changes along the gradient by another amount than this says, beyond the noise of
                gradients and that of the loss, which is how far five losses near to each other are from a parabola.
        """

        def at(t: float) -> float:
            self._move(along, t)
            return self._loss()

        h = self._differences.step
        slopes = [(at(t) - at(-t)) / (2 * t) for t in (h, h / 2)]
        low, left, middle, right, high = (at(h * k / 20) for k in (-2, -1, 0, 1, 2))
        cubic, quartic = high - low - 2 * (right - left), high + low - 4 * (right + left) + 6 * middle
        noise = math.hypot(cubic / 20**0.5, quartic / 140**0.5)  # what is left of five numbers without a parabola
        noise += 2 * torch.finfo(self._loss_type).eps * abs(middle)
        allowed = 3 * abs(slopes[1] - slopes[0]) + 10 * noise / h + min(20 * self._differences.noise, 0.1 * size)
        off = abs(slopes[1] - size)
        if off > _SLOPE * size + allowed:
            raise ValueError(
                f"the gradient is not the derivative of the loss, by {off / size:.1%} along itself, so that there is "
                "no Hessian: a function or hook changes it, a gradient is stopped (detach, targets under no_grad), or "
                "a part of the module is not averaged over ranks. Write the loss whose gradient it is; "
                "targets that are computed beforehand and are part of the batch are fixed."
            )

    def _difference(self, v: Tensor, h: float) -> Tensor:
        """Return (∇L(θ + h v) - ∇L(θ - h v)) / 2h."""
        total = torch.zeros(self._space.size, dtype=self.dtype, device=self.device)
        for sign in (1, -1):
            self._move(v, sign * h)
            self._add_gradient(total, sign / (2 * h))
        return self._space.mean_of_copies_(total)

    def _add_gradient(self, total: Tensor, factor: float) -> None:
        """Add a multiple of the gradient at the parameters as they are now, before copies are averaged."""
        pieces = self._space.pieces(total)
        for batch, share in self._together():
            with torch.enable_grad():
                loss = self._differentiable(self._agreed_loss(batch))
                # FSDP averages over its ranks, and copies are averaged: over all ranks, that is, each counts once.
                (loss * (share * self._ranks / self._weight)).backward()
            reshard(self.module)  # FSDP may have been told to wait for it
            for piece, parameter in zip(pieces, self.parameters, strict=True):
                if parameter.grad is not None:
                    piece.add_(_local_gradient(parameter), alpha=factor)
            for parameter in self.module.parameters():
                parameter.grad = None

    def _move(self, v: Tensor | None, t: float) -> None:
        """Set the parameters to θ + t v."""
        moved = self._space.pieces(v) if v is not None else [None] * len(self.parameters)
        for i, (parameter, origin, along) in enumerate(zip(self.parameters, self._origins, moved, strict=True)):
            here = local(parameter)
            if along is None:
                here.copy_(origin)
            elif here.dtype in HALF:
                _copy_dithered(here.view(-1), origin.view(-1), along.reshape(-1), t, Key(0, f"dither/{i}"))
            else:
                here.copy_(torch.add(origin.to(along.dtype), along, alpha=t))
        self._moved = v is not None
        reshard(self.module)

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Restore parameters and gradients afterwards, bit by bit."""
        self._origins = [local(parameter).clone() for parameter in self.parameters]
        try:
            with reduced_gradients(self.module):
                yield
        finally:
            outer, interrupts_held_back.restoring = interrupts_held_back.restoring, True
            try:
                self._move(None, 0.0)
                del self._origins
            finally:
                interrupts_held_back.restoring = outer

    def _own(self) -> Iterator[tuple[Any, float]]:
        """Yield the batches of this rank with their weights, each once for each draw of random numbers."""
        for index, batch in enumerate(self.batches.batches, start=self.batches.first):
            share = self.batches.weight(batch, None) / self.batches.draws
            for draw in range(self.batches.draws):
                self.batches.key = index, 0, draw
                yield batch, share

    def _together(self) -> Iterator[tuple[Any, float]]:
        """Yield equally many batches on every rank; one that has no more repeats one with weight zero."""
        mine = ((batch, share, self.batches.key) for batch, share in self._own() if share)
        spare: Any = None
        for _ in range(self._rounds):
            batch, share, key = next(mine, None) or (*spare[:1], 0.0, *spare[1:])
            spare, self.batches.key = spare or (batch, key), key
            yield batch, share

    def _weigh(self) -> None:
        """Find out the sum of the weights of all batches of all ranks, and the largest number of them on a rank."""
        shares = [share for _, share in self._own() if share]
        everywhere = self.batches.gathered((sum(shares), len(shares)))
        self._weight, self._rounds = sum(weight for weight, _ in everywhere), max(count for _, count in everywhere)

    def _agreed_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, or raise on all ranks before any waits for another in the backward pass.

        Raises:
            ValueError: If it is NaN or infinite on one at the present parameters, or failed on another rank.
        """
        failure: BaseException | None = None
        try:
            raise_interrupt()
            loss = self.batch_loss(batch)
            self._loss_type = loss.dtype
            if not (self._moved or self._all_seen or loss.isfinite()):
                raise ValueError(
                    f"the loss of batch {self.batches.key[0]} is {float(loss.detach())} at these parameters, so that "
                    "there is nothing to differentiate; use the weights of an earlier step."
                )
        except (Exception, KeyboardInterrupt) as error:
            if not self.batches.distributed:
                raise
            failure = error
        if self.batches.anywhere(failure is not None):
            raise failure or ValueError("another rank could not compute its loss; see its output.")
        return loss

    def _check_all(self, right: bool, message: str) -> None:
        """Raise ValueError on all ranks if something is wrong on one; the message is that of a rank where it is."""
        if self.batches.anywhere(not right):
            raise ValueError(message if not right else "another rank cannot take part; see its message.")


def _check_module(module: nn.Module) -> None:
    """Refuse parameters that cannot be moved, or whose gradients do more than differentiate."""
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
            raise ValueError(
                f"Embedding(max_norm={part.max_norm}) writes into its weight at each forward pass, and differences of "
                "gradients move weights; normalize what it returns instead."
            )
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.float16:
            raise TypeError(
                f"parameter {name} is sharded in float16, which has no room for small steps; use bfloat16 or float32."
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter {name} has a hook that runs when its gradient is complete, as an optimizer step inside the "
                "backward pass does; it would run at each product. Remove it first."
            )


def _local_gradient(parameter: Any) -> Tensor:
    """Return this rank's shard of a gradient, sharded as its parameter is."""
    gradient = parameter.grad
    if hasattr(parameter, "placements") and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    found = local(gradient)
    return found.to_dense() if found.layout != torch.strided else found


def _copy_dithered(here: Tensor, origin: Tensor, along: Tensor, t: float, key: Key) -> None:
    """Write bfloat16 numbers plus t times others, rounded up or down at random, right on average.

    Rounded to the nearest, small steps would come to nothing. A number is rounded in the same way each time.
    """
    size = chunk_size(here.device)
    for start in range(0, len(here), size):
        part = slice(start, start + size)
        moved = origin[part].float().add_(along[part], alpha=t)
        random = words(key, start, start + len(moved), moved.device) & 0xFFFF
        bits = moved.view(torch.int32) + random.to(torch.int32)
        here[part] = (bits & -0x10000).view(torch.float32).where(moved.isfinite(), moved)
