"""A test class to inherit for a rule that computes the per-example gradients of a layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_sketch.per_example.factors import Dense, Factor, LowRank
from lightning_sketch.per_example.hooks import ExampleHooks


class DenseRows:
    """A collector of gradient factors that computes from them the gradient of each example.

    Args:
        parameters: The parameters by name.
        examples: The number of examples.

    Attributes:
        rows: Gradients by name of the parameter, (examples, numbers of the parameter), float64.
        factors: All factors that were added.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], examples: int):
        self.names = {id(p): name for name, p in parameters.items()}
        self.rows = {n: torch.zeros(examples, p.numel(), dtype=torch.float64) for n, p in parameters.items()}
        self.factors: list[Factor] = []

    def add(self, factor: Factor) -> None:
        """Add the gradients that a factor represents."""
        self.factors.append(factor)
        rows = self.rows[self.names[id(factor.parameter)]]
        if isinstance(factor, Dense):
            rows[:, factor.start : factor.start + factor.values.shape[1]] += factor.values
        elif isinstance(factor, LowRank):
            values = torch.einsum("bti,btj->bij", factor.left, factor.right).flatten(1)
            rows[:, factor.start : factor.start + values.shape[1]] += values
        else:
            table = rows.view(len(rows), *factor.parameter.shape)
            for row, index, values in zip(table, factor.index, factor.values, strict=True):
                row.index_add_(0, index, values.double())


class LayerRuleTests:
    """Pytest tests that a rule registered by `register_layer` has to pass.

    Example::

        class TestMyLayer(LayerRuleTests):
            def make(self):
                return MyLayer(4), torch.randn(6, 5, 4)
    """

    def make(self) -> tuple[nn.Module, Tensor]:
        """Return a layer and an input with at least two examples along its first axis.

        Raises:
            NotImplementedError: If a subclass does not define it.
        """
        raise NotImplementedError(f"define make() in {type(self).__name__}: return a layer and an input.")

    def test_rows_are_the_gradients_of_each_example_alone(self):
        """Test against autograd, one example at a time, in float64."""
        module, x, parameters = self._problem()
        found, hooks = self._by_hooks(module, x, parameters)
        assert hooks.supported == set(parameters), hooks.reasons
        for i in range(len(x)):
            gradients = torch.autograd.grad(self._losses(module(x[i : i + 1])).sum(), list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                torch.testing.assert_close(found[name][i], gradient.flatten(), rtol=1e-10, atol=1e-12)

    def test_frozen_parameters_have_no_rows_and_the_others_are_right(self):
        """Test with each parameter frozen in turn."""
        module, x, parameters = self._problem()
        whole, _ = self._by_hooks(module, x, parameters)
        for frozen in parameters if len(parameters) > 1 else ():
            parameters[frozen].requires_grad_(False)
            found, hooks = self._by_hooks(module, x, {n: p for n, p in parameters.items() if n != frozen})
            parameters[frozen].requires_grad_(True)
            assert hooks.supported == set(parameters) - {frozen}, hooks.reasons
            for name, rows in found.items():
                torch.testing.assert_close(rows, whole[name])

    def test_the_gradient_of_the_batch_is_untouched(self):
        """Test that gradients are the same bits with hooks as without."""
        module, x, parameters = self._problem()
        plain = torch.autograd.grad(self._losses(module(x)).sum(), list(parameters.values()))
        hooks = ExampleHooks(module, parameters)
        with hooks.recording(DenseRows(parameters, len(x)), len(x)):
            loss = self._losses(module(x)).sum()
            hooks.before_backward(loss)
            watched = torch.autograd.grad(loss, list(parameters.values()))
        assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))

    def _problem(self) -> tuple[nn.Module, Tensor, dict[str, nn.Parameter]]:
        """Return the layer, its input and its parameters in float64, with normal values that are neither 0 nor 1."""
        torch.manual_seed(0)
        module, x = self.make()
        module, x = module.double(), x.double() if x.is_floating_point() else x
        for p in module.parameters():
            nn.init.normal_(p, std=0.5)
        return module, x, dict(module.named_parameters())

    def _by_hooks(
        self, module: nn.Module, x: Tensor, parameters: dict[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], ExampleHooks]:
        """Return the gradients of each example by name, computed by hooks, and the hooks."""
        rows, hooks = DenseRows(parameters, len(x)), ExampleHooks(module, parameters)
        with hooks.recording(rows, len(x)):
            loss = self._losses(module(x)).sum()
            hooks.before_backward(loss)
            torch.autograd.grad(loss, list(parameters.values()))
        return rows.rows, hooks

    @staticmethod
    def _losses(output: Tensor) -> Tensor:
        """Return a loss of each example that depends on all of its outputs, and on each in its own way."""
        output = output.flatten(1)
        return (output.tanh() * torch.linspace(1, 2, output.shape[1], dtype=output.dtype)).sum(1)
