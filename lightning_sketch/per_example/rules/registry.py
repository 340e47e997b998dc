"""The registry of layers whose gradients can be split into examples.

A rule is for one `forward`: it applies to its class and to those that inherit this method. It does not where weights
are made from others before each call (parametrizations, weight norm), nor where `forward` is replaced on the instance.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_sketch.per_example.factors import Factor

LayerFn = Callable[[nn.Module, Tensor, Tensor], list[Factor]]
"""(module, input, gradient of the output) -> factors of the gradients of its own parameters.

input       what the module was called with, its first argument; on the meta device, without numbers, if all of its
            parameters but the bias are frozen
gradient    of the loss with respect to what it returned, a tensor; both have the examples along their first axis
"""


@runtime_checkable
class Recorder(Protocol):
    """What a rule that watches the inside of a layer may ask of the pass it is part of; `HookPass` is one."""

    examples: int
    taken: set[int]
    handles: list[Any]

    def acts(self, part: nn.Module) -> bool:
        """Whether a forward pass of this part now is one of the batch."""

    def wanted(self, parameters: Iterable[nn.Parameter | None]) -> list[nn.Parameter]:
        """Those that are trained and asked for."""

    def explain(self, parameters: Iterable[nn.Parameter], reason: str) -> None:
        """Say why these are unsupported."""

    def on_gradient(
        self, output: Tensor, wanted: list[nn.Parameter], make: Callable[[Any, Tensor], list[Factor]], input: Any
    ) -> None:
        """Make factors once the gradient of `output` is known."""


@dataclass(frozen=True)
class Rule:
    """How the gradients of a layer are split.

    Attributes:
        factors: from the layer's input and the gradient of its output; or None, with
        watch: which puts hooks of its own on a layer that multiplies by its matrices inside.
        names: the layer's parameters that `factors` covers; None: all of its own.
    """

    factors: LayerFn | None = None
    watch: Callable[[nn.Module, Recorder], None] | None = None
    names: tuple[str, ...] | None = ("weight", "bias")


RULES: dict[type | str, Rule] = {}
"""By class, or by the full name of a class of a package that need not be installed."""


def register_layer(kind: type[nn.Module]) -> Callable[[LayerFn], LayerFn]:
    """Decorate the function that splits the gradients of a layer into examples, so that its parameters are supported.

    It replaces a rule that is there, of a built-in layer as well, for all that is written from then on: rows while
    training, rows at a checkpoint, queries, curvature.

    Args:
        kind: the class whose `forward` the function knows. Subclasses with the same `forward` are supported too.

    Returns:
        A decorator for a function (module, input, gradient of the output) -> list of factors `Dense`, `LowRank`,
        `SparseRows`, which raises `Unsupported(reason)` where it cannot.

    Raises:
        TypeError: if `kind` is no class of modules.

    >>> from lightning_sketch.per_example import Dense
    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(3))
    ...
    ...     def forward(self, x):
    ...         return self.factor * x
    >>> @register_layer(Scale)
    ... def scale(module, input, gradient):
    ...     return [Dense(module.factor, input * gradient)]
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register_layer takes a class of modules, got {kind!r}; use @register_layer(MyLayer).")

    def register(function: LayerFn) -> LayerFn:
        RULES[kind] = Rule(function, names=None)
        return function

    return register


def built_in(*kinds: type | str) -> Callable[[LayerFn], LayerFn]:
    """Decorate the function that splits the gradients of the parameters `weight` and `bias` of these layers."""

    def register(function: LayerFn) -> LayerFn:
        RULES.update(dict.fromkeys(kinds, Rule(function)))
        return function

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule for the `forward` that this module runs, if there is one."""
    if "forward" in vars(module) or is_parametrized(module):
        return None
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    rule = RULES.get(type(module)) or RULES.get(owner) or RULES.get(f"{owner.__module__}.{owner.__qualname__}")
    made = any(name in vars(module) for name in (rule and rule.names) or ())  # as older ways of weight norm leave it
    return None if made else rule
