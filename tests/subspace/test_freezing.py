"""Layers that are frozen while training stay, and go on from there when they are trained again."""

import pytest
import pytorch_lightning as pl
import torch
from nets import trainer
from projected import Net, assert_same, batches, both, moved
from pytorch_lightning.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sketch.subspace import SubspaceModule

ONCE = ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start"]
EACH = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
EACH += ["on_before_optimizer_step", "on_train_batch_end", "training_step", "optimizer_step"]


def freezing(hook, first=3, last=6):
    """Make a class that freezes its first layer in a hook from one step on, and trains it again from another one on."""

    class Freezes(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == last:
                self.body.requires_grad_(True)

    own = getattr(Freezes, hook)

    def changed(self, *args, **kwargs):
        if hook in ONCE or self.trainer.global_step == first:
            self.body.requires_grad_(False)
        return own(self, *args, **kwargs)

    setattr(Freezes, hook, changed)
    return Freezes


@pytest.mark.parametrize("hook", [*ONCE, *EACH])
def test_freezing_in_a_hook_counts(hook):
    """The frozen layer keeps its bits, the other moves on, and both end where they do in full training."""
    sub, plain = both(freezing(hook), steps=10, run={"max_epochs": 2})
    assert_same(sub, plain)
    assert moved(sub) > 1e-3


class Tunes(BaseFinetuning):
    """A callback that freezes a layer before training, and trains it from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(pl_module.body)


def test_finetuning_callbacks():
    sub, plain = both(Net, lambda: [Tunes()], steps=-1, run={"max_epochs": 3})
    assert_same(sub, plain)
    assert not torch.equal(sub.module.body.weight, sub.theta0()["body.weight"])


def test_a_callback_that_gives_weights_to_the_optimizer_is_refused():
    class WithBackbone(Net):
        def __init__(self):
            super().__init__()
            self.backbone = self.body

    sub = SubspaceModule(WithBackbone(), 7)
    run = trainer(BackboneFinetuning(unfreeze_backbone_at_epoch=1), max_epochs=2, max_steps=-1)
    with pytest.raises(MisconfigurationException, match=r"body.weight, .*without a param group of its own"):
        run.fit(sub, batches())


@pytest.mark.parametrize("options", [{}, {"max_dim": 28}, {"scale": 3.0}])
def test_a_layer_that_is_frozen_and_trained_again_several_times(options):
    """It moves by Dᵀ times what w moves while it is trained. A doubling amid it leaves the weights as they are."""

    class Alternates(Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.body.weight.requires_grad_(self.trainer.global_step % 4 < 2)
            self.last.requires_grad_(self.trainer.global_step % 3 > 0)

    sub, plain = both(Alternates, steps=12, **options)
    assert_same(sub, plain)
    if sub.directions.nested:
        before, _ = sub.materialize(), sub.double_dim()
        for one, other in zip(before.parameters(), sub.materialize().parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-12)


def test_what_was_frozen_stays_so_in_the_next_fit_and_in_a_measurement():
    sub = SubspaceModule(freezing("on_train_batch_start", last=100)(), 7)
    trainer(max_steps=6).fit(sub, batches())
    before = sub.module.body.weight.detach().clone()
    assert not any(p.requires_grad for p in sub.weights.parameters())
    trainer(max_steps=2).fit(sub, batches())
    assert torch.equal(sub.module.body.weight, before)
    sub(torch.zeros(1, 5, dtype=torch.float64)).sum().backward()
    with sub.following():
        assert torch.allclose(sub.module.body.weight, before, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("case", ["hook", "callback", "again"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_with_frozen_layers_resumes_to_the_bit(case, epoch, tmp_path):
    """This holds for layers that a hook has frozen once, though the new module does not freeze them again."""
    first, last = {"hook": (5, 100), "callback": (100, 100), "again": (5, 20)}[case]

    def run(path=None):
        pl.seed_everything(7, verbose=False)
        sub = SubspaceModule(freezing("on_train_batch_start", first, last)(), 7)
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
        tunes = [Tunes()] if case == "callback" else []
        long = {"max_epochs": 4, "max_steps": -1, "enable_checkpointing": path is None}
        trainer(*tunes, *([] if path else [keep]), **long).fit(sub, batches(), ckpt_path=path)
        return sub

    whole = run()
    resumed = run(tmp_path / f"epoch={epoch}-step={8 * (epoch + 1)}.ckpt")
    assert torch.equal(whole.w, resumed.w)
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_scales_of_layers_cannot_follow_a_layer_that_is_frozen_after_it_has_moved():
    sub = SubspaceModule(freezing("on_train_batch_start")(), 7, structure="layers")
    with pytest.raises(ValueError, match=r"body.weight was frozen or unfrozen while training"):
        trainer().fit(sub, batches())
    sub = SubspaceModule(freezing("on_fit_start", last=100)(), 7, structure="layers")
    trainer().fit(sub, batches())
    assert torch.equal(sub.module.body.weight, sub.theta0()["body.weight"])
    assert moved(sub) > 1e-3
