"""Gradients of each example from the ordinary backward pass of a batch.

A layer's input, kept in its forward, and the gradient of its output, seen in the backward, give the share of each
example in the gradient of its parameters. What they are is not changed: training goes on bit for bit as without.

Exact for layers that treat the examples along the first axis independently; which ones are served: `layers.py`,
`attention.py`, `consumers.py`. Costs the inputs of the layers, which autograd keeps anyway, until their gradients are
made.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_sketch.gradients import attention
from lightning_sketch.gradients.consumers import Graph, Meeting, Shared
from lightning_sketch.gradients.layers import Rule, rule_of
from lightning_sketch.gradients.matrices import looked_up
from lightning_sketch.gradients.pieces import Full, NotServed, Piece
from lightning_sketch.gradients.undisturbed import depth


@runtime_checkable
class Sink(Protocol):
    """What pieces are added to."""

    def add(self, piece: Piece) -> None:
        """Add a piece of the gradients of the examples."""


class ExampleHooks:
    """Hooks that give pieces of per-example gradients to a sink, in passes that are made anyway.

    Args:
        module: whose layers are watched.
        parameters: by name; what is not among them, or frozen, is left out.

    Attributes:
        served: names that got a piece in the last pass.
        reasons: by name, in words, why a parameter was not served in the last pass, or not by all of its uses.

    Raises:
        ValueError: if the module, or a part of it, is compiled: a compiled forward may skip hooks without a word.

    >>> class Squares:
    ...     total = 0
    ...
    ...     def add(self, piece):
    ...         self.total = self.total + (piece.values**2).sum(1)
    >>> module, squares = nn.Linear(2, 1), Squares()
    >>> hooks = ExampleHooks(module, {"bias": module.bias})
    >>> with hooks.recording(squares, examples=3):
    ...     loss = (module(torch.ones(3, 2)) * torch.tensor([[1.0], [2.0], [3.0]])).sum()
    ...     hooks.before_backward(loss)
    ...     loss.backward()
    >>> squares.total
    tensor([1., 4., 9.])
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]):
        _refuse_compiled(module)
        self._module, self._parameters = module, dict(parameters)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.served: set[str] = set()
        self.reasons: dict[str, str] = {}
        self._sink: Sink | None = None
        self._clear()

    def attach(self, sink: Sink, examples: int) -> None:
        """Put hooks on the layers, for the forward passes of one batch of so many examples; detaches first."""
        self.detach()
        _refuse_compiled(self._module)
        self.served, self.reasons = set(), {}
        self._sink, self._examples, self._depth = sink, examples, depth()
        for path, part in self._module.named_modules():
            if type(part).forward is nn.MultiheadAttention.forward and not is_parametrized(part):
                self._attach_attention(part)
            elif (rule := rule_of(part)) is not None and part._parameters:
                hook = partial(self._after_layer, rule, path)
                self._handles.append(part.register_forward_hook(hook, with_kwargs=True))

    def before_backward(self, loss: Tensor) -> None:
        """Find where shared tensors meet the examples, and take gradients from now on, until `detach`."""
        if self._sink is None:
            raise RuntimeError("before_backward was called without attach; call attach before the forward pass.")
        bare = {
            name: parameter
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and id(parameter) not in self._taken
        }
        if loss.grad_fn is not None and (bare or self._shared):
            self._meet(Graph(loss), bare)
        self._armed = True

    def detach(self) -> None:
        """Take all hooks away and forget the graph; does nothing a second time."""
        for handle in self._handles:
            handle.remove()
        for listener in self._listeners.values():
            attention.stop(listener)
        self._sink = None
        self._clear()

    @contextmanager
    def recording(self, sink: Sink, examples: int) -> Iterator[None]:
        """`attach`, and `detach` at the end, after an error too."""
        self.attach(sink, examples)
        try:
            yield
        finally:
            self.detach()

    def _clear(self) -> None:
        self._armed = False
        self._handles: list[Any] = []
        self._listeners: dict[int, attention.Listener] = {}
        self._taken: set[int] = set()  # parameters that hooks of layers serve, so that no other way counts them again
        self._shared: list[tuple[Any, Shared]] = []
        self._met: set[tuple[Any, int]] = set()

    def _acts(self) -> bool:
        return self._sink is not None and torch.is_grad_enabled() and depth() == self._depth

    def _wanted(self, parameters: Any) -> list[nn.Parameter]:
        return [p for p in parameters if p is not None and p.requires_grad and id(p) in self._names]

    def _explain(self, parameters: list[nn.Parameter], reason: str) -> None:
        for parameter in parameters:
            self.reasons.setdefault(self._names[id(parameter)], reason)

    def _after_layer(
        self, rule: Rule, path: str, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        own = {n: p for n, p in part._parameters.items() if p is not None and (rule.names is None or n in rule.names)}
        wanted = self._wanted(own.values()) if self._acts() else []
        if not wanted or not (isinstance(output, Tensor) and output.requires_grad):
            return
        self._taken |= {id(p) for p in wanted}
        input = args[0] if args else next(iter(kwargs.values()))
        if isinstance(part, nn.Embedding) and input.shape[:1] != (self._examples,):
            shape = output.shape
            shared = Shared(self._names[id(part.weight)], shape, partial(self._looked_up, part, input.detach()))
            self._shared.append((output.grad_fn, shared))
        elif input.shape[:1] != (self._examples,) or output.shape[:1] != (self._examples,):
            self._explain(
                wanted,
                f"{type(part).__name__} {path} was called with shape {tuple(input.shape)} and returned "
                f"{tuple(output.shape)}, where the first axis is not that of the {self._examples} examples",
            )
        else:
            needed = any(p.requires_grad for n, p in own.items() if n != "bias")
            self._on_gradient(
                output, wanted, partial(rule.pieces, part), input.detach() if needed else input.to("meta")
            )

    def _looked_up(self, part: nn.Embedding, index: Tensor, values: Tensor) -> list[Piece]:
        return [looked_up(part, index.reshape(1, -1).expand(len(values), -1), values)]

    def _attach_attention(self, part: nn.MultiheadAttention) -> None:
        def before(part: nn.MultiheadAttention, args: tuple) -> None:
            if self._acts() and self._wanted(attention.matrices(part)):
                listener = partial(self._after_product, part, [])
                self._listeners[id(part)] = listener
                attention.listen(listener)

        def after(part: nn.MultiheadAttention, args: tuple, output: Any) -> None:
            if id(part) in self._listeners:
                attention.stop(self._listeners.pop(id(part)))

        self._handles.append(part.register_forward_pre_hook(before))
        self._handles.append(part.register_forward_hook(after, always_call=True))

    def _after_product(
        self,
        part: nn.MultiheadAttention,
        batch: list[int],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
    ) -> None:
        batch += [input.shape[1]] if input.ndim == 3 else []
        own = self._wanted(attention.matrices(part))
        found = attention.within(weight, own), attention.within(bias, own)
        wanted = [place[0] for place in found if place is not None]
        if not wanted or not output.requires_grad:
            return
        self._taken |= {id(p) for p in wanted}
        if batch[:1] != [self._examples]:
            self._explain(wanted, f"the attention was called with {batch[:1]} sequences for {self._examples} examples")
            return
        self._on_gradient(
            output,
            wanted,
            lambda kept, gradient: attention.product_pieces(*found, kept, gradient, self._examples),
            input.detach() if found[0] is not None else None,
        )

    def _on_gradient(
        self,
        output: Tensor,
        wanted: list[nn.Parameter],
        make: Callable[[Any, Tensor], list[Piece]],
        input: Tensor | None,
    ) -> None:
        """Once the gradient of `output` is known, make pieces of it and the input."""
        kept, shape = [input], output.shape
        version = 0 if input is None else input._version

        def act(gradient: Tensor) -> None:
            if not self._armed:
                return
            if not kept:
                self._explain(wanted, "more than one backward pass went through it")
            elif (input := kept.pop()) is not None and input._version != version:
                self._explain(wanted, "the input of its layer was changed in place after the layer had used it")
            else:
                self._give(wanted, lambda: make(input, gradient.reshape(shape)))

        # An operation in place on a view makes the view forget its own history, and with it the hook.
        base = output._base
        whole = base is not None and base.requires_grad and base.numel() == output.numel()
        target = base if whole and base.is_contiguous() and output.is_contiguous() else output
        self._handles.append(target.register_hook(act))

    def _meet(self, graph: Graph, bare: Mapping[str, nn.Parameter]) -> None:
        shared = list(self._shared)
        for name, parameter in bare.items():
            node = graph.leaf(parameter)
            if node is not None:
                shared.append((node, Shared(name, parameter.shape, lambda values, p=parameter: [Full(p, values)])))
            elif graph.hides:
                self._explain([parameter], "it is used inside reentrant activation checkpointing, if at all")
        for node, one in shared:
            meetings, otherwise = graph.meetings(node, one)
            if otherwise:
                uses = " and ".join(dict.fromkeys(otherwise))
                self._explain([self._parameters[one.name]], self._owner(self._parameters[one.name]) + uses)
            for meeting in meetings:
                if (meeting.node, meeting.place) not in self._met:
                    self._met.add((meeting.node, meeting.place))
                    self._handles.append(meeting.node.register_prehook(partial(self._at_meeting, meeting)))

    def _owner(self, parameter: nn.Parameter) -> str:
        for path, part in self._module.named_modules():
            if any(own is parameter for own in part._parameters.values()):
                kind = f"{type(part).__name__} {path}".strip()
                if type(part).forward is nn.MultiheadAttention.forward or rule_of(part) is not None:
                    return f"beside what {kind} does with it, "
                return f"{kind} has no rule (gradients.register_layer adds one), and "
        return ""

    def _at_meeting(self, meeting: Meeting, gradients: tuple[Tensor | None, ...]) -> None:
        (gradient,) = gradients
        if self._armed and gradient is not None:
            parameter = self._parameters[meeting.shared.name]
            self._give([parameter], lambda: meeting.pieces(gradient, self._examples))

    def _give(self, wanted: list[nn.Parameter], make: Callable[[], list[Piece]]) -> None:
        devices = {p.device.type for p in wanted}
        with torch.no_grad(), torch.autocast(devices.pop(), enabled=False):
            try:
                pieces = make()
            except NotServed as error:
                self._explain(wanted, str(error))
                return
            for piece in pieces:
                name = self._names.get(id(piece.parameter))
                if name is not None and piece.parameter.requires_grad:
                    self.served.add(name)
                    self._sink.add(piece)


def _refuse_compiled(module: nn.Module) -> None:
    for path, part in module.named_modules():
        if getattr(part, "_compiled_call_impl", None) is not None or "_orig_mod" in part._modules:
            kind, where = type(part).__name__, f" ({path})" if path else ""
            raise ValueError(
                f"{kind}{where} is compiled, and a compiled forward may skip hooks without a word; train without "
                "torch.compile, or take per-example gradients by another engine ('loop' or 'vmap')."
            )
