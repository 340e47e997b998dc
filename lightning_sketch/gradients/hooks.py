"""Gradients of each example from the ordinary backward pass of a batch.

A layer's input, kept in its forward, and the gradient of its output, seen in the backward, give the share of each
example in the gradient of its parameters. Neither is changed: training goes on bit for bit as without.

Exact for layers that treat the examples, along the first axis, independently; which ones are served: `layers.py`,
`attention.py`, `consumers.py`. The inputs of layers are kept until their gradients are known, as autograd does anyway.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_sketch.gradients import attention
from lightning_sketch.gradients.consumers import Shared, meet
from lightning_sketch.gradients.layers import Rule, rule_of
from lightning_sketch.gradients.matrices import looked_up
from lightning_sketch.gradients.one_pass import Pass, Sink
from lightning_sketch.gradients.pieces import Full, Piece


class ExampleHooks:
    """Hooks that give pieces of per-example gradients to a sink, in passes that are made anyway.

    Args:
        module: whose layers are watched.
        parameters: by name; what is not among them, or frozen, is left out. Without any no layer is watched.

    Raises:
        ValueError: if the module, or a part of it, is compiled: a compiled forward may skip hooks without a word.

    >>> import torch
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
        self._module, self._parameters = module, dict(parameters)
        self._parts()
        self._pass: Pass | None = None
        self._shared: list[tuple[Any, Shared]] = []
        self._for_all: set[tuple[str, int]] = set()
        self.served: set[str] = set()
        """Names that got a piece in the last pass."""
        self.reasons: dict[str, str] = {}
        """By name, in words, why a parameter was not served in the last pass, or not by all of its uses."""

    def attach(self, sink: Sink, examples: int) -> None:
        """Put hooks on the layers, for the forward passes of one batch of so many examples; detaches first."""
        self.detach()
        parts = self._parts()
        self._pass = Pass(self._parameters, sink, examples)
        self.served, self.reasons = self._pass.served, self._pass.reasons
        for path, part in parts:
            if attention.is_known(part):
                attention.watch(part, self._pass)
            elif (rule := rule_of(part)) is not None and part._parameters:
                hook = partial(self._after_layer, rule, path)
                self._pass.handles.append(part.register_forward_hook(hook, with_kwargs=True))

    def before_backward(self, loss: Tensor) -> None:
        """Find where shared tensors meet the examples, and take gradients from now on, until `detach`.

        Raises:
            RuntimeError: if no pass was started by `attach`.
        """
        if self._pass is None:
            raise RuntimeError("before_backward was called outside of a pass; call attach before the forward pass.")
        trained = self._pass.wanted(self._parameters.values())
        bare = [p for p in trained if id(p) not in self._pass.taken]
        if loss.grad_fn is not None and (bare or self._shared):
            shared = [(p, Shared(self._pass.name(p), p.shape, partial(_as_it_is, p))) for p in bare]
            meet(loss, self._pass, [*shared, *self._shared], self._owner)
        self._pass.armed = True

    def detach(self) -> None:
        """Take all hooks away and forget the graph; does nothing a second time."""
        if self._pass is not None:
            self._pass.close()
        self._pass = None
        self._shared.clear()

    @contextmanager
    def recording(self, sink: Sink, examples: int) -> Iterator[None]:
        """`attach`, and `detach` at the end, after an error too."""
        self.attach(sink, examples)
        try:
            yield
        finally:
            self.detach()

    def _parts(self) -> list[tuple[str, nn.Module]]:
        """The module's parts, none of them compiled; none at all if nothing is asked for."""
        if not self._parameters:
            return []
        _refuse_compiled(self._module)
        return list(self._module.named_modules())

    def _after_layer(
        self, rule: Rule, path: str, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        one = self._pass
        own = {n: p for n, p in part._parameters.items() if rule.names is None or n in rule.names}
        wanted = one.wanted(own.values()) if one.acts() else []
        if not wanted or not (isinstance(output, Tensor) and output.requires_grad):
            return
        one.taken |= {id(p) for p in wanted}
        input = args[0] if args else next(iter(kwargs.values()))
        if self._has_examples(path, part, input, output):
            needed = any(p.requires_grad for n, p in own.items() if p is not None and n != "bias")
            input = input.detach() if needed else input.to("meta")
            one.on_gradient(output, wanted, partial(rule.pieces, part), input)
        elif isinstance(part, nn.Embedding):
            pieces = partial(_looked_up_by_all, part, input.detach())
            self._shared.append((output.grad_fn, Shared(one.name(part.weight), output.shape, pieces)))
        else:
            one.explain(
                wanted,
                f"{type(part).__name__} {path} was called with shape {tuple(input.shape)} and returned "
                f"{tuple(output.shape)}, where the first axis is not that of the {one.examples} examples",
            )

    def _has_examples(self, path: str, part: nn.Module, input: Tensor, output: Tensor) -> bool:
        """Whether the first axis is that of the examples.

        It is not in an embedding that was once seen to look positions up for all examples: a later batch may have as
        many examples as there are positions.
        """
        fits = input.shape[:1] == output.shape[:1] == (self._pass.examples,)
        if not fits and isinstance(part, nn.Embedding):
            self._for_all.add((path, input.ndim))
        return fits and (path, input.ndim) not in self._for_all

    def _owner(self, name: str) -> str:
        """How a reason begins: whose parameter it is."""
        for path, part in self._module.named_modules():
            if any(own is self._parameters[name] for own in part._parameters.values()):
                kind = f"{type(part).__name__} {path}".strip()
                known = attention.is_known(part) or rule_of(part) is not None
                return f"{kind} {'is known' if known else 'has no rule (gradients.register_layer adds one)'}, but "
        return ""


def _as_it_is(parameter: nn.Parameter, values: Tensor) -> list[Piece]:
    return [Full(parameter, values)]


def _looked_up_by_all(part: nn.Embedding, index: Tensor, values: Tensor) -> list[Piece]:
    return [looked_up(part, index.reshape(1, -1).expand(len(values), -1), values)]


def _refuse_compiled(module: nn.Module) -> None:
    for path, part in module.named_modules():
        by_trainer = getattr(part, "_compiler_ctx", None)  # Lightning takes the wrapper off and compiles the steps
        if getattr(part, "_compiled_call_impl", None) is not None or "_orig_mod" in part._modules or by_trainer:
            kind, where = type(part).__name__, f" ({path})" if path else ""
            raise ValueError(
                f"{kind}{where} is compiled, and a compiled forward may skip hooks without a word; train without "
                "torch.compile, or take per-example gradients by another engine or fallback ('loop' or 'vmap')."
            )
