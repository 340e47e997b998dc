"""Queries are computed as the rows of their store were, unless they say otherwise."""

import sys

import pytest
import torch
import torch.nn.functional as F
from models import trainer
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch.attribution import IndexedDataset, row_arguments
from lightning_sketch.store.format import Run


class Sequences(LightningModule):
    """Batches with time first, of which no first axis is that of the examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.layer(batch["x"])[0][-1]), batch["y"][0])

    def validation_step(self, batch, batch_idx):
        pass


def time_first(items):
    x, y = zip(*items, strict=True)
    return {"x": torch.stack(x, 1), "y": torch.stack(y)[None]}


def squared(module, batch):
    """A loss other than the trained one, of which rows may be too."""
    probabilities = module.head(module.layer(batch["x"])[0][-1]).softmax(-1)
    return (1 - probabilities.gather(1, batch["y"][0][:, None])).square().mean()


def both(module, batch):
    losses = torch.arange(batch["x"].shape[1]).float()
    return losses, torch.full_like(losses, 0.25)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    points = TensorDataset(torch.randn(10, 5, 3, generator=generator), torch.arange(10) % 2)
    return DataLoader(IndexedDataset(points), batch_size=4, collate_fn=time_first)


@pytest.mark.filterwarnings("ignore:.*one at a time")
def test_queries_inherit_functions_axis_and_loss(tmp_path, data, monkeypatch):
    """The queries of the training examples are their rows, with nothing said again; a named function elsewhere too."""
    model, arguments = Sequences(), {"batch_dim": 1, "loss_fn": squared, "row_fn": both}
    writer = GradientSketchWriter(tmp_path / "store", dim=16, dtype="float32", **arguments)
    trainer(tmp_path, writer).validate(model, data, verbose=False)
    store = GradientStore.open(writer.dirpath)
    plain = [time_first([data.dataset.dataset[i] for i in range(10)])]
    found = store.sketch_gradients(model, plain)
    torch.testing.assert_close(found.sketches, store.read().sketches)
    assert found.prob_true.tolist() == [0.25] * 10
    other = store.sketch_gradients(model, plain, loss_fn=lambda module, batch: module.training_step(batch, 0))
    assert not torch.allclose(other.sketches, found.sketches)

    monkeypatch.setattr(row_arguments, "_functions", {})  # as in another process
    again = GradientStore.open(writer.dirpath)
    torch.testing.assert_close(again.sketch_gradients(model, plain).sketches, found.sketches)
    monkeypatch.delattr(sys.modules[squared.__module__], "squared")
    with pytest.warns(UserWarning, match=r"computed with loss_fn=.*:squared, which is not known in this process"):
        missed = again.sketch_gradients(model, plain)
    torch.testing.assert_close(missed.sketches, other.sketches)


def test_a_sum_and_weights_are_inherited(tmp_path):
    torch.manual_seed(2)

    class Sums(LightningModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(batch[0]), batch[1], reduction="sum")

        def validation_step(self, batch, batch_idx):
            pass

    model, points = Sums(), TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    writer = GradientSketchWriter(tmp_path / "store", dim=8, dtype="float32", reduction="sum")
    trainer(tmp_path, writer).validate(model, DataLoader(points, batch_size=4), verbose=False)
    store = GradientStore.open(writer.dirpath)
    queries = store.sketch_gradients(model, DataLoader(points, batch_size=4))
    torch.testing.assert_close(queries.sketches, store.read().sketches)


def test_a_function_of_another_script_of_the_same_name_is_not_taken(monkeypatch):
    """A script is __main__ in its own process, and so is the one that asks."""
    monkeypatch.setattr(sys.modules["__main__"], "squared", both, raising=False)
    for name in ("__main__:squared", "functools:partial"):  # nor is a class, as which a partial function is recorded
        run = Run(1, arguments={"loss_fn": {"function": name}, "reduction": "sum"})
        with pytest.warns(UserWarning, match=f"loss_fn={name}, which is not known"):
            found = row_arguments.inherited([run], {"loss_fn": None, "reduction": None})
        assert found == {"loss_fn": None, "reduction": "sum"}
