"""Language models of Hugging Face, with their own losses, as built from a configuration.

The first batch of each is full, the others are padded. Rows are compared with those of the loop, which calls the model
on one example at a time, as a user would.
"""

import pytest
import torch
from marks import slow
from torch import nn

from lightning_sketch import sketch_gradients
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import BlockSRHT

transformers = pytest.importorskip("transformers")

WORDS, DOCUMENTS, TOKENS = 61, 3, 9
SMALL = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
BERT = {**SMALL, **HEADS, "max_position_embeddings": 16}


def padded(full):
    lengths = torch.full((DOCUMENTS,), TOKENS) if full else torch.randint(3, TOKENS + 1, (DOCUMENTS,))
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ids = torch.randint(1, WORDS, (DOCUMENTS, TOKENS)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def completions(full):
    """Labels on the second part only, as for an answer to a prompt."""
    batch = padded(full)
    batch["labels"][:, :2] = -100
    return batch


def masked(full):
    """Few labels, on random tokens, as for a masked language model."""
    batch = padded(full)
    chosen = torch.rand(DOCUMENTS, TOKENS) < 0.4
    chosen[:, 1] = True
    return {**batch, "labels": batch["labels"].where(chosen, -100)}


def classified(full):
    return {**padded(full), "labels": torch.randint(3, (DOCUMENTS,))}


def translated(full):
    return {**padded(full), "labels": padded(full)["labels"][:, :5]}


def model(name, config, **options):
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**options))


GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
# name: model, batches, whether labels are shifted, why hooks do not support it
MODELS = {
    "GPT-2": (model("GPT2LMHeadModel", "GPT2Config", **GPT2), padded, True, None),
    "Llama": (model("LlamaForCausalLM", "LlamaConfig", **SMALL, **HEADS), completions, True, None),
    "masked BERT": (model("BertForMaskedLM", "BertConfig", **BERT), masked, False, None),
    "BERT of tokens": (
        model("BertForTokenClassification", "BertConfig", num_labels=WORDS, **BERT),
        padded,
        False,
        None,
    ),
    "BERT of texts": (
        model("BertForSequenceClassification", "BertConfig", num_labels=3, **BERT),
        classified,
        False,
        None,
    ),
    "T5": (
        model("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **T5),
        translated,
        False,
        "relative_attention_bias has a rule, but it is used by Where",
    ),
    "mixture of experts": (
        model("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=1, num_local_experts=3, **SMALL, **HEADS),
        padded,
        True,
        "gate has no rule",
    ),
}


def weights(batch, shifted):
    labels = batch["labels"] if batch["labels"].ndim > 1 else batch["labels"][:, None]
    return (labels[:, 1:] if shifted else labels).ne(-100).sum(1).tolist()


@pytest.mark.parametrize("name", [name if i < 2 else slow(name) for i, name in enumerate(MODELS)])
def test_rows_are_right_and_their_weights_are_found(name):
    make, draw, shifted, unsupported = MODELS[name]
    torch.manual_seed(0)
    module, batches = make(), [draw(full=i == 0) for i in range(3)]
    sketch = BlockSRHT(Layout.of(module).n, 64)

    def own(module, batch):
        return module(**batch).loss

    def rows(engine):
        return sketch_gradients(module, batches, sketch, own, engine=engine)

    if unsupported is None:
        found = rows("auto")
    else:  # the fallback is said once
        with pytest.warns(UserWarning, match=unsupported) as said:
            found = rows("auto")
        assert len(said) == 1
    torch.testing.assert_close(found.sketches, rows("loop").sketches, rtol=1e-4, atol=1e-6)
    assert found.weight.tolist() == [weight for batch in batches for weight in weights(batch, shifted)]
    assert found.scale_known.all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_on_a_frozen_base():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = MODELS["Llama"][0]()
    module = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    batches = [padded(full=i == 0) for i in range(3)]
    sketch = BlockSRHT(Layout.of(module).n, 64)
    rows = {
        engine: sketch_gradients(module, batches, sketch, lambda module, batch: module(**batch), engine=engine)
        for engine in ("hooks", "loop")
    }
    torch.testing.assert_close(rows["hooks"].sketches, rows["loop"].sketches, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        base.lm_head.weight.add_(0.1)  # the frozen base is replaced
    other = sketch_gradients(module, batches[:1], sketch, lambda module, batch: module(**batch))
    assert other.fingerprint != rows["hooks"].fingerprint


def test_four_bit_weights_that_were_packed_for_inference_are_refused_by_name():
    """Bitsandbytes packs them in a pass under no_grad on a CPU, and gives no gradients through them afterwards."""
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))

    class State:
        packing_format_for_cpu = True

    module[0].weight.quant_state = State()
    with pytest.raises(ValueError, match="4-bit weights of 0 for inference on a CPU"):
        sketch_gradients(module, [torch.randn(3, 4)], BlockSRHT(26, 8), lambda module, x: module(x).square().mean())
