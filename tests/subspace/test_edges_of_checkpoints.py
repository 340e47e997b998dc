"""Checkpoints of a module in a subspace, what holds it, and what is let through to it."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from edges import Given, made, nested, searched
from nets import Classifier, Tied, train_loader, trainer
from torch import nn

from lightning_sketch.subspace import SubspaceModule


def test_what_the_module_saves_in_a_checkpoint_it_finds_there(tmp_path):
    class Model(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 5

        def on_load_checkpoint(self, checkpoint):
            self.own = checkpoint["own"]

    run = trainer(max_steps=1)
    run.fit(SubspaceModule(made(Model), 16, lr_scale=10), train_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    sub = SubspaceModule(made(Model), 16, lr_scale=10)
    trainer(max_steps=1).fit(sub, train_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert sub.module.own == 5


def takes_all(self, *args):
    return Classifier.training_step(self, *args)


def takes_one(self, batch, /):
    return Classifier.training_step(self, batch, 0)


@pytest.mark.parametrize("step", [takes_all, takes_one])
def test_a_step_takes_what_it_can(step):
    sub = SubspaceModule(made(type("Model", (Classifier,), {"training_step": step})), 16, lr_scale=10)
    trainer(max_steps=1).fit(sub, train_loader())
    assert sub.w.count_nonzero() == 16


def test_hyper_parameters_that_were_asked_for_once_show_what_is_set():
    hparams = SubspaceModule(made(), 16).hparams
    hparams["lr"] = 0.1
    assert hparams["lr"] == hparams.lr == 0.1


@pytest.mark.parametrize("save_theta0", [False, True])
def test_what_holds_a_subspace_saves_and_loads_what_it_would_by_itself(save_theta0):
    options = {"parameters": "net.0.*", "save_theta0": save_theta0, "lr_scale": 10}
    sub, other = SubspaceModule(made(), 16, **options), SubspaceModule(made(seed=int(save_theta0)), 16, **options)
    trainer(max_steps=2).fit(sub, train_loader())
    state = nn.ModuleDict({"a": sub}).state_dict()
    assert state.keys() == {f"a.{name}" for name in sub.state_dict()}
    assert any("theta0" in name for name in state) == save_theta0
    nn.ModuleDict({"a": other}).load_state_dict(state)
    assert all(torch.equal(one, same) for one, same in zip(sub.parameters(), other.parameters(), strict=True))


def test_theta0_that_is_loaded_is_where_the_weights_are_though_w_is_the_same():
    """Of two that have not been trained w is zero."""
    sub, other = (SubspaceModule(made(seed=seed), 16, save_theta0=True) for seed in (0, 1))
    other.load_state_dict(sub.state_dict())
    assert all(torch.equal(one, same) for one, same in zip(sub.parameters(), other.parameters(), strict=True))


def test_a_wrapper_can_be_without_memory():
    assert SubspaceModule(made(), 16).to("meta").w.is_meta


def test_what_the_user_froze_stays_frozen_and_all_of_it_is_refused():
    class Model(Classifier):
        def configure_model(self):
            pass

    module = made(Model)
    module.net[0].weight.requires_grad_(False)
    sub = SubspaceModule(module, 16, lr_scale=10)
    assert [name for name, p in sub.materialize().named_parameters() if not p.requires_grad] == ["net.0.weight"]
    with pytest.raises(ValueError, match=r"no trainable parameters.*deepcopy"):
        SubspaceModule(sub.module, 16)


def test_every_step_of_a_search_is_at_the_present_w():
    """Also the one after a validation, which is at the mean."""
    expected = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps = pl_module.directions.rmatvec(pl_module.coordinates().detach())
            expected.append(torch.cat([tensor.flatten() for tensor in pl_module.theta0().values()]) + steps)

    class Model(Given):
        def training_step(self, batch, batch_idx):
            found = torch.cat([p.detach().flatten() for p in self.net.parameters()])
            assert torch.allclose(found, expected[-1], atol=1e-6)
            return super().training_step(batch, batch_idx)

    searched([], Watch(), steps=12, sub=nested(Model), delta=0)
    assert len(expected) == 12


def test_what_is_trained_in_full_is_saved_though_it_is_as_at_the_start():
    options = {"parameters": "net.0.*", "others": "full"}
    sub = SubspaceModule(made(), 8, **options)
    module = made()
    nn.init.zeros_(module.net[2].weight)
    (other := SubspaceModule(module, 8, **options)).load_state_dict(sub.state_dict())
    assert torch.equal(other.net[2].weight, sub.net[2].weight)


class Compiled(Classifier):
    """In part: what is compiled has names of its own."""

    def network(self, width):
        return torch.compile(super().network(width), backend="eager")


@pytest.mark.parametrize("save_theta0", [False, True])
@pytest.mark.parametrize("kind", [Tied, Compiled])
def test_a_weight_that_moves_is_saved_under_none_of_its_names(kind, save_theta0):
    options = {"lr_scale": 10, "save_theta0": save_theta0}
    sub, other = SubspaceModule(made(kind), 16, **options), SubspaceModule(made(kind), 16, **options)
    before = copy.deepcopy(sub.state_dict())
    trainer(max_steps=2).fit(sub, train_loader())
    assert {name for name in sub.state_dict() if not name.startswith("theta0.")} == {"w", "_extra_state"}
    for state, expected in ((sub.state_dict(), sub), (before, SubspaceModule(made(kind), 16))):
        other.load_state_dict(state)
        assert all(torch.equal(one, same) for one, same in zip(expected.parameters(), other.parameters(), strict=True))
