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
