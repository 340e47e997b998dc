"""All engines give the same rows, of odd batches too."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from storages import LargeStorages
from torch import nn

from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.per_example.example_sketches import ENGINES, ExampleSketches


def sketches(module, loss, engine="hooks", layout=None, **options):
    layout = layout or Layout.of(module)
    sketch = BlockSRHT(layout.n, min(16, layout.n))
    return ExampleSketches(module, layout, sketch=sketch, loss_fn=loss, engine=engine, **options)


@pytest.mark.parametrize("empty", [[0], [2], [0, 4], [1, 2, 3, 4]])
def test_examples_without_labels_have_zero_rows_and_spoil_no_other(empty):
    """Of a mean over no labels that is written out the gradient is NaN: it is neither compared nor a row."""
    torch.manual_seed(0)
    module = nn.Linear(3, 4).double()
    labels = torch.randint(0, 4, (5, 6))
    labels[empty] = -100
    labels[3, :2] = -100

    def loss(module, batch):
        counts = batch["labels"] != -100
        each = F.cross_entropy(module(batch["x"]).mT, batch["labels"] * counts, reduction="none")
        return (each * counts).sum() / counts.sum()

    batch = {"x": torch.randn(5, 6, 3).double(), "labels": labels}
    with preserve_state(module):
        rows = {engine: sketches(module, loss, engine, weight_fn=num_labels)(batch)[0] for engine in ENGINES}
    for engine, found in rows.items():
        torch.testing.assert_close(found, rows["loop"], msg=engine)
        assert found.isfinite().all()
        assert (found.norm(dim=1) > 0).tolist() == [i not in empty for i in range(5)]


@pytest.mark.parametrize("size", [4, 1500])
def test_an_example_that_uses_none_of_the_parameters_has_a_zero_row(size):
    """As where a router sends examples to one expert or the other; 1500^2 numbers are sketched one by one."""
    module = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])
    first = Layout.of(module, "0.*")

    def routed(module, x):
        return module[0 if x[0, 0] > 0 else 1](x).square().mean()

    x = torch.ones(3, size) * torch.tensor([[-1.0], [1.0], [-1.0]])
    with preserve_state(module):
        rows = sketches(module, routed, "loop", first)(x).rows
    assert rows.any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_changes_its_batch_in_place_sees_the_batch_as_it_is(engine):
    """Every time: hooks are compared with examples alone, so the loss is called more than once on a batch."""
    torch.manual_seed(0)
    module, x = nn.Linear(3, 2), torch.randn(4, 3)

    def loss(module, batch):
        return module(batch["x"].mul_(2)).square().mean()

    plain = {"x": x.clone()}
    with preserve_state(module):
        rows = sketches(module, loss, engine)(plain).rows
        truth = sketches(module, lambda module, x: module(2 * x).square().mean(), "loop")(x).rows
    torch.testing.assert_close(rows, truth)
    assert torch.equal(plain["x"], x)


def test_frozen_parameters_are_refused():
    module = nn.Linear(3, 2)
    layout = Layout.of(module)
    module.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="cover bias, which is frozen now; set requires_grad"):
        sketches(module, lambda module, x: module(x).sum(), layout=layout)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_of_a_table_are_those_of_a_dense_one(layer, engine):
    """A bag has no rule, so that `auto` takes the loop too, and says so."""
    torch.manual_seed(0)
    batch = {"x": torch.randint(11, (5, 4)), "labels": torch.randint(3, (5,))}

    def rows(sparse, engine):
        torch.manual_seed(1)
        module = nn.ModuleList([layer(11, 6, sparse=sparse), nn.Linear(6, 3)])

        def loss(module, batch):
            found = module[0](batch["x"])
            return F.cross_entropy(module[1](found.mean(1) if found.ndim == 3 else found), batch["labels"])

        with preserve_state(module):
            return sketches(module, loss, engine)(batch).rows

    said = pytest.warns(UserWarning, match="EmbeddingBag 0 has no rule") if layer is nn.EmbeddingBag else nullcontext()
    with said if engine == "auto" else nullcontext():
        found = rows(True, engine)
    torch.testing.assert_close(found, rows(False, "loop"))


def most_gradients(engine, layers, size=2048):
    """Return the bytes of what exists together while rows are computed, in gradients of one layer."""
    torch.manual_seed(0)
    module, x = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))), torch.randn(2, size)
    with preserve_state(module), LargeStorages() as storages:
        sketches(module, lambda module, x: module(x).square().mean(), engine)(x)
    return storages.most_bytes / (4 * size**2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "hooks"])
def test_the_scratch_memory_of_large_gradients_is_that_of_one_layer_or_two(engine):
    """Of layers of 2^22 numbers, with a few MB for the sketches; whole gradients would be those of all layers."""
    three, six = most_gradients(engine, 3), most_gradients(engine, 6)
    assert 1 <= three == six < 2.5


class Prompted(nn.Module):
    """A table is looked up for each example, and once for all: an embedded prompt before the tokens."""

    def __init__(self, way):
        super().__init__()
        self.way, self.emb, self.mid, self.head = way, nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, flags):
        prompt = self.emb(torch.tensor([0, 1]))
        if self.way == "flagged":  # one example has it
            prompt = prompt * flags[:, None, None]
        elif self.way == "expanded":
            prompt = prompt.expand(len(x), -1, -1)
        else:
            prompt = self.emb(x)[:, :2] + prompt  # as of positions
        return self.head(self.mid(torch.cat([prompt, self.emb(x)], 1)).tanh().mean(1))


@pytest.mark.parametrize("pattern", ["*", "emb.*"])
@pytest.mark.parametrize("way", ["flagged", "expanded", "added"])
def test_a_table_that_is_looked_up_for_all_examples_too(way, pattern):
    """Its hook lies beyond the layers, to whose outputs a pass would go otherwise."""
    torch.manual_seed(0)
    module = Prompted(way).double()
    batch = torch.randint(2, 7, (6, 3)), torch.eye(6).double()[2], torch.randint(0, 3, (6,))

    def loss(module, batch):
        return F.cross_entropy(module(batch[0], batch[1]), batch[2])

    with preserve_state(module):
        hooks, loop = (sketches(module, loss, e, Layout.of(module, pattern)) for e in ("hooks", "loop"))
        for _ in range(3):  # the first batch is checked parameter by parameter
            torch.testing.assert_close(hooks(batch).rows, loop(batch).rows)
