"""A Hugging Face GPT-2: tied matrix, its own Conv1D, positions (1, T), fused attention, dropout."""

import pytest
import torch
from dense_rows import DenseRows, error, gradients, trained

from lightning_sketch.per_example.hooks import ExampleHooks

transformers = pytest.importorskip("transformers")

B, T = 4, 9


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gpt2(attention="sdpa", dropout=0.1, dtype=torch.float64):
    config = transformers.GPT2Config(
        vocab_size=23,
        n_positions=12,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).to(dtype).train()


def tokens(examples=B):
    return torch.randint(0, 23, (examples, T))


def losses_of(model, ids, mask=None):
    """Return the mean loss over the tokens of each example."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def rows_by_hooks(model, ids, mask=None, truth=True):
    """Return rows, and those of losses of the same forward pass: in another one dropout draws anew."""
    hooks, accumulator = ExampleHooks(model, trained(model)), DenseRows(trained(model), len(ids))
    with hooks.recording(accumulator, len(ids)):
        losses = losses_of(model, ids, mask)
        alone = [gradients(loss, model, retain_graph=True) for loss in losses] if truth else []
        hooks.before_backward(losses.sum())
        losses.sum().backward()
    assert hooks.reasons == {}
    assert hooks.supported == set(trained(model))
    return accumulator.rows, dict(
        zip(trained(model), map(torch.stack, zip(*alone, strict=True)), strict=True)
    ) if truth else {}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_are_the_gradients_of_losses_of_the_same_forward(attention, masked, dtype, limit):
    model, ids = gpt2(attention, dtype=dtype), tokens()
    mask = (torch.arange(T) < torch.tensor([[9], [5], [7], [2]])).long() if masked else None
    rows, truth = rows_by_hooks(model, ids, mask)
    assert error(without_keys(rows), without_keys(truth)) < limit
    sums = {name: found.sum(0, keepdim=True) for name, found in rows.items()}
    batch = {name: p.grad.double().view(1, -1) for name, p in trained(model).items()}
    assert error(without_keys(sums), without_keys(batch)) < limit


def without_keys(rows):
    """Set the rows of the biases of keys to zero: attention does not depend on them, their gradient is rounding."""
    for name in rows:
        if name.endswith("c_attn.bias"):
            rows[name][:, 8:16] = 0
    return rows


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    """Without dropout, against the same model that keeps everything."""
    model, ids = gpt2(dropout=0.0), tokens()
    _, truth = rows_by_hooks(model, ids)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    rows, _ = rows_by_hooks(model, ids, truth=False)
    assert error(without_keys(rows), without_keys(truth)) < 1e-12


def test_a_last_batch_of_one():
    """Where positions (1, T) look as if they had an axis of examples, and have."""
    rows, truth = rows_by_hooks(gpt2(), tokens(1))
    assert error(without_keys(rows), without_keys(truth)) < 1e-12
