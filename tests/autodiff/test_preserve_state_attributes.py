"""A measurement of a module changes none of its attributes, metrics, frozen parameters and hooks."""

from collections import Counter, OrderedDict, defaultdict, deque

import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_sketch.autodiff.preserve_state import preserve_state


def test_attributes_are_put_back_however_deep():
    module = nn.Module()
    module.part = nn.Module()
    part, inner = module.part, [1, {"a": {2, 3}}]
    part.steps, part.name, part.nothing = 3, "x", None
    part.outputs, part.window, part.ids = [inner, inner], deque([1, 2], maxlen=2), {1}
    part.table = {"deep": {"deeper": [deque([4])]}}
    part.by_key, part.counts, part.ordered = defaultdict(list, a=[1]), Counter("aab"), OrderedDict(b=[1], a=[2])
    part.itself = [part.outputs]
    part.itself.append(part.itself)
    kept = {name: id(value) for name, value in vars(part).items()}
    with preserve_state(module):
        part.steps, part.name, part.nothing, part.new = 4, "y", 1, []
        part.outputs.append(1)
        inner[1]["a"].add(9)
        inner[0] = 5
        part.window.append(3)
        part.ids.clear()
        part.table["deep"]["deeper"][0].append(5)
        part.table["deep"]["other"] = 1
        part.by_key["b"].append(1)
        part.by_key["a"].append(1)
        part.counts.update("bb")
        part.ordered.move_to_end("b")
        part.ordered["a"].append(1)
        part.itself.clear()
        del part.ids
    assert (part.steps, part.name, part.nothing) == (3, "x", None)
    assert not hasattr(part, "new")
    assert part.outputs == [[1, {"a": {2, 3}}]] * 2
    assert part.window == deque([1, 2])
    assert part.ids == {1}
    assert part.table == {"deep": {"deeper": [deque([4])]}}
    assert part.by_key == {"a": [1]}
    assert part.counts == Counter("aab")
    assert list(part.ordered.items()) == [("b", [1]), ("a", [2])]
    assert part.itself[0] is part.outputs
    assert {name: id(value) for name, value in vars(part).items()} == kept


def test_metrics_are_put_back():
    """States that are tensors changed in place, tensors replaced, and lists."""
    accuracy, average = MulticlassAccuracy(3), MeanMetric()
    module = nn.Module()
    module.metrics = MetricCollection({"accuracy": accuracy, "again": MulticlassAccuracy(3, average="micro")})
    module.average, module.seen = average, MeanMetric()
    guesses, labels = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 1])
    module.metrics.update(guesses, labels)
    module.average.update(3.0)
    before = {k: v.clone() for k, v in module.metrics.compute().items()}, module.average.compute().clone()
    with preserve_state(module):
        module.metrics.update(labels, guesses)
        module.metrics(labels * 0, guesses)
        module.average.update(torch.tensor([9.0, 9.0]))
        module.average.compute()
        module.seen(5.0)
    for metric in (*module.metrics.values(), module.average):
        metric._computed = None  # nothing is read from the cache
    assert {k: v.item() for k, v in module.metrics.compute().items()} == {k: v.item() for k, v in before[0].items()}
    assert module.average.compute() == before[1]
    assert module.seen.update_count == 0
    assert module.seen.weight == 0


def test_tensors_in_attributes_are_put_back():
    module = nn.Module()
    module.average, module.replaced = torch.ones(3), torch.ones(3)
    before = module.replaced
    with preserve_state(module):
        module.average.mul_(0.9)
        module.replaced = module.replaced * 0.9
    assert module.average.tolist() == [1, 1, 1]
    assert module.replaced is before


def test_frozen_parameters_are_put_back():
    """As of a teacher that follows the student in every forward pass."""
    module = nn.ModuleDict({"student": nn.Linear(3, 3), "teacher": nn.Linear(3, 3).requires_grad_(False)})
    before = [p.clone() for p in module["teacher"].parameters()]
    storage = [p.data_ptr() for p in module["teacher"].parameters()]
    with preserve_state(module):
        module["teacher"].weight.lerp_(module["student"].weight.detach(), 0.1)
        module["teacher"].bias.data = module["student"].bias.detach()
    after = list(module["teacher"].parameters())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert [p.data_ptr() for p in after] == storage


def test_hooks_on_gradients_sleep_and_wake():
    """They would change the products, or count them as training."""
    module, fired = nn.Linear(3, 1), []
    x = torch.ones(2, 3, requires_grad=True)
    handles = [
        module.weight.register_hook(lambda grad: fired.append("tensor")),
        module.register_full_backward_hook(lambda *args: fired.append("module")),
        module.register_full_backward_pre_hook(lambda *args: fired.append("before")),
    ]
    with preserve_state(module):
        torch.autograd.grad(module(x).sum(), [module.weight, x])
    assert fired == []
    torch.autograd.grad(module(x).sum(), [module.weight, x])
    assert sorted(fired) == ["before", "module", "tensor"]
    for handle in handles:
        handle.remove()
    torch.autograd.grad(module(x).sum(), [module.weight, x])
    assert len(fired) == 3
