"""Rows of single tokens, and of documents that are packed into one sequence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch import sketch_gradients
from lightning_sketch.attribution import top_k
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT

WORDS = 13


class Words(nn.Module):
    """Predicts the next word from those before it in the same document, if the batch has documents."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, batch):
        ids = batch["input_ids"]
        documents = batch.get("document_ids", torch.zeros_like(ids))
        before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen = (before & (documents[:, :, None] == documents[:, None])).float()
        return self.head((seen / seen.sum(2, keepdim=True)) @ self.table(ids))


def shifted(module, batch):
    logits, labels = module(batch)[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradient(module, sketch, loss):
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return sketch.matvec(torch.cat([g.flatten() for g in gradients]))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Words()


@pytest.fixture
def sketch(module):
    return BlockSRHT(Layout.of(module).n, 64)


def test_a_row_per_token_is_the_gradient_of_the_loss_of_this_token(module, sketch):
    """The first word is predicted by nothing, and padding has no label: neither has a row."""
    ids = torch.randint(WORDS, (2, 5))
    labels = ids.where(torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(), -100)
    batch = {"input_ids": ids, "labels": labels, "number": torch.tensor([7, 4])}
    rows = sketch_gradients(module, [batch], sketch, shifted, index_key="number", per_token=True)
    assert rows.token.tolist() == [1, 2, 3, 4, 1, 2]
    assert rows.example_id.tolist() == [7, 7, 7, 7, 4, 4]
    truth = []
    for example, token in zip([0, 0, 0, 0, 1, 1], rows.token.tolist(), strict=True):
        losses = F.cross_entropy(module(batch)[:, :-1].mT, labels[:, 1:], reduction="none")
        truth.append(gradient(module, sketch, losses[example, token - 1]))
    torch.testing.assert_close(rows.sketches, torch.stack(truth), rtol=1e-4, atol=1e-6)
    whole = sketch_gradients(module, [batch], sketch, shifted, index_key="number")
    torch.testing.assert_close(rows.sketches[:4].mean(0), whole.sketches[0], rtol=1e-4, atol=1e-6)
    assert whole.weight.tolist() == [4.0, 2.0]


def test_packed_documents_have_the_rows_of_the_documents_alone(module, sketch):
    """A document does not see the others; its first word has no label, as collators of packed sequences do it."""
    texts = [torch.randint(WORDS, (length,)) for length in (4, 2, 3, 5)]
    packs = [[0, 1, 2], [3]]
    batch = {key: torch.full((2, 9), fill) for key, fill in (("input_ids", 0), ("labels", -100), ("document_ids", -1))}
    for row, pack in enumerate(packs):
        start = 0
        for number in pack:
            place = slice(start, start := start + len(texts[number]))
            batch["input_ids"][row, place] = texts[number]
            batch["labels"][row, place] = texts[number]
            batch["labels"][row, place.start] = -100
            batch["document_ids"][row, place] = 10 + number
    rows = sketch_gradients(module, [batch], sketch, shifted)
    assert rows.example_id.tolist() == [10, 11, 12, 13]
    assert rows.weight.tolist() == [3.0, 1.0, 2.0, 4.0]
    alone = [{"input_ids": text[None], "labels": text[None]} for text in texts]
    truth = sketch_gradients(module, alone, sketch, shifted)
    torch.testing.assert_close(rows.sketches, truth.sketches, rtol=1e-4, atol=1e-6)
    best = top_k(truth.where(torch.tensor([False, False, True, False])), rows, 1, method="cosine")
    assert best.example_ids.tolist() == [[12]]


def test_ids_of_another_shape_and_labels_that_are_no_words_are_refused(module, sketch):
    ids = torch.randint(WORDS, (2, 5))
    batch = {"input_ids": ids, "labels": ids, "documents": ids[:, :3]}
    with pytest.raises(ValueError, match="one for each of its labels"):
        sketch_gradients(module, [batch], sketch, shifted, index_key="documents")
    with pytest.raises(ValueError, match="need labels of whole numbers"):
        sketch_gradients(module, [{"input_ids": ids, "labels": ids[:, 0]}], sketch, shifted, per_token=True)


def test_rows_of_tokens_that_do_not_add_up_are_marked(module, sketch):
    """The loss divides by a mask, not by its labels: without the others a token has a part of its gradient."""
    ids = torch.randint(WORDS, (2, 5))

    def over_all(module, batch):
        each = F.cross_entropy(module(batch)[:, :-1].mT, batch["labels"][:, 1:], reduction="sum")
        return each / (4 * len(batch["labels"]))

    with pytest.warns(UserWarning, match="do not add up"), pytest.warns(UserWarning, match="2 of 10 rows are zero"):
        rows = sketch_gradients(module, [{"input_ids": ids, "labels": ids}], sketch, over_all, per_token=True)
    assert not rows.scale_known.any()


def test_parts_of_a_document_in_several_sequences_both_count(module, sketch):
    ids = torch.randint(WORDS, (2, 6))
    documents = torch.tensor([[1, 1, 1, 2, 2, 2], [2, 2, 2, 3, 3, 3]])
    labels = ids.masked_fill(torch.tensor([1, 0, 0, 1, 0, 0]).bool(), -100)
    batch = {"input_ids": ids, "labels": labels, "document_ids": documents}
    rows = sketch_gradients(module, [batch], sketch, shifted)
    assert rows.example_id.tolist() == [1, 2, 2, 3]
    assert rows.part.tolist() == [0, 0, 1, 0]
    query = sketch_gradients(module, [{"input_ids": ids[:1], "labels": ids[:1]}], sketch, shifted)
    dots = (rows.sketches @ query.sketches[0]).tolist()
    best = top_k(query, rows, 3)
    found = dict(zip(best.example_ids[0].tolist(), best.scores[0].tolist(), strict=True))
    assert found == pytest.approx({1: dots[0], 2: dots[1] + dots[2], 3: dots[3]}, rel=1e-4, abs=1e-5)


def test_as_many_copies_are_made_at_once_as_the_batch_has_examples(module, sketch):
    """Memory that has held the batch holds them too."""
    sizes, ids = [], torch.randint(WORDS, (3, 9))

    def noted(module, batch):
        sizes.append(len(batch["labels"]))
        return shifted(module, batch)

    sketch_gradients(module, [{"input_ids": ids, "labels": ids}], sketch, noted, per_token=True)
    assert max(sizes) == 3


def test_a_decoder_that_reads_its_labels_gets_them_as_inputs():
    """T5 makes the inputs of its decoder from the labels; a row of a token is of this token in its whole text."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=WORDS, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    module = transformers.T5ForConditionalGeneration(config).eval()
    sketch = BlockSRHT(Layout.of(module).n, 32)
    batch = {"input_ids": torch.randint(1, WORDS, (1, 6)), "labels": torch.randint(1, WORDS, (1, 4))}
    rows = sketch_gradients(
        module, [batch], sketch, lambda module, batch: module(**batch).loss, engine="loop", per_token=True
    )
    losses = F.cross_entropy(module(**batch).logits[0], batch["labels"][0], reduction="none")
    truth = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        truth.append(sketch.matvec(torch.cat([g.flatten() for g in gradients])))
    torch.testing.assert_close(rows.sketches, torch.stack(truth), rtol=1e-3, atol=1e-5)
    assert rows.scale_known.all()
