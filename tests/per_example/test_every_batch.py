"""Rows have the scale of the examples' own gradients on every batch, or say that it is not known.

Each pass begins with an even batch, from which nothing can be learned about how the loss weighs examples, and goes on
with uneven ones. Truth is autograd, one example at a time.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from marks import some
from torch import nn
from uneven import CLASSES, KINDS, TOKENS, WIDTH, Net, truth_of

from lightning_sketch import sketch_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT


def wrong_unmarked(kind, passes, batches, engine="auto"):
    """Return how many rows have a wrong scale and are not marked, how many are marked, and how many there are."""
    make, loss = KINDS[kind]
    wrong = marked = total = 0
    for seed in range(passes):
        torch.manual_seed(seed)
        module = Net()
        sketch = BlockSRHT(Layout.of(module).n, 24)
        counts = torch.randint(2, 12, (batches,)).tolist()
        data = [make(even=i == 0, count=count) for i, count in enumerate(counts)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = sketch_gradients(module, data, sketch, loss, engine=engine)
        pairs = zip(data, counts, strict=True)
        truth = torch.cat([truth_of(module, loss, batch, sketch, count) for batch, count in pairs])
        off = (rows.sketches - truth).norm(dim=1) > 1e-3 * truth.norm(dim=1) + 1e-6
        wrong += int((off & rows.scale_known).sum())
        marked += int((~rows.scale_known).sum())
        total += len(rows)
    return wrong, marked, total


@pytest.mark.parametrize("kind", some(KINDS, ["class weights", "padding"]))
def test_rows_of_batches_that_turn_uneven_are_right_or_marked(untyped, kind):
    wrong, marked, total = wrong_unmarked(kind, passes=2, batches=5)
    assert wrong == 0
    assert marked < total / 2


@pytest.mark.slow
def test_of_two_thousand_batches_at_most_two_rows_are_wrong_and_unmarked():
    """By chance both witnesses of a batch may have the mean weight; a batch that shows more comes soon.

    Rows that nothing can show are those of a pass whose every batch looked even to its witnesses.
    """
    found = {kind: wrong_unmarked(kind, passes=20, batches=20) for kind in KINDS}
    assert sum(wrong for wrong, _, _ in found.values()) <= 2, found


def rows_of(module, batches, loss, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sketch_gradients(module, batches, BlockSRHT(Layout.of(module).n, 24), loss, **options)


def is_right(rows, module, batches, loss):
    """Return whether each row is that of its example alone; one that is zero in truth has to be zero."""
    truth = [truth_of(module, loss, batch, rows.sketch, len(next(iter(batch.values())))) for batch in batches]
    return torch.isclose(rows.sketches, torch.cat(truth), rtol=1e-3, atol=1e-5).all(1)


def test_a_column_of_zeros_and_ones_is_no_weight_because_its_sum_is_that_of_the_mask(untyped):
    """Binary labels beside a mask: where both have as many ones, two examples with both do not tell them apart."""

    def loss(module, batch):
        each = F.binary_cross_entropy_with_logits(module(batch["x"])[:, 0], batch["y"], reduction="none")
        return (each * batch["kept"]).sum() / batch["kept"].sum().clamp(min=1)

    for seed in range(12):
        torch.manual_seed(seed)
        module = Net()
        batches = []
        for _ in range(3):
            y, kept = torch.zeros(8), torch.zeros(8)
            y[torch.randperm(8)[:5]] = 1
            kept[torch.randperm(8)[:5]] = 1
            batches.append({"x": torch.randn(8, WIDTH), "y": y, "kept": kept})
        rows = rows_of(module, batches, loss)
        assert (is_right(rows, module, batches, loss) | ~rows.scale_known).all()


def over_words_and_over_texts(module, batch):
    """A mean over labelled words plus a mean over texts: no single weight of a text in a batch."""
    out, labels = module(batch["x"]), batch["labels"]
    words = F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum") / (labels != -100).sum().clamp(min=1)
    return words + F.cross_entropy(out.mean(1), batch["text"])


def labelled(counts):
    labels = torch.randint(CLASSES, (len(counts), TOKENS)).where(
        torch.arange(TOKENS) < torch.tensor(counts)[:, None], -100
    )
    return {
        "x": torch.randn(len(counts), TOKENS, WIDTH),
        "labels": labels,
        "text": torch.randint(CLASSES, (len(counts),)),
    }


def test_a_guess_that_fits_no_more_zeroes_no_row_of_the_loop():
    """An example without labelled words has its gradient of the other task, after even batches too."""
    torch.manual_seed(0)
    module = Net()
    batches = [labelled([2, 2, 2, 2]), labelled([3, 3, 3, 3]), labelled([1, 4, 0, 2])]
    rows = rows_of(module, batches, over_words_and_over_texts)
    assert is_right(rows, module, batches, over_words_and_over_texts).all()
    assert rows.sketches[10].any()
    assert not rows.scale_known[:8].any()


def test_weights_keep_their_unit():
    """An even batch, and one of a single example, show no unit: it is that of tokens, as of those which do."""

    def loss(module, batch):
        each = F.cross_entropy(module(batch["x"]).mT, batch["y"], reduction="none")
        return (each * batch["mask"]).sum() / batch["mask"].sum()

    def batch(lengths):
        mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
        y = torch.randint(CLASSES, (len(lengths), TOKENS))
        return {"x": torch.randn(len(lengths), TOKENS, WIDTH), "y": y, "mask": mask}

    torch.manual_seed(0)
    lengths = [[6, 6, 6], [6, 2, 4], [6, 6, 6], [5]]
    rows = rows_of(Net(), [batch(own) for own in lengths], loss)
    assert rows.weight.tolist() == [float(n) for own in lengths for n in own]


def test_a_batch_without_gradients_goes_through_the_loop_alone(untyped):
    torch.manual_seed(0)
    module, calls = Net(), []

    def loss(module, batch):
        calls.append(len(batch["x"]))
        labels = batch["labels"]
        each = F.cross_entropy(module(batch["x"]).flatten(0, 1), labels.flatten(), reduction="sum")
        return each / (labels != -100).sum().clamp(min=1)

    batches = [labelled([2, 3, 1]), labelled([0, 0, 0]), labelled([4, 1, 2])]
    for batch in batches:
        del batch["text"]
    with pytest.warns(UserWarning, match="3 of 9 rows are zero"):
        rows = sketch_gradients(module, batches, BlockSRHT(Layout.of(module).n, 24), loss)
    assert rows.scale_known.all()
    assert calls.count(3) == 5  # three passes by hooks, one more for the first batch, one for the sum of the zeros
    assert is_right(rows, module, batches, loss).all()


def test_a_weight_fn_that_is_refuted_fills_no_column():
    torch.manual_seed(0)
    module = Net()
    batches = [{"x": torch.randn(6, WIDTH), "labels": torch.randint(CLASSES, (6,))} for _ in range(2)]

    def loss(module, batch):
        return F.cross_entropy(module(batch["x"]), batch["labels"])

    rows = rows_of(module, batches, loss, weight_fn=lambda batch: 1.0 + float(batch["x"][0, 0].abs()))
    assert rows.weight.isnan().all()
    assert is_right(rows, module, batches, loss).all()


def test_losses_are_not_told_where_the_output_has_them_for_some_examples_only():
    """A plain cross-entropy times the weight of its class, over the number of examples: most weights are one."""
    torch.manual_seed(0)
    module, factor = Net(), torch.tensor([1.0, 1.0, 1.0, 1.0, 6.0])
    labels = torch.arange(12) % 4
    labels[5] = 4
    batch = {"x": torch.randn(12, WIDTH), "labels": labels}

    def loss(module, batch):
        each = F.cross_entropy(module(batch["x"]), batch["labels"], reduction="none")
        return (each * factor[batch["labels"]]).mean()

    rows = rows_of(module, [batch], loss, engine="hooks")
    assert is_right(rows, module, [batch], loss).all()
    assert rows.loss.isnan().all()


def test_a_loss_that_draws_random_numbers_is_said():
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, 2)

    def noisy(module, x):
        return module(x + torch.randn_like(x)).square().mean()

    with pytest.warns(UserWarning, match="draws random numbers"), pytest.warns(UserWarning, match="one at a time"):
        rows = sketch_gradients(module, [torch.randn(4, WIDTH)], BlockSRHT(10, 8), noisy)
    assert rows.scale_known.all()


def test_time_along_the_first_axis_is_said():
    """Slices of a time-first batch are no examples; with a square batch nothing else tells."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(WIDTH, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    module = Recurrent()
    batch = {"x": torch.randn(5, 5, WIDTH), "y": torch.randint(CLASSES, (5, 5))}

    def loss(module, batch):
        return F.cross_entropy(module(batch["x"]).flatten(0, 1), batch["y"].flatten())

    with pytest.raises(ValueError, match=r"batch_first=False.*pass batch_dim=1"):
        rows_of(module, [batch], loss)
    batch = {key: value[:4] for key, value in batch.items()}
    rows = rows_of(module, [batch], loss, batch_dim=1)
    first = {key: value[:, :1] for key, value in batch.items()}
    gradients = torch.autograd.grad(loss(module, first), list(module.parameters()))
    torch.testing.assert_close(rows.sketches[0], rows.sketch.matvec(torch.cat([g.flatten() for g in gradients])))


