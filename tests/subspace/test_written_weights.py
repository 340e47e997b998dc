"""Weights that others write are θ₀ before the first step, and refused later; none is overwritten in silence."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from nets import trainer
from projected import Net, batches
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_sketch.subspace import SubspaceModel, SubspaceModule


def made(kind=Net, seed=7):
    pl.seed_everything(seed, verbose=False)
    return kind()


PRETRAINED = made(seed=8).state_dict()


def loaded(module):
    module.load_state_dict(PRETRAINED)


def assigned(module):
    module.load_state_dict(copy.deepcopy(PRETRAINED), assign=True)


def copied(module):
    for p, value in zip(module.parameters(), PRETRAINED.values(), strict=True):
        p.data.copy_(value)


def replaced(module):
    for p, value in zip(module.parameters(), PRETRAINED.values(), strict=True):
        p.data = value.clone()


WAYS = [loaded, assigned, copied, replaced]


@pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("when", ["", "setup", "on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_weights_that_are_written_before_the_first_step_are_where_training_starts(write, when, caplog):
    """The run is that of a module that had them when it was wrapped, and so are its fingerprint and state."""
    methods = {when: lambda self, *args, **kwargs: write(self)} if when else {}
    sub, same = SubspaceModule(made(type("Model", (Net,), methods)), 7), SubspaceModule(made(seed=8), 7)
    if not when:
        write(sub.module)
    with caplog.at_level("INFO"):
        trainer().fit(sub, batches())
    assert caplog.text.count("4 weights were written to since the subspace was made: body.weight, body.bias") == 1
    trainer().fit(same, batches())
    for one, other in ((sub.w, same.w), *zip(sub.weights.parameters(), same.weights.parameters(), strict=True)):
        assert torch.equal(one, other)
    assert sub.get_extra_state() == same.get_extra_state()


def test_what_is_written_is_there_at_once():
    """A forward pass, a saved state, a copy and a conversion are at the weights that were loaded."""
    x = torch.ones(1, 5, dtype=torch.float64)
    for read in (lambda sub: sub(x), lambda sub: sub.materialize()(x), lambda sub: sub.to(torch.float64)(x)):
        sub = SubspaceModule(made(), 7)
        loaded(sub.module)
        assert torch.equal(read(sub), made(seed=8)(x))
    sub = SubspaceModule(made(), 7)
    loaded(sub.module)
    assert sub.state_dict()["_extra_state"] == SubspaceModule(made(seed=8), 7).state_dict()["_extra_state"]
    model = SubspaceModel(made(), 7)
    loaded(model.module)
    assert torch.equal(model(x), made(seed=8)(x))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_loads_weights_in_setup_resumes(tmp_path):
    class Loads(Net):
        def setup(self, stage):
            if stage == "fit":
                loaded(self)

    whole, resumed = SubspaceModule(made(Loads), 7), SubspaceModule(made(Loads), 7)
    keep, path = ModelCheckpoint(tmp_path, save_top_k=-1), tmp_path / "epoch=0-step=8.ckpt"
    trainer(keep, max_epochs=2, max_steps=-1, enable_checkpointing=True).fit(whole, batches())
    trainer(max_epochs=2, max_steps=-1).fit(resumed, batches(), ckpt_path=path)
    assert torch.equal(whole.w, resumed.w)
    with pytest.raises(ValueError, match="other initial weights"):
        trainer(max_epochs=2, max_steps=-1).fit(SubspaceModule(made(), 7), batches(), ckpt_path=path)


def test_weights_that_w_has_moved_are_loaded_no_more():
    sub = SubspaceModule(made(), 7)
    trainer().fit(sub, batches())
    loaded(sub.module)
    with pytest.raises(RuntimeError, match=r"4 weights were written to after training began: body\.weight"):
        sub.materialize()


def clamp(module):
    with torch.no_grad():
        for p in module.parameters():
            p.clamp_(-0.1, 0.1)


def clamp_data(module):
    for p in module.last.parameters():
        p.data.clamp_(-0.1, 0.1)


def renew(module):
    nn.init.normal_(module.body.weight)


def decay(module):
    for p in module.parameters():
        p.data.mul_(1 - 1e-9)


def swap(module):
    module.body.weight.data = module.body.weight.data + 0.1


@pytest.mark.parametrize("write", [clamp, clamp_data, renew, decay, swap, loaded, assigned])
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "optimizer_step"]
)
def test_weights_that_are_written_while_training_are_refused(write, hook):
    """It says which ones, and what to do; by whatever hook, in place or not."""

    def changed(self, *args, **kwargs):
        if self.trainer.global_step == 3:
            write(self)
        return getattr(Net, hook)(self, *args, **kwargs)

    sub = SubspaceModule(made(type("Model", (Net,), {hook: changed})), 7)
    run = trainer()
    with pytest.raises(RuntimeError, match=r"weights were written to after training began: (body|last).*parameters="):
        run.fit(sub, batches())
    assert 3 <= run.global_step <= 4


def test_a_callback_that_writes_is_refused_too():
    class Clamps(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clamp_data(pl_module)

    with pytest.raises(RuntimeError, match=r"2 weights were written to after training began: last\."):
        trainer(Clamps()).fit(SubspaceModule(made(), 7), batches())


class Words(pl.LightningModule):
    """A module whose embedding limits norms by itself, in each forward pass."""

    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 1)

    def training_step(self, batch):
        return self.last(self.words(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_embedding_with_a_largest_norm_is_refused_unless_it_is_outside():
    data = torch.utils.data.DataLoader(torch.arange(36).view(12, 3) % 9, batch_size=3)
    with pytest.raises(RuntimeError, match=r"1 weights were written to after training began: words.weight\. "):
        trainer().fit(SubspaceModule(made(Words), 4), data)
    for options in ({"parameters": "last.*"}, {"head": "words.*"}):
        sub = SubspaceModule(made(Words), 4, **options)
        trainer().fit(sub, data)
        assert sub.w.any()


def test_what_is_added_and_taken_back_is_no_change():
    """A module may leave its weights for a look, as sharpness is measured; it has them back up to roundings."""

    class Looks(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            before = [p.detach().clone() for p in self.parameters()]
            for p in self.parameters():
                p.data.add_(0.3)
            for p, value in zip(self.parameters(), before, strict=True):
                p.data.copy_(value) if batch_idx % 2 else p.data.sub_(0.3)

    sub, same = SubspaceModule(made(Looks), 7), SubspaceModule(made(), 7)
    for one in (sub, same):
        trainer().fit(one, batches())
    assert torch.allclose(sub.w, same.w, rtol=1e-12)


def test_copies_conversions_and_doublings_are_no_changes(caplog):
    with caplog.at_level("INFO"):
        sub = SubspaceModule(made(), 7, max_dim=28)
        trainer().fit(sub, batches())
        twin = copy.deepcopy(sub)
        twin.double_dim()
        twin.to(torch.float32).to(torch.bfloat16).to(torch.float64)
        twin.state_dict()
        twin.load_state_dict({**sub.state_dict()})
        trainer(max_steps=2).fit(twin, batches())
        trainer(max_steps=2).fit(sub, batches())
    assert "written to" not in caplog.text
