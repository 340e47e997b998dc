"""What is known between the start of a batch's forward pass and the end of its backward pass."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_sketch.gradients.pieces import NotServed, Piece
from lightning_sketch.gradients.undisturbed import depth


@runtime_checkable
class Sink(Protocol):
    """What pieces are added to."""

    def add(self, piece: Piece) -> None:
        """Add a piece of the gradients of the examples."""


class Pass:
    """One forward and backward pass of a batch, on its way from hooks to a sink.

    Args:
        parameters: by name, those whose pieces are wanted.
        sink: where pieces go.
        examples: how many there are in the batch.

    Attributes:
        taken: parameters that a layer's own hook serves, by id; no other way may count them again.
        met: operations in the graph, with the place of an argument, that have a hook for it.
        hidden: parameters that the graph does not show, but may hide.
        served: names that got a piece.
        reasons: by name, why a parameter, or one of its uses, was not served.
        handles: all that `close` takes away.
        armed: whether the backward pass that counts has begun.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sink: Sink, examples: int):
        self.parameters, self.sink, self.examples = parameters, sink, examples
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._depth = depth()
        self.taken: set[int] = set()
        self.served: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.hidden: list[nn.Parameter] = []
        self.met: set[tuple[Any, int]] = set()
        self.handles: list[Any] = []
        self.armed = False

    def close(self) -> None:
        """Take all hooks away, and with them what they keep."""
        if self.armed:
            missed = [parameter for parameter in self.hidden if self.name(parameter) not in self.served]
            self.explain(missed, "if it is used, then inside reentrant checkpointing, where its use is not seen")
        self.armed = False
        for handle in self.handles:
            handle.remove()

    def acts(self) -> bool:
        """Whether a forward pass now is one of the batch, not a measurement's."""
        return depth() == self._depth

    def wanted(self, parameters: Iterable[nn.Parameter | None]) -> list[nn.Parameter]:
        """Those that are trained and asked for."""
        return [p for p in parameters if p is not None and p.requires_grad and id(p) in self._names]

    def name(self, parameter: nn.Parameter) -> str:
        """Of one that is wanted."""
        return self._names[id(parameter)]

    def explain(self, parameters: Iterable[nn.Parameter], reason: str) -> None:
        """Say why these are not served; what was said first stays."""
        for parameter in parameters:
            self.reasons.setdefault(self.name(parameter), reason)

    def on_gradient(
        self, output: Tensor, wanted: list[nn.Parameter], make: Callable[[Any, Tensor], list[Piece]], input: Any
    ) -> None:
        """Once the gradient of `output` is known, make pieces from it and the input, which is then let go."""
        kept, shape = [input], output.shape
        version = input._version if isinstance(input, Tensor) else None

        def act(gradient: Tensor) -> None:
            if not self.armed:
                return
            if not kept:
                self.explain(wanted, "more than one backward pass went through its layer")
                return
            input = kept.pop()
            if version is not None and input._version != version:
                self.explain(wanted, "the input of its layer was changed in place after the layer had used it")
            else:
                self.give(wanted, lambda: make(input, gradient.reshape(shape)))

        # An operation in place on a view makes the view forget its own history, and with it the hook.
        base = output._base
        whole = base is not None and base.requires_grad and base.numel() == output.numel()
        target = base if whole and base.is_contiguous() and output.is_contiguous() else output
        self.handles.append(target.register_hook(act))

    def give(self, wanted: list[nn.Parameter], make: Callable[[], list[Piece]], whose: str = "") -> None:
        """Make pieces, in the precision of their factors, and give the wanted ones to the sink.

        `whose` is how the reason begins if they cannot be made.
        """
        with torch.no_grad(), torch.autocast(wanted[0].device.type, enabled=False):
            try:
                pieces = make()
            except NotServed as error:
                self.explain(wanted, f"{whose}{error}")
                return
            for piece in pieces:
                if self.wanted([piece.parameter]):
                    self.served.add(self.name(piece.parameter))
                    self.sink.add(piece)
