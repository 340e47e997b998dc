"""The row of an example is S times the gradient that autograd gives for the example alone."""

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from models import Digits, dataset, loader
from torch import nn

from lightning_sketch.attribution import IndexedDataset, sketch_gradients
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators import BlockSRHT


def loss(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


def truth(module, examples, sketch, names="*"):
    layout = Layout.of(module, names)
    rows = []
    with preserve_state(module):
        for x, y in examples:
            gradients = torch.autograd.grad(loss(module, (x[None], y[None])), layout.parameters(module))
            rows.append(sketch.matvec(torch.cat([g.flatten() for g in gradients])))
    return torch.stack(rows)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Digits()


@pytest.mark.parametrize("engine", ["auto", "loop", slow("hooks"), slow("vmap")])
def test_rows_are_sketched_gradients_of_each_example(module, engine):
    """With batch norm and dropout in the module: evaluation mode. Rounding of float32 through a few layers."""
    sketch = BlockSRHT(Layout.of(module).n, 64)
    rows = sketch_gradients(module, loader(shuffle=False), sketch, loss, engine=engine)
    assert len(rows) == 256
    expected = truth(module, [dataset()[i] for i in range(256)], sketch)
    assert (rows.sketches - expected).norm() <= 1e-5 * expected.norm()
    assert rows.fingerprint == module_fingerprint(module)


def test_the_training_step_is_the_default_and_leaves_no_trace(module):
    sketch = BlockSRHT(Layout.of(module).n, 64)
    batches = [next(iter(loader(shuffle=False)))]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    ours = sketch_gradients(module, batches, sketch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert (module.losses, module.calls) == ([], {"steps": 0})
    assert all(part.training for part in module.modules())
    torch.testing.assert_close(ours.sketches, sketch_gradients(module, batches, sketch, loss).sketches)


def test_some_parameters(module):
    sketch = BlockSRHT(650, 64)
    rows = sketch_gradients(module, [dataset()[:4]], sketch, loss, parameters="net.5.*")
    expected = truth(module, [dataset()[i] for i in range(4)], sketch, "net.5.*")
    torch.testing.assert_close(rows.sketches, expected)


def test_columns_of_the_rows(module):
    """Ids from the data set; losses and probabilities from row_fn."""

    def row_fn(module, batch):
        losses = F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")
        return losses, (-losses).exp()

    module.eval()
    data = torch.utils.data.DataLoader(IndexedDataset(dataset(40)), batch_size=16, shuffle=True)
    sketch = BlockSRHT(Layout.of(module).n, 64)
    rows = sketch_gradients(module, data, sketch, loss, row_fn=row_fn)
    assert sorted(rows.example_id.tolist()) == list(range(40))
    x, y = dataset(40)[rows.example_id]
    losses = F.cross_entropy(module.net(x), y, reduction="none")
    torch.testing.assert_close(rows.loss, losses.detach())
    torch.testing.assert_close(rows.prob_true, (-losses).exp().detach())
    alike = sketch_gradients(module, data, sketch, lambda module, batch: row_fn(module, batch)[0])
    torch.testing.assert_close(alike.loss.sort()[0], rows.loss.sort()[0])
    order, other = alike.example_id.argsort(), rows.example_id.argsort()
    torch.testing.assert_close(alike.sketches[order], rows.sketches[other], rtol=1e-4, atol=1e-6)


def test_works_on_a_checkpoint_in_inference_mode(module):
    sketch = BlockSRHT(Layout.of(module).n, 64)
    batch = dataset()[:8]
    with torch.inference_mode():
        inside = [tensor.clone() for tensor in batch]
        rows = sketch_gradients(module, [inside], sketch, loss)
    torch.testing.assert_close(rows.sketches, sketch_gradients(module, [batch], sketch, loss).sketches)


def test_refused_before_any_work(module, untyped):
    sketch = BlockSRHT(Layout.of(module).n, 64)
    with pytest.raises(ValueError, match="takes n=10 numbers, these parameters have 698"):
        sketch_gradients(module, [], BlockSRHT(10, 4))
    with pytest.raises(ValueError, match="has no training_step; pass loss_fn"):
        sketch_gradients(nn.Linear(2, 1), [], BlockSRHT(3, 2))
    with pytest.raises(ValueError, match="engine='fast' is not known"):
        sketch_gradients(module, [], sketch, engine="fast")
    with pytest.raises(ValueError, match="reduction='max' is not known"):
        sketch_gradients(module, [], sketch, reduction="max")
    with pytest.raises(ValueError, match="got no batches"):
        sketch_gradients(module, [], sketch)


class Awkward(nn.Module):
    """An unsupported layer, and a supported one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTM(8, 8, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        return self.second(self.first(x.squeeze(1))[0].flatten(1))


def test_what_hooks_do_not_support_goes_through_the_loop_or_is_named():
    torch.manual_seed(0)
    module, batch = Awkward(), dataset()[:6]
    sketch = BlockSRHT(Layout.of(module).n, 64)

    def mean(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="from the first batch on, examples are differentiated one at a time"):
        rows = sketch_gradients(module, [batch], sketch, mean)
    torch.testing.assert_close(rows.sketches, sketch_gradients(module, [batch], sketch, mean, engine="loop").sketches)
    with pytest.raises(
        ValueError, match=r"for 4 of 6 parameters of Awkward:\n  first.weight_ih_l0: LSTM first has no rule"
    ):
        sketch_gradients(module, [batch], sketch, mean, engine="hooks")


def test_a_loss_that_couples_examples_is_refused_by_hooks_and_a_sum_is_found(module):
    """A sum that is said to be a mean is refused too; with the right reduction, or without any, it is supported."""
    sketch, batch = BlockSRHT(Layout.of(module).n, 64), dataset()[:6]

    def summed(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1], reduction="sum")

    def contrastive(module, batch):
        z = module.net(batch[0])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    for wrong, reduction in ((summed, "mean"), (contrastive, None), (contrastive, "mean")):
        with pytest.raises(ValueError, match="is not the gradient of the example alone"):
            sketch_gradients(module, [batch], sketch, wrong, engine="hooks", reduction=reduction)
    for reduction in ("sum", None):
        rows = sketch_gradients(module, [batch], sketch, summed, engine="hooks", reduction=reduction)
        torch.testing.assert_close(rows.sketches, sketch_gradients(module, [batch], sketch, loss).sketches)


def test_an_axis_taken_for_that_of_the_examples_is_noticed():
    """With as many tokens as examples and the axes swapped, the parts have the right sum and are wrong."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    sketch = BlockSRHT(8, 8)

    def other_axis(module, x):
        return module(x.transpose(0, 1)).square().mean((0, 2))  # one loss per example

    x = torch.randn(5, 5, 3)
    with pytest.raises(ValueError, match="along another axis"):
        sketch_gradients(module, [x], sketch, other_axis, engine="hooks")
    with pytest.warns(UserWarning, match="along another axis"):
        rows = sketch_gradients(module, [x], sketch, other_axis)
    truth = sketch_gradients(module, [x], sketch, other_axis, engine="loop")
    assert torch.equal(rows.sketches, truth.sketches)


def test_losses_and_probabilities_are_known_where_the_loss_is_a_usual_one(module):
    """Cross-entropy and squared error of an output, on every batch; with label smoothing they are not."""
    sketch, batches = BlockSRHT(Layout.of(module).n, 64), [dataset()[:6], dataset()[6:14]]

    def smoothed(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1], label_smoothing=0.1)

    def squared(module, batch):
        return (module.net(batch[0]) - batch[1]).square().mean()

    rows = sketch_gradients(module, batches, sketch, loss, engine="hooks")
    module.eval()
    each = torch.cat([F.cross_entropy(module.net(x), y, reduction="none").detach() for x, y in batches])
    torch.testing.assert_close(rows.loss, each)
    torch.testing.assert_close(rows.prob_true, (-each).exp())
    assert sketch_gradients(module, batches, sketch, smoothed, engine="hooks").loss.isnan().all()
    real = [(x, torch.randn(len(x), 10)) for x, _ in batches]
    rows = sketch_gradients(module, real, sketch, squared, engine="hooks")
    truth = torch.cat([(module.eval().net(x) - y).square().mean(1).detach() for x, y in real])
    torch.testing.assert_close(rows.loss, truth)
    assert rows.prob_true.isnan().all()
