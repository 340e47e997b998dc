"""Rows of lists, graphs and time-first batches are the gradients of single examples, or the batch is refused."""

import pytest
import torch
from models import fit, trainer
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import BlockSRHT, GradientSketchWriter, GradientStore, sketch_gradients
from lightning_sketch.attribution import batch_ids
from lightning_sketch.autodiff import Layout


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Graphs:
    def __init__(self, x, owner):
        self.x, self.owner = x, owner

    def to_list(self):
        count = int(self.owner.max()) + 1
        return [Graphs(self.x[self.owner == i], torch.zeros_like(self.owner[self.owner == i])) for i in range(count)]


def of_list(module, batch):
    return torch.stack([module(x).tanh().square().mean() for x in batch]).mean()


def of_graphs(module, batch):
    return torch.stack([module(one.x).sum(0).square().mean() for one in batch.to_list()]).mean()


def of_time_first(module, batch):
    return (module(batch[0]).mean(0) - batch[1]).square().mean()


SEQUENCES = [normal(t, 3, seed=t) for t in (2, 4, 4, 5)]
GRAPHS = Graphs(normal(9, 3), torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 3]))
TIME_FIRST = normal(6, 4, 3), normal(4, 2, seed=1)

CASES = {
    "list": (of_list, SEQUENCES, {"num_examples": len}, [[x] for x in SEQUENCES]),
    "split": (of_graphs, GRAPHS, {"split_fn": Graphs.to_list}, GRAPHS.to_list()),
    "time first": (
        of_time_first,
        TIME_FIRST,
        {"batch_dim": 1},
        [(TIME_FIRST[0][:, i : i + 1], TIME_FIRST[1][i : i + 1]) for i in range(4)],
    ),
}
cases = pytest.mark.parametrize(("loss", "batch", "options", "examples"), CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_rows_are_the_gradients_of_the_examples_alone(loss, batch, options, examples, engine):
    module = net()
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, 16)
    rows = sketch_gradients(module, [batch], sketch, loss, engine=engine, **options)
    for row, example in zip(rows.sketches, examples, strict=True):
        gradients = torch.autograd.grad(loss(module, example), list(module.parameters()))
        torch.testing.assert_close(row, sketch.matvec(torch.cat([g.flatten() for g in gradients])))


@cases
def test_without_the_argument_they_are_refused(loss, batch, options, examples):
    module = net()
    with pytest.raises(ValueError, match="num_examples="):
        sketch_gradients(module, [batch], BlockSRHT(Layout.of(module).n, 16), loss)


@pytest.mark.parametrize("options", [CASES["split"][2], CASES["time first"][2]], ids=["split", "time first"])
@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_engines_that_need_rows_of_tensors_say_so(options, engine):
    module = net()
    batch, loss = (GRAPHS, of_graphs) if "split_fn" in options else (TIME_FIRST, of_time_first)
    with pytest.raises(ValueError, match=r"along the first axis.*loop"):
        sketch_gradients(module, [batch], BlockSRHT(Layout.of(module).n, 16), loss, engine=engine, **options)


TEXTS = [(["the cat sat"], torch.tensor([1])), (["a dog ran"], torch.tensor([1])), (["the cat sat"], torch.tensor([2]))]


def test_texts_of_one_label_have_different_ids():
    """Single texts, texts in one batch, and batches of nothing but text."""
    alone = [int(batch_ids(batch, "hash")) for batch in TEXTS]
    assert len(set(alone)) == 3
    together = ([text for (text,), _ in TEXTS], torch.cat([label for _, label in TEXTS]))
    assert batch_ids(together, "hash").tolist() == alone
    words = batch_ids(["the cat sat", "a dog ran", "the cat sat"], "hash").tolist()
    assert words[0] == words[2] != words[1]


class Ragged(LightningModule):
    """Trains on lists of sequences, as a custom collate function makes them."""

    def __init__(self):
        super().__init__()
        self.net = net().float()

    def training_step(self, batch, batch_idx):
        return of_list(self.net, batch)

    def validation_step(self, batch, batch_idx):
        return of_list(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader():
    return DataLoader([normal(2 + i % 5, 3, seed=i).float() for i in range(12)], batch_size=4, collate_fn=list)


def test_steps_need_no_number_of_examples(tmp_path):
    """The row of a step is that of the whole batch."""
    writer = GradientSketchWriter(tmp_path / "store", dim=8)
    fit(tmp_path, writer, model=Ragged, data=loader(), max_epochs=1)
    assert len(GradientStore.open(writer.dirpath)) == 3


def test_a_writer_takes_the_arguments_at_a_checkpoint(tmp_path):
    """The twelve rows are those of sketch_gradients."""
    module = Ragged()
    writer = GradientSketchWriter(tmp_path / "store", dim=8, dtype="float32", num_examples=len)
    trainer(tmp_path, writer).validate(module, loader(), verbose=False)
    store = GradientStore.open(writer.dirpath)
    rows = store.sketch_gradients(module, loader(), num_examples=len)
    torch.testing.assert_close(store.read().sketches, rows.sketches)
    assert len(store) == 12
