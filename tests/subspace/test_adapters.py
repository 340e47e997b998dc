"""Low-rank adapters in a GPT-2 whose own weights are frozen: only the adapters are trained, in a subspace of theirs."""

import pytest
import pytorch_lightning as pl
import torch
from nets import trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.subspace import SubspaceModule

transformers = pytest.importorskip("transformers")

LAYERS, WIDTH, RANK = 2, 16, 2


class Adapted(nn.Module):
    """The layer x ↦ base(x) + x A B, with B = 0 at the start."""

    def __init__(self, base, rank):
        super().__init__()
        rows, columns = base.weight.shape  # of a Conv1D: inputs, outputs
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(rows, rank) / rows**0.5)
        self.lora_B = nn.Parameter(torch.zeros(rank, columns))

    def forward(self, x):
        return self.base(x) + x @ self.lora_A @ self.lora_B


class Speaker(pl.LightningModule):
    """A GPT-2 that learns to count modulo 23; its optimizer gets the parameters that are trainable when it is made."""

    def __init__(self, frozen="*"):
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=23,
            n_positions=12,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = transformers.GPT2LMHeadModel(config).train()
        for parameter in Layout.of(self.model, frozen).parameters(self.model) if frozen else ():
            parameter.requires_grad_(False)
        for block in self.model.transformer.h:
            block.attn.c_attn = Adapted(block.attn.c_attn, RANK)
            block.mlp.c_fc = Adapted(block.mlp.c_fc, RANK)

    def training_step(self, batch):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)


ATTENTION = LAYERS * (WIDTH * RANK + RANK * 3 * WIDTH)
MLP = LAYERS * (WIDTH * RANK + RANK * 4 * WIDTH)


def made(frozen="*"):
    pl.seed_everything(0, verbose=False)
    return Speaker(frozen)


def loader():
    return DataLoader([(torch.arange(9) + start) % 23 for start in range(23)], batch_size=8)


def values(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(before, module):
    """Return the names of the parameters that have changed by any bit."""
    return {name for name, parameter in module.named_parameters() if not torch.equal(before[name], parameter)}


def fitted(sub, steps=12, **options):
    run = trainer(max_steps=steps, **options)
    run.fit(sub, loader(), loader())
    return run


@pytest.mark.parametrize("options", [{}, {"others": "full"}, {"max_dim": 64}])
def test_adapters_move_and_the_frozen_model_keeps_its_bits(options):
    module = made()
    before = values(module)
    start = trainer().validate(module, loader(), verbose=False)[0]["val_loss"]
    sub = SubspaceModule(module, 32, parameters="*lora_*", scale=10, **options)
    assert sub.n == ATTENTION + MLP
    run = fitted(sub)
    assert moved(before, module) == {name for name in before if "lora_" in name}
    assert {name.split(".")[0] for name, p in sub.named_parameters() if p.requires_grad} == {"w"}
    assert run.callback_metrics["val_loss"] < start - 0.01


def test_what_is_materialized_is_plain_and_trains_its_adapters_on():
    sub = SubspaceModule(made(), 32, parameters="*lora_*", scale=10)
    run = fitted(sub)
    plain = sub.materialize()
    assert type(plain) is Speaker
    again = trainer().validate(plain, loader(), verbose=False)[0]["val_loss"]
    assert again == pytest.approx(float(run.callback_metrics["val_loss"]), rel=1e-6)
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == {
        name for name, _ in plain.named_parameters() if "lora_" in name
    }
    before, inside = values(plain), values(sub.module)
    fitted(plain)
    assert moved(before, plain) == {name for name in before if "lora_" in name}
    assert not moved(inside, sub.module)


NORMS = 2 * WIDTH * (2 * LAYERS + 1)


@pytest.mark.parametrize(
    ("parameters", "n", "words"),
    [
        ("*", ATTENTION + MLP, ["lora_"]),
        ("*.attn.*", ATTENTION, [".attn.c_attn.lora_"]),
        (
            ["*.attn.*.lora_A", "*.mlp.*.lora_B"],
            LAYERS * RANK * (WIDTH + 4 * WIDTH),
            [".c_attn.lora_A", ".c_fc.lora_B"],
        ),
        ("*.h.0.*lora_?", (ATTENTION + MLP) // LAYERS, [".h.0.attn.c_attn.lora_", ".h.0.mlp.c_fc.lora_"]),
        ("*lora_[!A]", LAYERS * RANK * 7 * WIDTH, ["lora_B"]),
    ],
)
def test_patterns_choose_among_what_is_trainable(parameters, n, words):
    module = made()
    before = values(module)
    sub = SubspaceModule(module, 32, parameters=parameters, scale=10)
    assert sub.n == n
    fitted(sub)
    assert moved(before, module) == {name for name in before if any(word in name for word in words)}


@pytest.mark.parametrize(
    ("frozen", "parameters"), [("*.ln_?.*", "*"), ([], ["*.wte.*", "*.wpe.*", "*.attn.*", "*.mlp.*"])]
)
def test_all_but_norms(frozen, parameters):
    """There is no pattern that excludes parameters: freeze them, or list the others."""
    module = made(frozen)
    before = values(module)
    sub = SubspaceModule(module, 256, parameters=parameters, scale=10)
    assert sub.n == sum(tensor.numel() for tensor in before.values()) - NORMS
    fitted(sub)
    assert moved(before, module) == {name for name in before if ".ln_" not in name}


@pytest.mark.parametrize("others", ["frozen", "full"])
def test_of_the_others_only_those_train_that_were_trainable(others):
    """Attention's adapters train in a subspace, those of the MLP in full or not at all, other weights never."""
    module = made()
    before = values(module)
    sub = SubspaceModule(module, 32, parameters="*.attn.*", others=others, scale=10)
    fitted(sub)
    assert moved(before, module) == {
        name for name in before if "lora_" in name and (others == "full" or ".attn." in name)
    }
    plain = sub.materialize()
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in made().parameters()]
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), module.parameters(), strict=True))