def uneven(flag):
    return {**labelled([1, 4, 6, 2]), "flag": torch.tensor(flag)}


def test_a_later_batch_that_couples_its_examples_is_noticed():
    """Shares of hooks add up there too; they are not parallel to the gradients of the examples alone."""

    def loss(module, batch):
        out = module(batch["x"]).mean(1)
        own = F.cross_entropy(out, batch["text"])
        return own + (out @ out.T).softmax(1).diagonal().mean() if batch["flag"] else own

    torch.manual_seed(0)
    module, batches = Net(), [uneven(False), uneven(True)]
    sketch = BlockSRHT(Layout.of(module).n, 24)
    with (
        pytest.warns(UserWarning, match=r"from batch 2 on.*\n?.*parallel"),
        pytest.warns(UserWarning, match="couples them"),
    ):
        rows = sketch_gradients(module, batches, sketch, loss)
    assert not rows.scale_known.any()


def test_a_loss_that_weighs_its_examples_in_another_way_than_before_is_doubted():
    """Each batch fits a usual way; that the second is another one shows that the first may have fitted by chance."""

    def loss(module, batch):
        each = F.cross_entropy(module(batch["x"]).mT, batch["labels"], reduction="none").sum(1)
        counts = (batch["labels"] != -100).sum(1)
        return (each / counts).mean() if batch["flag"] else each.sum() / counts.sum()

    torch.manual_seed(0)
    module, batches = Net(), [uneven(False), uneven(True)]
    for batch in batches:
        del batch["text"]
    rows = rows_of(module, batches, loss)
    assert rows.scale_known.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("engine", ["hooks", "loop"])
@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
def test_losses_of_each_example_add_up_whatever_the_reduction_says(engine, reduction):
    torch.manual_seed(0)
    module = Net()
    batch = {"x": torch.randn(5, WIDTH), "labels": torch.randint(CLASSES, (5,))}

    def loss(module, batch):
        return F.cross_entropy(module(batch["x"]), batch["labels"], reduction="none")

    rows = rows_of(module, [batch], loss, engine=engine, reduction=reduction)
    assert is_right(rows, module, [batch], lambda module, batch: loss(module, batch).sum()).all()
    assert rows.scale_known.all()
