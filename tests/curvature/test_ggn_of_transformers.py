"""Of a Hugging Face model the output is its logits, and the loss the one that it makes of them itself."""

import pytest
import torch
from torch.func import functional_call, hessian, jacrev
from torch.nn import attention, functional

from lightning_sketch.autodiff.batches import num_labels
from lightning_sketch.curvature import GGN, Hessian

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[1, 4, 2, 0], [3, 3, 1, 2], [2, 1, 0, 4]])
LABELS = torch.tensor([[1, 4, 2, -100], [-100, -100, 1, 2], [2, 1, 0, 4]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
SMALL = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}


def causal():
    """A model that predicts the next token; its loss shifts the labels."""
    size = {"vocab_size": 5, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 4}
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def classifier():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=4, type_vocab_size=1, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def shifted(logits, labels):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


PROBLEMS = {
    "causal": (causal, {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, shifted),
    "classifier": (classifier, {"input_ids": IDS, "labels": torch.tensor([0, 2, 1])}, functional.cross_entropy),
}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS)
def problem(request):
    make, batch, loss = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double()
        for p in module.parameters():  # at the usual start nearly everything is zero
            p.data += 0.3 * torch.randn_like(p)
    return module.train(), batch, loss


def product(module, batch, loss, v):
    """Return Jᵀ H J v of one batch, in evaluation mode."""
    inputs = {k: value for k, value in batch.items() if k != "labels"}
    named = {k: p.detach() for k, p in module.named_parameters()}
    flat = torch.cat([p.flatten() for p in named.values()])
    was, shape = module.training, module.eval()(**inputs).logits.shape

    def logits(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {k: part.view(p.shape) for (k, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(module, values, (), inputs).logits.flatten()

    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        jacobian = jacrev(logits)(flat)
    curvature = hessian(lambda z: loss(z.view(shape), batch["labels"]))(logits(flat))
    module.train(was)
    return jacobian.T @ (curvature @ (jacobian @ v))


def directions(operator):
    v = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return v / v.norm()


def test_a_product_is_that_of_the_dense_matrix(problem):
    """The causal model computes its loss in float32, whatever its own precision."""
    module, batch, loss = problem
    g = GGN(module, [batch])
    v = directions(g)
    torch.testing.assert_close(g.matvec(v), product(module, batch, loss, v), rtol=1e-4, atol=1e-6)
    assert module.training


def test_a_batch_may_be_what_a_tokenizer_returns(problem):
    module, batch, _ = problem
    g = GGN(module, [batch])
    encoded = GGN(module, [transformers.BatchEncoding(batch)], micro_batch_size=len(IDS))
    torch.testing.assert_close(encoded.matvec(directions(g)), g.matvec(directions(g)))


def test_weighted_by_its_labels_a_causal_model_may_be_cut():
    """The model's loss is a mean over the labels that are not ignored, without the first of each row."""
    make, batch, _ = PROBLEMS["causal"]
    module, weigh = make(), lambda batch: num_labels(batch, shift=True)
    whole, cut = (GGN(module, [batch], weight_fn=weigh, micro_batch_size=size) for size in (None, 1))
    v = directions(whole).float()
    torch.testing.assert_close(cut.matvec(v), whole.matvec(v))


def test_another_loss_may_be_given_instead(problem):
    module, batch, _ = problem
    g = GGN(module, [batch], output_loss_fn=lambda logits, batch: logits.square().mean())
    v = directions(g)
    expected = product(module, batch, lambda z, y: z.square().mean(), v)
    torch.testing.assert_close(g.matvec(v), expected)


def test_the_hessian_takes_the_same_batches(problem):
    """The loss_fn has one line; the tied embedding of the causal model is one parameter."""
    module, batch, _ = problem
    h = Hessian(lambda module, batch: module(**batch).loss, module, [batch])
    assert h.shape[0] == sum(p.numel() for p in module.parameters())
    g, v = GGN(module, [batch]), directions(h)
    assert h.loss() == pytest.approx(g.loss())
    torch.testing.assert_close(h.gradient(), g.gradient())
    assert h.matvec(v).isfinite().all()
