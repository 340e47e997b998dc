"""Gradients of each example from the ordinary backward pass of a batch.

A layer's input, kept in its forward, and the gradient of its output, seen in the backward, give the share of each
example in the gradient of its parameters. Neither is changed: training goes on bit for bit as without.

Exact for layers that treat the examples, along the first axis, independently. Layers have their rules in `rules/`;
parameters that are used without a layer are found in the graph of the loss by `autograd_graph`. The inputs of layers
are kept until their gradients are known, as autograd does anyway.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_sketch._private import required
from lightning_sketch.autodiff.preserve_state import measurement_depth
from lightning_sketch.per_example.autograd_graph import Graph, Meeting, Shared
from lightning_sketch.per_example.factors import Dense, Factor, Unsupported
from lightning_sketch.per_example.rules.linear import looked_up
from lightning_sketch.per_example.rules.registry import Rule, rule_of


@runtime_checkable
class Accumulator(Protocol):
    """What factors of per-example gradients are added to."""

    def add(self, factor: Factor) -> None:
        """Add a factor of the gradients of the examples."""


class ExampleHooks:
    """Hooks that give factors of per-example gradients to an accumulator, in passes that are made anyway.

    Args:
        module: whose layers get hooks.
        parameters: by name; only these, and of them the trainable ones, are covered. If empty, no hook is installed.

    Raises:
        ValueError: if the module, or a part of it, is compiled: a compiled forward may skip hooks without a word.

    >>> class Squares:
    ...     total = 0
    ...
    ...     def add(self, factor):
    ...         self.total = self.total + (factor.values**2).sum(1)
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
        self._pass: HookPass | None = None
        self._shared: list[tuple[Any, Shared]] = []
        self._for_all: set[tuple[str, int]] = set()
        self.supported: set[str] = set()
        """Names that got a factor in the last pass."""
        self.reasons: dict[str, str] = {}
        """By name, in words, why a parameter, or one of its uses, was unsupported in the last pass."""

    def attach(self, accumulator: Accumulator, examples: int) -> None:
        """Put hooks on the layers, for the forward passes of one batch of so many examples; detaches first."""
        self.detach()
        parts = self._parts()
        self._pass = HookPass(self._module, self._parameters, accumulator, examples)
        self.supported, self.reasons = self._pass.supported, self._pass.reasons
        for path, part in parts:
            rule = rule_of(part)
            if rule is not None and rule.watch is not None:
                rule.watch(part, self._pass)
            elif rule is not None and part._parameters:
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
            self._hook_meetings(Graph(loss), [*shared, *self._shared])
        self._pass.armed = True

    def detach(self) -> None:
        """Take all hooks away and forget the graph; does nothing a second time."""
        if self._pass is not None:
            self._pass.close()
        self._pass = None
        self._shared.clear()

    @contextmanager
    def recording(self, accumulator: Accumulator, examples: int) -> Iterator[None]:
        """`attach`, and `detach` at the end, after an error too."""
        self.attach(accumulator, examples)
        try:
            yield
        finally:
            self.detach()

    def _parts(self) -> list[tuple[str, nn.Module]]:
        """Return the module's parts, none of them compiled; none at all if nothing is asked for."""
        if not self._parameters:
            return []
        _refuse_compiled(self._module)
        return list(self._module.named_modules())

    def _after_layer(
        self, rule: Rule, path: str, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        one = self._pass
        own = {n: p for n, p in part._parameters.items() if rule.names is None or n in rule.names}
        wanted = one.wanted(own.values()) if one.acts(part) else []
        if not wanted or not (isinstance(output, Tensor) and output.requires_grad):
            return
        one.taken |= {id(p) for p in wanted}
        input = args[0] if args else next(iter(kwargs.values()))
        if self._has_examples(path, part, input, output):
            needed = any(p.requires_grad for n, p in own.items() if p is not None and n != "bias")
            input = input.detach() if needed else input.to("meta")
            one.on_gradient(output, wanted, partial(rule.factors, part), input)
        elif isinstance(part, nn.Embedding):
            factors = partial(_looked_up_by_all, part, input.detach())
            self._shared.append((output.grad_fn, Shared(one.name(part.weight), output.shape, factors)))
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

    def _hook_meetings(self, graph: Graph, shared: Iterable[tuple[Any, Shared]]) -> None:
        """Put hooks where shared tensors, parameters or what a node made, meet the examples in the graph of a loss."""
        one = self._pass
        for origin, what in shared:
            parameter = one.parameters[what.name]
            node = graph.leaf(origin) if isinstance(origin, nn.Parameter) else origin
            if node is None:
                if graph.hides:
                    one.hidden.append(parameter)
                continue
            meetings, otherwise = graph.meetings(node, what)
            owner = self._owner(what.name)
            if otherwise:
                one.explain([parameter], owner + " and ".join(dict.fromkeys(otherwise)))
            for meeting in meetings:
                if (meeting.node, meeting.place) not in one.met:
                    one.met.add((meeting.node, meeting.place))
                    one.handles.append(
                        meeting.node.register_prehook(partial(one.at_meeting, parameter, meeting, owner))
                    )

    def _owner(self, name: str) -> str:
        """How a reason begins: whose parameter it is."""
        for path, part in self._module.named_modules():
            if any(own is self._parameters[name] for own in part._parameters.values()):
                kind = f"{type(part).__name__} {path}".strip()
                missing = "has no rule (lightning_sketch.per_example.register_layer adds one)"
                return f"{kind} {'is known' if rule_of(part) is not None else missing}, but "
        return ""


class HookPass:
    """One forward and backward pass of a batch, on its way from hooks to an accumulator.

    Args:
        module: whose passes they are; passes of a measurement on it, meanwhile, do not count.
        parameters: by name, those whose factors are wanted.
        accumulator: where factors go.
        examples: how many there are in the batch.

    Attributes:
        taken: parameters that a layer's own hook covers, by id; no other way may count them again.
        met: operations in the graph, with the place of an argument, that have a hook for it.
        hidden: parameters that the graph does not show, but may hide.
        supported: names that got a factor.
        reasons: by name, why a parameter, or one of its uses, is unsupported.
        handles: all that `close` takes away.
        armed: whether the backward pass that counts has begun.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], accumulator: Accumulator, examples: int
    ):
        self.parameters, self.accumulator, self.examples = parameters, accumulator, examples
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._depths = {id(part): measurement_depth(part) for part in module.modules()}
        self.taken: set[int] = set()
        self.supported: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.hidden: list[nn.Parameter] = []
        self.met: set[tuple[Any, int]] = set()
        self.handles: list[Any] = []
        self.armed = False

    def close(self) -> None:
        """Take all hooks away, and with them what they keep."""
        if self.armed:
            missed = [parameter for parameter in self.hidden if self.name(parameter) not in self.supported]
            self.explain(missed, "if it is used, then inside reentrant checkpointing, where its use is not seen")
        self.armed = False
        for handle in self.handles:
            handle.remove()

    def acts(self, part: nn.Module) -> bool:
        """Whether a forward pass of this part now is one of the batch, not a measurement's."""
        return measurement_depth(part) == self._depths.get(id(part), 0)

    def wanted(self, parameters: Iterable[nn.Parameter | None]) -> list[nn.Parameter]:
        """Those that are trained and asked for."""
        return [p for p in parameters if p is not None and p.requires_grad and id(p) in self._names]

    def name(self, parameter: nn.Parameter) -> str:
        """Return the name of one that is wanted."""
        return self._names[id(parameter)]

    def explain(self, parameters: Iterable[nn.Parameter], reason: str) -> None:
        """Say why these are unsupported; what was said first stays."""
        for parameter in parameters:
            self.reasons.setdefault(self.name(parameter), reason)

    def on_gradient(
        self, output: Tensor, wanted: list[nn.Parameter], make: Callable[[Any, Tensor], list[Factor]], input: Any
    ) -> None:
        """Once the gradient of `output` is known, make factors from it and the input, which is then let go."""
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

    def at_meeting(
        self, parameter: nn.Parameter, meeting: Meeting, owner: str, gradients: tuple[Tensor | None, ...]
    ) -> None:
        """Make factors where a shared tensor meets the examples; `owner` is how the reason begins if they can't be."""
        (gradient,) = gradients
        if gradient is not None:
            self.give([parameter], lambda: meeting.factors(gradient, self.examples), owner)

    def give(self, wanted: list[nn.Parameter], make: Callable[[], list[Factor]], owner: str = "") -> None:
        """Make factors, in their own precision, and give the wanted ones to the accumulator.

        `owner` is how the reason begins if they cannot be made.
        """
        with torch.no_grad(), torch.autocast(wanted[0].device.type, enabled=False):
            try:
                factors = make()
            except Unsupported as error:
                self.explain(wanted, f"{owner}{error}")
                return
            for factor in factors:
                if self.wanted([factor.parameter]):
                    self.supported.add(self.name(factor.parameter))
                    self.accumulator.add(factor)


def _as_it_is(parameter: nn.Parameter, values: Tensor) -> list[Factor]:
    return [Dense(parameter, values)]


def _looked_up_by_all(part: nn.Embedding, index: Tensor, values: Tensor) -> list[Factor]:
    return [looked_up(part, index.reshape(1, -1).expand(len(values), -1), values)]


def _refuse_compiled(module: nn.Module) -> None:
    for path, part in module.named_modules():
        of_lightning = any(base.__name__ == "LightningModule" for base in type(part).__mro__)
        by_trainer = of_lightning and required(part, "_compiler_ctx")  # which takes the wrapper off, compiles the steps
        wrapped = type(part).__name__ == "OptimizedModule"
        if required(part, "_compiled_call_impl") is not None or wrapped or by_trainer:
            kind, where = type(part).__name__, f" ({path})" if path else ""
            raise ValueError(
                f"{kind}{where} is compiled, and a compiled forward may skip hooks without a word; train without "
                "torch.compile, or take per-example gradients by another engine or fallback ('loop' or 'vmap')."
            )
