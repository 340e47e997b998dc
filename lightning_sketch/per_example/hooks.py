"""Gradients of each example from the ordinary backward pass of a batch.

A layer's input, kept in its forward pass, and the gradient of its output, seen in the backward pass, give the share
of each example in the gradient of the layer's parameters. Neither is changed: training is the same bit for bit.

Exact for layers that treat the examples, along the first axis, independently. Layers have their rules in `rules/`;
parameters that are used without a layer are found in the graph of the loss by `autograd_graph`. The inputs of layers
are kept until their gradients are known, as autograd does anyway.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_sketch._private import required
from lightning_sketch.autodiff.preserve_state import measurement_depth
from lightning_sketch.per_example.autograd_graph import BroadcastUse, Graph, SharedTensor
from lightning_sketch.per_example.factors import Dense, Factor, LowRank, Unsupported, separate
from lightning_sketch.per_example.rules.linear import looked_up
from lightning_sketch.per_example.rules.registry import LayerFn, Rule, rule_of


@runtime_checkable
class Accumulator(Protocol):
    """An object that factors of per-example gradients are added to, one for each parameter.

    If it has an attribute `joins_biases` that is true, the factor of a matrix comes with the layer's bias.
    """

    def add(self, factor: Factor) -> None:
        """Add a factor of the gradients of the examples."""


class ExampleHooks:
    """Hooks that give factors of per-example gradients to an accumulator, during passes that training makes anyway.

    Args:
        module: The module whose layers get hooks.
        parameters: The parameters to cover, by name; of these, only the trainable ones are covered. If empty, no hook
            is installed.

    Attributes:
        supported: The names of the parameters that got a factor in the last pass.
        reasons: By name, why a parameter, or one of its uses, was unsupported in the last pass.

    Raises:
        ValueError: if the module or a submodule is compiled: a compiled forward may skip hooks without a word.

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
        self._pass: _HookPass | None = None
        self._shared: list[tuple[Any, SharedTensor]] = []
        self._for_all: set[tuple[str, int]] = set()
        self.supported: set[str] = set()
        self.reasons: dict[str, str] = {}

    def attach(self, accumulator: Accumulator, examples: int) -> None:
        """Install hooks for the forward passes of one batch, after removing those of the batch before.

        Args:
            accumulator: Where the factors go.
            examples: The number of examples in the batch.

        Raises:
            ValueError: if the module or a submodule was compiled in the meantime.
        """
        self.detach()
        parts = self._parts()
        current = self._pass = _HookPass(self._module, self._parameters, accumulator, examples)
        self.supported, self.reasons = current.supported, current.reasons
        for path, part in parts:
            rule = rule_of(part)
            if rule is None:
                continue
            if rule.watch is not None:
                rule.watch(part, current)
            elif part._parameters:
                hook = partial(self._after_layer, current, rule, path)
                current.handles.append(part.register_forward_hook(hook, with_kwargs=True))

    def before_backward(self, loss: Tensor) -> None:
        """Find where shared tensors are broadcast, and record gradients from now on, until `detach`.

        Args:
            loss: The tensor whose backward pass follows.

        Raises:
            RuntimeError: if no pass was started by `attach`.
        """
        current = self._pass
        if current is None:
            raise RuntimeError("before_backward was called outside of a pass; call attach before the forward pass.")
        trained = current.wanted(self._parameters.values())
        bare = [p for p in trained if id(p) not in current.taken]
        if loss.grad_fn is not None and (bare or self._shared):
            shared = [(p, SharedTensor(current.name(p), p.shape, partial(_dense, p))) for p in bare]
            self._hook_uses(current, Graph(loss), [*shared, *self._shared])
        current.armed = True

    def run_backward(self, loss: Tensor) -> list[str]:
        """Run the backward pass of a loss that nothing else needs, without the gradients of what layers' hooks cover.

        A use of these past their layers that no hook covers is not noticed: compare with real gradients before.

        Args:
            loss: The loss, whose graph is freed.

        Returns:
            The names of the parameters that have a gradient, in their order.

        Raises:
            RuntimeError: if no pass was started by `attach`.
        """
        self.before_backward(loss)
        current = cast(_HookPass, self._pass)
        leads = _leads(loss, {edge.node for edge, _ in current.edges})
        unused = {name for edge, names in current.edges for name in names if edge.node not in leads}
        shared = {tensor.name for _, tensor in self._shared}  # hooks of a use for all examples lie beyond the layers
        covered = {name for _, names in current.edges for name in names} - unused - shared
        bare = {n: p for n, p in self._parameters.items() if p.requires_grad and n not in covered}
        ends = [edge for edge, _ in current.edges if leads.get(edge.node) is False]  # a pass to them meets all others
        inputs: list[Any] = [*ends, *bare.values()]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)[len(ends) :]
        used = current.reached | {name for name, gradient in zip(bare, found, strict=True) if gradient is not None}
        return [name for name in self._parameters if name in used]

    def detach(self) -> None:
        """Remove all hooks and forget the graph; a second call does nothing."""
        if self._pass is not None:
            self._pass.close()
        self._pass = None
        self._shared.clear()

    @contextmanager
    def recording(self, accumulator: Accumulator, examples: int) -> Iterator[None]:
        """Call `attach`, and at the end `detach`, after an error too."""
        self.attach(accumulator, examples)
        try:
            yield
        finally:
            self.detach()

    def _parts(self) -> list[tuple[str, nn.Module]]:
        """Return the submodules, none of them compiled; an empty list if no parameter is asked for."""
        if not self._parameters:
            return []
        _refuse_compiled(self._module)
        return list(self._module.named_modules())

    def _after_layer(
        self,
        current: "_HookPass",
        rule: Rule,
        path: str,
        part: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Ask for the gradient of a layer's output; a forward hook."""
        own = {n: p for n, p in part._parameters.items() if rule.names is None or n in rule.names}
        wanted = current.wanted(own.values()) if current.acts(part) else []
        if not wanted or not (isinstance(output, Tensor) and output.requires_grad):
            return
        current.taken |= {id(p) for p in wanted}
        input = args[0] if args else next(iter(kwargs.values()))
        if self._has_examples(path, part, input, output, current.examples):
            needed = any(p.requires_grad for n, p in own.items() if p is not None and n != "bias")
            input = input.detach() if needed else input.to("meta")
            current.on_gradient(output, wanted, partial(cast(LayerFn[Any], rule.factors), part), input)
        elif isinstance(part, nn.Embedding):
            factors = partial(_looked_up_by_all, part, input.detach())
            name = current.name(cast(nn.Parameter, part.weight))
            self._shared.append((output.grad_fn, SharedTensor(name, output.shape, factors)))
        else:
            current.explain(
                wanted,
                f"{type(part).__name__} {path} was called with shape {tuple(input.shape)} and returned "
                f"{tuple(output.shape)}, where the first axis is not that of the {current.examples} examples",
            )

    def _has_examples(self, path: str, part: nn.Module, input: Tensor, output: Tensor, examples: int) -> bool:
        """Return whether the first axis of a layer's input and output is that of the examples.

        It is not for an embedding that once looked up positions for all examples: a later batch may have as many
        examples as there are positions.
        """
        fits = input.shape[:1] == output.shape[:1] == (examples,)
        if not fits and isinstance(part, nn.Embedding):
            self._for_all.add((path, input.ndim))
        return fits and (path, input.ndim) not in self._for_all

    def _hook_uses(self, current: "_HookPass", graph: Graph, shared: Iterable[tuple[Any, SharedTensor]]) -> None:
        """Put a hook on every operation where a tensor without an axis of examples is broadcast against examples.

        Such a tensor is a parameter, or a result computed from one.
        """
        for origin, tensor in shared:
            parameter = current.parameters[tensor.name]
            node = graph.leaf(origin) if isinstance(origin, nn.Parameter) else origin
            if node is None:
                if graph.hides:
                    current.hidden.append(parameter)
                continue
            uses, unsupported = graph.uses(node, tensor)
            prefix = self._reason_prefix(tensor.name)
            if unsupported:
                current.explain([parameter], prefix + " and ".join(dict.fromkeys(unsupported)))
            for use in uses:
                if (use.node, use.place) not in current.hooked:
                    current.hooked.add((use.node, use.place))
                    hook = partial(current.on_broadcast, parameter, use, prefix)
                    current.handles.append(use.node.register_prehook(hook))

    def _reason_prefix(self, name: str) -> str:
        """Return how a reason begins: with the layer that the parameter belongs to."""
        for path, part in self._module.named_modules():
            if any(own is self._parameters[name] for own in part._parameters.values()):
                kind = f"{type(part).__name__} {path}".strip()
                known, missing = "has a rule", "has no rule (lightning_sketch.per_example.register_layer adds one)"
                return f"{kind} {missing if rule_of(part) is None else known}, but "
        return ""


class _HookPass:
    """The state of the hooks during one forward and backward pass of a batch.

    Args:
        module: The module that the passes are of; passes of a measurement of it, in between, are not recorded.
        parameters: The parameters whose factors are wanted, by name.
        accumulator: Where the factors go.
        examples: The number of examples in the batch.

    Attributes:
        taken: The ids of parameters that the hooks of a layer cover, so that no other way counts them again.
        hooked: The operations of the graph, each with the place of an argument, that have a hook for it.
        edges: Where in the graph gradients of layers' outputs are seen, with the names of the parameters they cover.
        reached: The names of those of them that the backward pass has come to.
        hidden: The parameters that the graph does not show, but may hide.
        supported: The names of the parameters that got a factor.
        reasons: By name, why a parameter, or one of its uses, is unsupported.
        handles: What `close` removes.
        armed: Whether the backward pass to record has begun.
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
        self.edges: list[tuple[GradientEdge, set[str]]] = []
        self.reached: set[str] = set()
        self.hidden: list[nn.Parameter] = []
        self.hooked: set[tuple[Any, int]] = set()
        self.handles: list[Any] = []
        self.armed = False

    def close(self) -> None:
        """Remove all hooks, and with them what they keep."""
        if self.armed:
            missed = [parameter for parameter in self.hidden if self.name(parameter) not in self.supported]
            self.explain(missed, "if it is used, then inside reentrant checkpointing, where its use is not seen")
        self.armed = False
        for handle in self.handles:
            handle.remove()

    def acts(self, part: nn.Module) -> bool:
        """Return whether a forward pass of this submodule, now, belongs to the batch and not to a measurement."""
        return measurement_depth(part) == self._depths.get(id(part), 0)

    def wanted(self, parameters: Iterable[Any]) -> list[nn.Parameter]:
        """Return those of the parameters that are trainable and asked for, among tensors that a call puts in place."""
        return [p for p in parameters if p is not None and p.requires_grad and id(p) in self._names]

    def name(self, parameter: nn.Parameter) -> str:
        """Return the name of a wanted parameter."""
        return self._names[id(parameter)]

    def explain(self, parameters: Iterable[nn.Parameter], reason: str) -> None:
        """Record why these parameters are unsupported; the first reason of each stays."""
        for parameter in parameters:
            self.reasons.setdefault(self.name(parameter), reason)

    def on_gradient(
        self, output: Tensor, wanted: list[nn.Parameter], make: Callable[[Any, Tensor], Sequence[Factor]], input: Any
    ) -> None:
        """Make factors from the gradient of `output`, once it is known, and the input, which is then released."""
        kept, shape, names = [input], output.shape, {self.name(parameter) for parameter in wanted}
        version = input._version if isinstance(input, Tensor) else None

        def act(gradient: Tensor | None) -> None:
            if not self.armed or gradient is None:
                return
            self.reached |= names
            if not kept:
                self.explain(wanted, "more than one backward pass went through its layer")
                return
            input = kept.pop()
            if version is not None and input._version != version:
                self.explain(wanted, "the input of its layer was changed in place after the layer had used it")
            else:
                self._give(wanted, lambda: make(input, gradient.reshape(shape)))

        # An operation in place on a view makes the view forget its own history, and with it the hook.
        base = output._base
        if base is not None and base.requires_grad and base.numel() == output.numel():
            output = base if base.is_contiguous() and output.is_contiguous() else output
        self.handles.append(output.register_hook(act))
        self.edges.append((get_gradient_edge(output), names))

    def on_broadcast(
        self, parameter: nn.Parameter, use: BroadcastUse, prefix: str, gradients: tuple[Tensor | None, ...]
    ) -> None:
        """Make factors where a shared tensor is broadcast; `prefix` begins the reason if they are unsupported."""
        (gradient,) = gradients
        if gradient is not None:
            self._give([parameter], lambda: use.factors(gradient, self.examples), prefix)

    def _give(self, wanted: list[nn.Parameter], make: Callable[[], Sequence[Factor]], prefix: str = "") -> None:
        """Make factors without autocast, and add the wanted ones to the accumulator."""
        with torch.no_grad(), torch.autocast(wanted[0].device.type, enabled=False):
            try:
                factors = make()
            except Unsupported as error:
                self.explain(wanted, f"{prefix}{error}")
                return
            joins = getattr(self.accumulator, "joins_biases", False)
            for factor in factors:
                both = [factor.parameter, factor.bias.parameter] if isinstance(factor, LowRank) and factor.bias else []
                joint = joins and both and len(self.wanted(both)) == 2
                for own in [factor] if joint else separate(factor):
                    if self.wanted([own.parameter]):
                        self.supported |= {self.name(p) for p in (both if joint else [own.parameter])}
                        self.accumulator.add(own)


def _leads(loss: Tensor, nodes: set[Any]) -> dict[Any, bool]:
    """Return the nodes of the graph of a loss, each with whether it leads to another one that is among `nodes`."""
    leads: dict[Any, bool] = {}
    waiting: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    while waiting:
        following = [node for node, _ in waiting[-1].next_functions if node is not None]
        unknown = [node for node in following if node not in leads]
        if unknown:
            waiting += unknown
        else:
            leads[waiting.pop()] = any(node in nodes or leads[node] for node in following)
    return leads


def _dense(parameter: nn.Parameter, values: Tensor) -> list[Factor]:
    return [Dense(parameter, values)]


def _looked_up_by_all(part: nn.Embedding, index: Tensor, values: Tensor) -> list[Factor]:
    return [looked_up(part, index.reshape(1, -1).expand(len(values), -1), values)]


def _refuse_compiled(module: nn.Module) -> None:
    for path, part in module.named_modules():
        of_lightning = any(base.__name__ == "LightningModule" for base in type(part).__mro__)
        by_trainer = of_lightning and required(part, "_compiler_ctx")  # the Trainer unwraps it and compiles the steps
        wrapped = type(part).__name__ == "OptimizedModule"
        if required(part, "_compiled_call_impl") is not None or wrapped or by_trainer:
            kind, where = type(part).__name__, f" ({path})" if path else ""
            raise ValueError(
                f"{kind}{where} is compiled, and a compiled forward may skip hooks without a word; train without "
                "torch.compile, or take per-example gradients by another engine or fallback ('loop' or 'vmap')."
            )
