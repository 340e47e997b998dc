"""Gradients of tensors that all examples share, found at the operations that broadcast them over the examples.

    y_b = p + x_b, p - x_b, p . x_b, or y_b = p         share of example b: g_b, -g_b, g_b . x_b, g_b

p      a bare parameter (class token, positional embedding, LayerScale, bias), or the output of an embedding of
       positions, without an axis of examples
g_b    gradient of the loss with respect to y_b, before autograd adds it up over the examples

In between, p may have been reshaped, cast, sliced or transposed. Operations are found by one walk through the graph
of the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Size, Tensor

from lightning_sketch.per_example.factors import Factor, Unsupported, wide


def _repeated(node: Any, place: int, gradient: Tensor) -> Tensor:
    """Return the gradient of a `repeat` as if it had expanded the first axis and repeated no other."""
    repeats = node._saved_repeats
    sizes = [1] * (len(repeats) - len(node._saved_self_sym_sizes)) + list(node._saved_self_sym_sizes)
    apart = gradient.reshape([n for pair in zip(repeats, sizes, strict=True) for n in pair])
    others = tuple(range(2, apart.ndim, 2))
    return apart.sum(others) if others else apart


# The gradient with respect to argument `place` of an operation, before it is summed over broadcast axes.
_GRADIENTS: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "AddBackward0": lambda node, place, g: g * node._saved_alpha if place else g,
    "SubBackward0": lambda node, place, g: -g * node._saved_alpha if place else g,
    "ExpandBackward0": lambda node, place, g: g,
    "RepeatBackward0": _repeated,
    "MulBackward0": lambda node, place, g: g * wide(node._saved_self if place else node._saved_other),
}

# Operations that keep all numbers in their order.
_SAME_ORDER = {
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}

# Operations that move numbers or drop some; they save no tensor, so that their nodes can be called again.
_MOVES = {"PermuteBackward0", "SelectBackward0", "SliceBackward0", "TBackward0", "TransposeBackward0"}


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """A tensor without an axis of examples.

    Attributes:
        name: The name of the parameter that it is, or was looked up in.
        shape: The shape of the tensor.
        factors: Makes factors from each example's share of the tensor's gradient, (examples, numbers).
    """

    name: str
    shape: Size
    factors: Callable[[Float[Tensor, "examples numbers"]], list[Factor]]


@dataclass(frozen=True, eq=False)
class BroadcastUse:
    """An operation that broadcasts a shared tensor over the examples.

    Attributes:
        shared: The tensor.
        path: The operations between the tensor and this one, each with the shape of its result.
        node: The operation's node in the graph.
        place: Which argument of the operation the tensor is.
    """

    shared: SharedTensor
    path: tuple[tuple[Any, Size], ...]
    node: Any
    place: int

    def factors(self, gradient: Tensor, examples: int) -> list[Factor]:
        """Return the factors of the shared tensor, from the gradient of the operation's result.

        Raises:
            Unsupported: if the gradient has no axis of examples.
        """
        gradient = _GRADIENTS[self.node.name()](self.node, self.place, wide(gradient))
        shape = self.path[-1][1] if self.path else self.shared.shape
        values = _by_example(gradient, shape, examples)
        for node, shape in reversed(self.path):
            if node.name() in _MOVES:
                values = torch.stack([node(row.view(shape)).flatten() for row in values])
        return self.shared.factors(values)


class Graph:
    """The graph of a loss, read backward: which operations use the result of each node.

    Args:
        loss: A tensor with a graph.

    Attributes:
        hides: Whether reentrant checkpointing hides a part of the graph.
    """

    def __init__(self, loss: Tensor):
        self._users: dict[Any, list[tuple[Any, int]]] = {}
        self._leaves: dict[int, Any] = {}
        waiting: list[Any] = [loss.grad_fn]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            for place, (used, _) in enumerate(node.next_functions):
                if used is None:
                    continue
                self._users.setdefault(used, []).append((node, place))
                if used not in seen:
                    seen.add(used)
                    waiting.append(used)
            variable = getattr(node, "variable", None)
            if variable is not None:
                self._leaves[id(variable)] = node
        self.hides = any(node.name() == "CheckpointFunctionBackward" for node in seen)

    def leaf(self, parameter: Tensor) -> Any:
        """Return the node where a parameter's gradient is accumulated; None if the graph shows no such node."""
        return self._leaves.get(id(parameter))

    def uses(self, node: Any, shared: SharedTensor) -> tuple[list[BroadcastUse], list[str]]:
        """Return the operations that broadcast the result of `node`, and in words, each unsupported use of it."""
        found: list[BroadcastUse] = []
        unsupported: list[str] = []
        waiting: list[tuple[Any, tuple[tuple[Any, Size], ...]]] = [(node, ())]
        while waiting:
            node, path = waiting.pop()
            for user, place in self._users.get(node, []):
                kind = user.name()
                if kind in _SAME_ORDER or kind in _MOVES:
                    waiting.append((user, (*path, (user, Size(user._input_metadata[0].shape)))))
                elif kind not in _GRADIENTS:
                    unsupported.append(f"it is used by {kind.removesuffix('0').removesuffix('Backward')}")
                elif kind == "MulBackward0" and not _can_be_read(user, place):
                    reason = "it is a factor inside activation checkpointing, where the other one is not kept"
                    unsupported.append(reason)
                else:
                    found.append(BroadcastUse(shared, path, user, place))
        return found, unsupported


def _can_be_read(node: Any, place: int) -> bool:
    """Return whether the other factor was saved itself; checkpointing recomputes it, and only once."""
    saved = node._raw_saved_self if place else node._raw_saved_other
    return getattr(saved, "unpack_hook", saved) is None


def _by_example(gradient: Tensor, shape: Size, examples: int) -> Tensor:
    """Return a gradient summed over all broadcast axes but that of the examples: (examples, numbers)."""
    if examples == 1:
        return gradient.sum_to_size(shape).reshape(1, -1)
    more = gradient.ndim - len(shape)
    if not gradient.ndim or len(gradient) != examples or (more == 0 and shape[0] != 1):
        raise Unsupported(
            f"where it is used, the result has shape {tuple(gradient.shape)}, without an axis of the {examples} "
            "examples in front of its own"
        )
    target = (examples, *[1] * (more - 1), *shape) if more else (examples, *shape[1:])
    return gradient.sum_to_size(target).reshape(examples, -1)
