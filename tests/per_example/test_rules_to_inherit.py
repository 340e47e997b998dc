"""Built-in layers, and a layer of a user, pass the tests that a rule may inherit."""

import pytest
import torch
from torch import nn

from lightning_sketch.per_example import Dense, register_layer
from lightning_sketch.per_example.rules import registry
from lightning_sketch.testing import LayerRuleTests

LAYERS = {
    "Linear": lambda: (nn.Linear(4, 3), torch.randn(6, 4)),
    "LinearOfTokens": lambda: (nn.Linear(4, 3), torch.randn(6, 5, 4)),
    "Embedding": lambda: (nn.Embedding(7, 3), torch.randint(0, 7, (6, 5))),
    "Conv2d": lambda: (nn.Conv2d(2, 4, 3, padding=1, groups=2), torch.randn(6, 2, 5, 5)),
    "LayerNorm": lambda: (nn.LayerNorm(4), torch.randn(6, 5, 4)),
    "GroupNorm": lambda: (nn.GroupNorm(2, 4), torch.randn(6, 4, 3)),
}
for _name, _make in LAYERS.items():
    globals()[f"Test{_name}"] = type(f"Test{_name}", (LayerRuleTests,), {"make": staticmethod(_make)})


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.factor.exp() * x + self.shift


class TestScale(LayerRuleTests):
    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        monkeypatch.setattr(registry, "RULES", dict(registry.RULES))

        @register_layer(Scale)
        def scale(module, input, gradient):
            return [Dense(module.factor, module.factor.exp() * input * gradient), Dense(module.shift, gradient)]

    def make(self):
        return Scale(), torch.randn(6, 3)


def test_a_wrong_rule_fails(monkeypatch):
    """One that forgets a factor, and one that forgets a parameter."""
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))
    suite = type("Suite", (LayerRuleTests,), {"make": lambda self: (Scale(), torch.randn(6, 3))})()
    for factors in (
        lambda module, x, g: [Dense(module.factor, x * g), Dense(module.shift, g)],
        lambda module, x, g: [Dense(module.factor, module.factor.exp() * x * g)],
    ):
        register_layer(Scale)(factors)
        with pytest.raises(AssertionError):
            suite.test_rows_are_the_gradients_of_each_example_alone()
