"""The registry of layers whose gradients can be split into examples.

A rule is for one `forward`: it applies to its class and to subclasses that inherit this method. It does not apply
where weights are computed from others before each call (parametrizations, weight norm), nor where `forward` is
replaced on the instance.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_sketch.per_example.factors import Factor

_Layer = TypeVar("_Layer", bound=nn.Module)

# (module, input, gradient of the output) -> factors of the gradients of the module's own parameters.
#
# input       the first argument of the module's call; on the meta device, without numbers, if all of its parameters
#             but the bias are frozen
# gradient    of the loss with respect to the tensor that the module returned; both have the examples along their
#             first axis
LayerFn = Callable[[_Layer, Tensor, Tensor], Sequence[Factor]]

_AnyLayerFn = TypeVar("_AnyLayerFn", bound=Callable[[Any, Tensor, Tensor], Sequence[Factor]])


@runtime_checkable
class Recorder(Protocol):
    """The state of a recorded pass that a rule with hooks of its own may use.

    Attributes:
        examples: The number of examples in the batch.
        taken: The ids of parameters that the hooks of a layer cover.
        handles: What is removed when the pass ends.
    """

    examples: int
    taken: set[int]
    handles: list[Any]

    def acts(self, part: nn.Module) -> bool:
        """Return whether a forward pass of this submodule, now, belongs to the batch."""

    def wanted(self, parameters: Iterable[Any]) -> list[nn.Parameter]:
        """Return those of the parameters that are trainable and asked for."""

    def explain(self, parameters: Iterable[nn.Parameter], reason: str) -> None:
        """Record why these parameters are unsupported."""

    def on_gradient(
        self, output: Tensor, wanted: list[nn.Parameter], make: Callable[[Any, Tensor], Sequence[Factor]], input: Any
    ) -> None:
        """Make factors once the gradient of `output` is known."""


@dataclass(frozen=True)
class Rule:
    """How the gradients of a layer are split into examples.

    Attributes:
        factors: (module, input, gradient of the output) -> factors; None for a rule that has `watch`.
        watch: (module, recorder) -> None, which installs hooks of its own, for a layer that multiplies by its
            matrices inside.
        names: The names of the layer's parameters that `factors` covers; None for all of its own.
    """

    factors: LayerFn[Any] | None = None
    watch: Callable[[Any, Recorder], None] | None = None
    names: tuple[str, ...] | None = ("weight", "bias")


# The rules by class, or by the full name of a class from a package that need not be installed.
RULES: dict[type | str, Rule] = {}


def register_layer(kind: type[_Layer]) -> Callable[[LayerFn[_Layer]], LayerFn[_Layer]]:
    """Decorate a function that splits the gradients of a layer into examples, so that the layer is supported.

    It replaces an existing rule, of a built-in layer too, for all that is computed from then on: rows while training,
    rows at a checkpoint, queries, curvature.

    Args:
        kind: The class whose `forward` the function knows. Subclasses with the same `forward` are supported too.

    Returns:
        A decorator for a function (module, input, gradient of the output) -> list of factors `Dense`, `LowRank` or
        `SparseRows`. The function raises `Unsupported(reason)` where it cannot split a gradient.

    Raises:
        TypeError: if `kind` is not a subclass of `nn.Module`.

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

    def register(function: LayerFn[_Layer]) -> LayerFn[_Layer]:
        RULES[kind] = Rule(function, names=None)
        return function

    return register


def built_in(*kinds: type | str) -> Callable[[_AnyLayerFn], _AnyLayerFn]:
    """Decorate a function that splits the gradients of the parameters `weight` and `bias` of these layers."""

    def register(function: _AnyLayerFn) -> _AnyLayerFn:
        RULES.update(dict.fromkeys(kinds, Rule(function)))
        return function

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule for the `forward` that this module runs, or None if there is none."""
    if "forward" in vars(module) or is_parametrized(module):
        return None
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    rule = RULES.get(type(module)) or RULES.get(owner) or RULES.get(f"{owner.__module__}.{owner.__qualname__}")
    if rule is not None and any(name in vars(module) for name in rule.names or ()):
        return None  # the weight is no parameter but an attribute, as the older weight norm leaves it
    return rule
