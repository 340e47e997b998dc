"""Which function splits the gradients of which layer.

A rule is for one `forward`: it applies to its class and to those that inherit this method. It does not where weights
are made from others before each call (parametrizations, weight norm), nor where `forward` is replaced on the instance.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from lightning_sketch.gradients import convolution, matrices, norms
from lightning_sketch.gradients.pieces import Piece

LayerFn = Callable[[nn.Module, Tensor, Tensor], list[Piece]]
"""(module, input, gradient of the output) -> pieces of the gradients of its own parameters.

input       what the module was called with, its first argument; on the meta device, without numbers, if all of its
            parameters but the bias are frozen
gradient    of the loss with respect to what it returned, a tensor; both have the examples along their first axis
"""


@dataclass(frozen=True)
class Rule:
    """A function and the parameters of the module that it serves; None: all of the module's own."""

    pieces: LayerFn
    names: tuple[str, ...] | None = ("weight", "bias")


_RULES: dict[type | str, Rule] = {
    nn.Linear: Rule(matrices.linear),
    "transformers.pytorch_utils.Conv1D": Rule(matrices.transposed_linear),
    "transformers.modeling_utils.Conv1D": Rule(matrices.transposed_linear),
    nn.Embedding: Rule(matrices.embedding),
    nn.Conv1d: Rule(convolution.convolution),
    nn.Conv2d: Rule(convolution.convolution),
    nn.Conv3d: Rule(convolution.convolution),
    nn.LayerNorm: Rule(norms.layer_norm),
    nn.RMSNorm: Rule(norms.rms_norm),
    nn.GroupNorm: Rule(norms.group_norm),
    _BatchNorm: Rule(norms.batch_norm),
}


def register_layer(kind: type[nn.Module]) -> Callable[[LayerFn], LayerFn]:
    """Decorate the function that splits the gradients of this layer, so that its parameters are served.

    Args:
        kind: the class whose `forward` the function knows. Subclasses with the same `forward` are served too.

    The function raises `NotServed(reason)` where it cannot.

    >>> from lightning_sketch.gradients.pieces import Full
    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(3))
    ...
    ...     def forward(self, x):
    ...         return self.factor * x
    >>> @register_layer(Scale)
    ... def scale(module, input, gradient):
    ...     return [Full(module.factor, input * gradient)]
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register_layer takes a class of modules, got {kind!r}; use @register_layer(MyLayer).")

    def register(function: LayerFn) -> LayerFn:
        _RULES[kind] = Rule(function, None)
        return function

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for the `forward` that this module runs, if there is one."""
    if "forward" in vars(module) or is_parametrized(module):
        return None
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    rule = _RULES.get(type(module)) or _RULES.get(owner) or _RULES.get(f"{owner.__module__}.{owner.__qualname__}")
    made = any(name in vars(module) for name in (rule and rule.names) or ())  # as older ways of weight norm leave it
    return None if made else rule
