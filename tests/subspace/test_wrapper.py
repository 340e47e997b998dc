"""The module inside goes on as it was: its steps, hooks, names of logs, hyper-parameters and data."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Classifier, Convolutional, Late, train_loader, trainer, val_loader
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import made
from torch import nn

from lightning_sketch.subspace import SubspaceModule


def test_what_the_module_does_it_goes_on_doing():
    """This covers names of logs, metrics, hooks, steps without batch_idx, hyper-parameters, train mode and buffers."""
    sub = SubspaceModule(made(Convolutional), 64, scale=10)
    before = {name: buffer.clone() for name, buffer in sub.module.named_buffers()}
    run = trainer(max_steps=16)
    run.fit(sub, train_loader(), val_loader())
    assert {"train_loss", "val_acc", "val_loss"} <= run.callback_metrics.keys()
    assert sub.module.calls == ["on_train_epoch_end"] * 2
    assert (sub.hparams_initial["lr"], sub.hparams_initial["subspace/dim"]) == (3e-3, 64)
    assert any(
        not torch.equal(before[name], buffer) for name, buffer in sub.module.named_buffers() if "running" in name
    )
    assert not sub.eval().module.net[4].training
    assert sub.train().module.net[4].training
    assert sub.net is sub.module.net
    images, _ = next(iter(val_loader()))
    assert torch.equal(sub.eval()(images), sub.module(images))
    assert sum(p.numel() for p in sub.parameters() if p.requires_grad) == 64
    assert [name for name, p in sub.named_parameters() if p.requires_grad] == ["w"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_its_graph_can_be_logged(tmp_path):
    module = made()
    module.example_input_array = torch.zeros(2, 64)
    logger = pl.loggers.TensorBoardLogger(tmp_path, log_graph=True)
    run = trainer(logger=logger)
    run.fit(SubspaceModule(module, 16, scale=10), train_loader())
    assert run.global_step == 8


NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


@pytest.mark.parametrize("of_trainer", NAMESPACES)
@pytest.mark.parametrize("of_module", NAMESPACES)
def test_both_namespaces(of_module, of_trainer):
    """Also a module of one in a Trainer of the other, which refuses it as it is."""
    lightning, others = pytest.importorskip(of_module), pytest.importorskip(of_trainer)

    class Plain(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 10)

        def training_step(self, batch):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            assert self.trainer.training
            return {"loss": loss, "more": 1}

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def on_before_optimizer_step(self, optimizer):
            self.log_dict({f"norm/{name}": p.grad.norm() for name, p in self.net.named_parameters()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    run = others.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    sub = SubspaceModule(Plain(), 16)
    assert isinstance(sub, lightning.LightningModule)
    run.fit(sub, train_loader(), val_loader())
    assert {"train_loss", "val_loss", "norm/bias"} <= run.callback_metrics.keys()
    assert sub.w.norm() > 0
    assert isinstance(sub.materialize(), Plain)


def takes_all(self, *args):
    return Classifier.training_step(self, *args)


def takes_one(self, batch, /):
    return Classifier.training_step(self, batch, 0)


@pytest.mark.parametrize("step", [takes_all, takes_one])
def test_a_step_takes_what_it_can(step):
    sub = SubspaceModule(made(type("Model", (Classifier,), {"training_step": step})), 16, scale=10)
    trainer(max_steps=1).fit(sub, train_loader())
    assert sub.w.count_nonzero() == 16


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_skipped():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    sub = SubspaceModule(made(Skips), 16, scale=10)
    trainer(max_epochs=1, max_steps=-1).fit(sub, train_loader())
    assert sub.w.norm() > 0


class Returns(Classifier):
    """A module whose step returns a dict."""

    returned = ("loss", "more")

    def training_step(self, batch, batch_idx):
        return {name: super(Returns, self).training_step(batch, batch_idx) for name in self.returned}


def test_what_a_step_returns_beside_its_loss_is_handed_on():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(set(outputs))

    trainer(Watch(), max_steps=1).fit(SubspaceModule(made(Returns), 16, scale=10), train_loader())
    assert seen == [{"loss", "more"}]


def test_a_dict_without_a_loss_is_refused_by_lightning():
    model = made(type("Model", (Returns,), {"returned": ("more",)}))
    with pytest.raises(MisconfigurationException, match="'loss' key needs to be present"):
        trainer(max_steps=1).fit(SubspaceModule(model, 16, scale=10), train_loader())


def test_names_of_the_wrapper_may_be_names_in_the_module():
    class Same(Classifier):
        def __init__(self):
            super().__init__()
            self.w, self.weights, self.blocks, self.n = nn.Linear(64, 10), [1], 3, 7

        def forward(self, images):
            assert (self.n, self.blocks, self.weights) == (7, 3, [1])
            return self.net(images) + self.w(images)

    for options in ({}, {"max_dim": 32}):
        sub = SubspaceModule(Same(), 16, scale=10, **options)
        trainer().fit(sub, train_loader())
        assert sub.coordinates().norm() > 0
        assert isinstance(sub.materialize().w, nn.Linear)


def test_configure_model_is_called_again_and_the_start_stays():
    """Lightning calls it at every fit and validation; by then the weights are not the initial ones."""
    sub = SubspaceModule(made(Late), 16, scale=10)
    trainer().fit(sub, train_loader())
    start = [tensor.clone() for tensor in sub.theta0().values()]
    trainer().validate(sub, val_loader(), verbose=False)
    trainer(max_steps=2).fit(sub, train_loader())
    assert all(torch.equal(one, same) for one, same in zip(start, sub.theta0().values(), strict=True))
    moved = torch.cat([(p - t).flatten() for p, t in zip(sub.weights.parameters(), start, strict=True)])
    assert torch.allclose(moved.detach(), sub.directions.rmatvec(sub.w.detach()), atol=1e-5)


def test_a_module_that_could_make_layers_and_has_them_is_wrapped_at_once():
    class Model(Classifier):
        def configure_model(self):
            pass

    assert SubspaceModule(made(Model), 8).n == 64 * 16 + 16 + 16 * 10 + 10


def test_layers_that_come_after_the_wrapping_are_refused():
    class TooLate(Classifier):
        def setup(self, stage):
            self.head = nn.Linear(10, 10)

    with pytest.raises(MisconfigurationException, match=r"head.weight, head.bias became trainable.*configure_model"):
        trainer().fit(SubspaceModule(made(TooLate), 16), train_loader())
    sub = SubspaceModule(made(TooLate), 16, others="full", scale=10)
    trainer().fit(sub, train_loader())


def test_a_log_of_the_modules_own():
    class Prefixed(Classifier):
        def log(self, name, *args, **kwargs):
            super().log(f"net/{name}", *args, **kwargs)

    run = trainer()
    run.fit(SubspaceModule(made(Prefixed), 16, scale=10), train_loader(), val_loader())
    assert {"net/train_loss", "net/val_acc"} <= run.callback_metrics.keys()
    assert not {"train_loss", "val_acc"} & run.callback_metrics.keys()


class Rated(Classifier):
    """A module whose learning rate is an attribute, not a hyper-parameter."""

    def __init__(self):
        super().__init__()
        self.rate, self.batch_size = 3e-3, 5

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.rate)

    def train_dataloader(self):
        return train_loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return val_loader()


@pytest.mark.parametrize(("kind", "name"), [(Rated, "rate"), (Classifier, "lr")])
def test_lr_find_sets_the_rate_of_the_module(kind, name, tmp_path):
    sub = SubspaceModule(made(kind), 16, scale=10)
    run = trainer(max_steps=2, default_root_dir=tmp_path)
    data = {} if kind is Rated else {"train_dataloaders": train_loader()}
    found = Tuner(run).lr_find(sub, **data, attr_name=name, num_training=40, min_lr=1e-4, max_lr=1e-2)
    held = sub.module.rate if kind is Rated else sub.module.hparams.lr
    assert held == found.suggestion() != 3e-3
    run.fit(sub, **data)
    assert run.optimizers[0].param_groups[0]["lr"] == held


@pytest.mark.slow
def test_the_batch_size_finder_sets_that_of_the_module(tmp_path):
    sub = SubspaceModule(made(Rated), 16, scale=10)
    run = trainer(max_steps=2, default_root_dir=tmp_path)
    assert Tuner(run).scale_batch_size(sub, max_trials=3, steps_per_trial=1) == sub.module.batch_size == 8


def test_hyper_parameters_are_seen_together_and_set_where_they_are():
    class Seeded(Classifier):
        def __init__(self, seed: int = 7, width: int = 16, lr: float = 3e-3):
            super().__init__(width, lr)
            self.save_hyperparameters()

    sub = SubspaceModule(made(Seeded), 16, seed=1, scale=10)
    assert (sub.hparams.seed, sub.hparams["dim"], sub.hparams.lr) == (1, 16, 3e-3)
    sub.hparams["lr"], sub.hparams.seed, sub.hparams.note = 0.1, 2, "here"
    assert (sub.module.hparams.lr, sub.module.hparams.seed) == (0.1, 7)
    assert (sub.hparams.seed, sub.hparams.note) == (2, "here")
    assert not {"dim", "note"} & sub.module.hparams.keys()
    sub.hparams.update({"lr": 0.2}, seed=3)
    assert (sub.module.hparams.lr, sub.module.hparams.seed, sub.hparams.seed) == (0.2, 7, 3)


def test_hyper_parameters_that_were_asked_for_once_show_what_is_set():
    hparams = SubspaceModule(made(), 16).hparams
    hparams["lr"] = 0.1
    assert hparams["lr"] == hparams.lr == 0.1


def test_attributes_are_set_where_they_are():
    sub = SubspaceModule(made(Rated), 16)
    sub.rate, sub.others, sub.mine = 0.1, "full", 5
    assert (sub.module.rate, sub.others, sub.mine) == (0.1, "full", 5)
    assert not {"others", "mine"} & vars(sub.module).keys()


def test_data_may_have_hyper_parameters_of_the_same_name(tmp_path):
    """Loggers refuse a name that module and data both have: the wrapper's own are logged with a prefix."""

    class Data(pl.LightningDataModule):
        def __init__(self, seed: int = 42, dim: int = 64):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return train_loader()

    logger = pl.loggers.CSVLogger(tmp_path)
    trainer(logger=logger).fit(SubspaceModule(made(), 16, scale=10), datamodule=Data())
    written = (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert "subspace/dim: 16" in written
    assert "seed: 42" in written


def test_numbers_of_numpy_are_integers_in_a_checkpoint(tmp_path, untyped):
    sub = SubspaceModule(made(), np.int64(16), seed=np.int64(1), scale=10)
    run = trainer()
    run.fit(sub, train_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["dim"] == 16


def test_the_module_says_how_strictly_it_loads():
    class Loose(Classifier):
        strict_loading = False

    sub = SubspaceModule(made(Loose), 16)
    assert not sub.strict_loading
    other = SubspaceModule(made(), 16)
    other.strict_loading = False
    assert not other.module.strict_loading


def test_layers_made_in_configure_model_join_those_that_were_there_before():
    class Partly(Classifier):
        def network(self, width):
            self.head = None
            return nn.Sequential(nn.Linear(64, width), nn.Tanh())

        def configure_model(self):
            if self.head is None:
                self.head = nn.Linear(16, 10)

        def forward(self, images):
            return self.head(self.net(images))

    sub = SubspaceModule(Partly(), 8)
    trainer().fit(sub, train_loader())
    assert sub.n == 64 * 16 + 16 + 16 * 10 + 10
    assert sub.dim == 8
    assert not torch.equal(sub.module.head.weight, sub.theta0()["head.weight"])
