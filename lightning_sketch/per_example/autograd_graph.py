"""Gradients of what all examples share, at the operations where it meets them.

    y_b = p + x_b, p - x_b, p . x_b, or y_b = p         share of example b: g_b, -g_b, g_b . x_b, g_b

p      a bare parameter (class token, positional embedding, LayerScale, bias), or what an embedding gave for
       positions, without an axis of examples
g_b    gradient of the loss with respect to y_b, before autograd adds it up over the examples

In between, p may have been reshaped, cast, cut or transposed. Operations are found by one walk through the graph of
the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Size, Tensor

from lightning_sketch.per_example.factors import Factor, Unsupported, wide


def _repeated(node: Any, place: int, gradient: Tensor) -> Tensor:
    """As if the repetition along the first axis had been an expansion, and none along others."""
    repeats = node._saved_repeats
    sizes = [1] * (len(repeats) - len(node._saved_self_sym_sizes)) + list(node._saved_self_sym_sizes)
    apart = gradient.reshape([n for pair in zip(repeats, sizes, strict=True) for n in pair])
    others = tuple(range(2, apart.ndim, 2))
    return apart.sum(others) if others else apart


_FACTORS: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "AddBackward0": lambda node, place, g: g * node._saved_alpha if place else g,
    "SubBackward0": lambda node, place, g: -g * node._saved_alpha if place else g,
    "ExpandBackward0": lambda node, place, g: g,
    "RepeatBackward0": _repeated,
    "MulBackward0": lambda node, place, g: g * wide(node._saved_self if place else node._saved_other),
}
"""Gradient with respect to argument `place` of an operation, before it is summed over repeated axes."""

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
"""Operations that keep all numbers in their order."""

_MOVES = {"PermuteBackward0", "SelectBackward0", "SliceBackward0", "TBackward0", "TransposeBackward0"}
"""Operations that move numbers or drop some; they save no tensor, so that their nodes can be called again."""


@dataclass(frozen=True, eq=False)
class Shared:
    """A tensor without an axis of examples, and what makes factors of each example's share in its gradient."""

    name: str
    shape: Size
    factors: Callable[[Float[Tensor, "examples numbers"]], list[Factor]]


@dataclass(frozen=True, eq=False)
class Meeting:
    """An operation where a shared tensor, of this shape by then, meets the examples.

    `way` are the operations that came before, with the shape that each gave.
    """

    shared: Shared
    way: tuple[tuple[Any, Size], ...]
    node: Any
    place: int

    def factors(self, gradient: Tensor, examples: int) -> list[Factor]:
        """From the gradient of what the operation returned.

        Raises:
            Unsupported: if it has no axis of examples.
        """
        gradient = _FACTORS[self.node.name()](self.node, self.place, wide(gradient))
        shape = self.way[-1][1] if self.way else self.shared.shape
        values = _by_example(gradient, shape, examples)
        for node, shape in reversed(self.way):
            if node.name() in _MOVES:
                values = torch.stack([node(row.view(shape)).flatten() for row in values])
        return self.shared.factors(values)


class Graph:
    """Who uses what in the graph of a loss.

    Args:
        loss: a tensor with a graph.
    """

    def __init__(self, loss: Tensor):
        self._users: dict[Any, list[tuple[Any, int]]] = {}
        self._leaves: dict[int, Any] = {}
        waiting = [loss.grad_fn]
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
        """Return the node where a parameter's gradient is added up; None if the loss does not depend on it openly."""
        return self._leaves.get(id(parameter))

    def meetings(self, node: Any, shared: Shared) -> tuple[list[Meeting], list[str]]:
        """Where the tensor that `node` stands for meets the examples; and in words, where it is used otherwise."""
        found: list[Meeting] = []
        otherwise: list[str] = []
        waiting: list[tuple[Any, tuple[tuple[Any, Size], ...]]] = [(node, ())]
        while waiting:
            node, way = waiting.pop()
            for user, place in self._users.get(node, []):
                kind = user.name()
                if kind in _SAME_ORDER or kind in _MOVES:
                    waiting.append((user, (*way, (user, Size(user._input_metadata[0].shape)))))
                elif kind not in _FACTORS:
                    otherwise.append(f"it is used by {kind.removesuffix('0').removesuffix('Backward')}")
                elif kind == "MulBackward0" and not _can_be_read(user, place):
                    otherwise.append("it is a factor inside activation checkpointing, where the other one is not kept")
                else:
                    found.append(Meeting(shared, way, user, place))
        return found, otherwise


def _can_be_read(node: Any, place: int) -> bool:
    """Whether the other factor is plainly there: what checkpointing computes again may be asked for only once."""
    saved = node._raw_saved_self if place else node._raw_saved_other
    return getattr(saved, "unpack_hook", saved) is None


def _by_example(gradient: Tensor, shape: Size, examples: int) -> Tensor:
    """Sum over the axes along which a tensor of this shape was repeated, but for the first: (examples, numbers)."""
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
