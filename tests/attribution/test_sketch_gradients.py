"""One row per example at these weights: S times what autograd gives for the example alone."""

import pytest
import torch
import torch.nn.functional as F
from models import Digits, dataset, loader
from torch import nn

from lightning_sketch.attribution import IndexedDataset, sketch_gradients
from lightning_sketch.gradients import fingerprint, undisturbed
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.params import Layout


def loss(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


def truth(module, examples, sketch, names="*"):
    layout = Layout.of(module, names)
    rows = []
    with undisturbed(module):
        for x, y in examples:
            gradients = torch.autograd.grad(loss(module, (x[None], y[None])), layout.parameters(module))
            rows.append(sketch.matvec(torch.cat([g.flatten() for g in gradients])))
    return torch.stack(rows)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Digits()


@pytest.mark.parametrize("engine", ["auto", "loop", "vmap"])
def test_rows_are_sketched_gradients_of_each_example(module, engine):
    """With batch norm and dropout in the module: evaluation mode. Rounding of float32 through a few layers."""
    sketch = BlockSRHT(Layout.of(module).n, 64)
    rows = sketch_gradients(module, loader(shuffle=False), sketch, loss, engine=engine)
    assert len(rows) == 256
    expected = truth(module, [dataset()[i] for i in range(256)], sketch)
    assert (rows.sketches - expected).norm() <= 1e-5 * expected.norm()
    assert rows.fingerprint == fingerprint(list(module.parameters()))


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


def test_what_is_known_of_each_row(module):
    """Ids from the data set; losses and probabilities from row_fn."""

    def row_fn(module, batch):
        losses = F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")
        return losses, (-losses).exp()

    module.eval()
    data = torch.utils.data.DataLoader(IndexedDataset(dataset(40)), batch_size=16, shuffle=True)
    sketch = BlockSRHT(Layout.of(module).n, 64)
    rows = sketch_gradients(module, data, sketch, loss, row_fn)
    assert sorted(rows.example_id.tolist()) == list(range(40))
    x, y = dataset(40)[rows.example_id]
    losses = F.cross_entropy(module.net(x), y, reduction="none")
    torch.testing.assert_close(rows.loss, losses.detach())
    torch.testing.assert_close(rows.prob_true, (-losses).exp().detach())
    torch.testing.assert_close(sketch_gradients(module, data, sketch, loss).loss.sort()[0], rows.loss.sort()[0])


def test_works_on_a_checkpoint_in_inference_mode(module):
    sketch = BlockSRHT(Layout.of(module).n, 64)
    batch = dataset()[:8]
    with torch.inference_mode():
        inside = [tensor.clone() for tensor in batch]
        rows = sketch_gradients(module, [inside], sketch, loss)
    torch.testing.assert_close(rows.sketches, sketch_gradients(module, [batch], sketch, loss).sketches)


def test_refused_before_any_work(module):
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
