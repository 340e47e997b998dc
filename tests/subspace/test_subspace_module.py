"""θ = θ₀ + Dᵀ w: gradients, steps, and a module inside that notices nothing."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Classifier, Convolutional, Late, Tied, train_loader, trainer, val_loader
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.subspace import SubspaceModule


def made(kind=Classifier, seed=0):
    pl.seed_everything(seed, verbose=False)
    return kind()


def flat(module, names):
    return torch.cat([dict(module.named_parameters())[name].detach().flatten() for name in names])


class Gradients(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([block.grad for block in pl_module.blocks]).clone())


def first_gradient(module, **options):
    watch = Gradients()
    trainer(watch, max_steps=1).fit(SubspaceModule(module, 24, seed=5, lr_scale=10, **options), train_loader())
    return watch.seen[0]


@pytest.mark.parametrize("kind", [Classifier, Tied])
def test_both_ways_give_the_gradient_of_the_loss(kind):
    """By dense matrices: D ∇L(θ₀), in float32."""
    module = made(kind)
    layout = Layout.of(module)
    directions = SubspaceModule(copy.deepcopy(module), 24, seed=5).directions
    images, labels = next(iter(train_loader()))
    gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), layout.parameters(module))
    expected = directions.as_matrix() @ torch.cat([g.flatten() for g in gradients])
    for options in ({}, {"implicit": True}):
        found = first_gradient(copy.deepcopy(module), **options)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.norm())


@pytest.mark.parametrize("sketch", KINDS)
def test_weights_follow_w(sketch):
    """After eight steps of Adam, for every kind: θ = θ₀ + Dᵀ w; both ways end alike."""
    module = made()
    ends = []
    for implicit in (False, True):
        sub = SubspaceModule(copy.deepcopy(module), 24, sketch, seed=1, lr_scale=10, implicit=implicit)
        trainer().fit(sub, train_loader())
        moved = flat(sub.module, sub.weights.layout.names) - flat(module, sub.weights.layout.names)
        assert torch.allclose(moved, sub.directions.rmatvec(sub.w.detach()), atol=1e-5)
        assert sub.w.norm() > 0.05
        ends.append(sub.w.detach())
    assert torch.allclose(*ends, rtol=1e-2, atol=1e-4)


def test_a_step_of_adam_has_one_length_for_all_dims():
    """‖Dᵀ w‖ = lr √n after one step, where w = ± lr; within √(2 / dim) four times over, for random directions."""
    for dim in (32, 128, 512):
        sub = SubspaceModule(made(), dim, lr_scale=10)
        trainer(max_steps=1).fit(sub, train_loader())
        moved = flat(sub.module, sub.weights.layout.names) - torch.cat([t.flatten() for t in sub.theta0().values()])
        assert moved.norm() == pytest.approx(0.03 * sub.n**0.5, rel=4 * (2 / dim) ** 0.5)


def test_dim_n_is_full_training():
    """Adam on w = θ - θ₀ takes the steps of Adam on θ."""
    module = made()
    plain = copy.deepcopy(module)
    trainer().fit(plain, train_loader())
    sub = SubspaceModule(module, Layout.of(module).n, lr_scale=1)
    trainer().fit(sub, train_loader())
    assert torch.allclose(flat(sub.module, sub.weights.layout.names), flat(plain, sub.weights.layout.names), atol=2e-5)


def test_what_the_module_does_it_goes_on_doing():
    """Names it logs under, metrics, hooks, steps that take no batch_idx, hyper-parameters, mode and buffers."""
    sub = SubspaceModule(made(Convolutional), 64, lr_scale=10)
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


def test_evaluation_is_at_the_weights_that_w_says_whoever_wrote_it():
    sub = SubspaceModule(made(), 32, lr_scale=10)
    before = trainer().validate(sub, val_loader(), verbose=False)[0]["val_loss"]
    sub.w.data.add_(0.3)  # no version is counted
    after = trainer().validate(sub, val_loader(), verbose=False)[0]["val_loss"]
    assert after != before
    plain = sub.materialize()
    assert trainer().validate(plain, val_loader(), verbose=False)[0]["val_loss"] == pytest.approx(after)


def test_materialized_is_a_plain_module_that_trains_on():
    sub = SubspaceModule(made(Convolutional), 32, lr_scale=10)
    trainer().fit(sub, train_loader())
    plain = sub.materialize()
    assert type(plain) is Convolutional
    assert all(p.requires_grad for p in plain.parameters())
    assert all(p.requires_grad for p in SubspaceModule(made(), 8, parameters="net.2.*").materialize().parameters())
    trainer(max_steps=2).fit(plain, train_loader())
    assert not torch.equal(plain.net[1].weight, sub.module.net[1].weight)
    trainer(max_steps=2).fit(sub, train_loader())  # and so does the former


def test_tied_weights_stay_tied():
    sub = SubspaceModule(made(Tied), 32, lr_scale=10)
    trainer().fit(sub, train_loader())
    assert sub.module.net[2].weight is sub.module.net[6].weight
    assert sub.n == sum(p.numel() for p in made(Tied).parameters())


def test_accumulation_is_a_larger_batch():
    ends = []
    for size, accumulate in ((64, 1), (32, 2)):
        sub = SubspaceModule(made(), 32, lr_scale=10)
        trainer(max_steps=4, accumulate_grad_batches=accumulate).fit(sub, train_loader(batch_size=size))
        ends.append(sub.w.detach())
    assert torch.allclose(*ends, rtol=1e-3, atol=1e-5)


def test_clipping_is_of_the_gradient_of_w():
    watch = Gradients()

    class SGD(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    sub = SubspaceModule(made(SGD), 32)
    trainer(watch, max_steps=1, gradient_clip_val=0.01).fit(sub, train_loader())
    assert watch.seen[0].norm() > 0.02
    assert float(sub.w.detach().norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Classifier):
        def forward(self, images):
            hidden = self.net[:2](images)
            return checkpoint(self.net[2], hidden, use_reentrant=reentrant)

    expected = first_gradient(made())
    assert torch.allclose(first_gradient(made(Checkpointed)), expected, rtol=1e-5, atol=1e-7)


def test_compiled_inside():
    class Compiled(Classifier):
        def network(self, width):
            return torch.compile(super().network(width), backend="eager")

    assert torch.allclose(first_gradient(made(Compiled)), first_gradient(made()), rtol=1e-5, atol=1e-7)


def test_compiled_as_a_whole():
    """In a process of its own: what checks types in the tests cannot be compiled."""
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "compiled.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, inside, outside = (torch.tensor(found) for found in json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(inside, plain, rtol=1e-5, atol=1e-7)
    assert torch.allclose(outside, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("implicit", [True, False])
def test_its_graph_can_be_logged(implicit, tmp_path):
    module = made()
    module.example_input_array = torch.zeros(2, 64)
    logger = pl.loggers.TensorBoardLogger(tmp_path, log_graph=True)
    run = trainer(logger=logger)
    run.fit(SubspaceModule(module, 16, lr_scale=10, implicit=implicit), train_loader())
    assert run.global_step == 8


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision):
    """Gradients of 8 bits; θ follows w to the rounding of its own type."""
    sub = SubspaceModule(made(), 64, lr_scale=10)
    run = trainer(precision=precision, max_steps=80)
    run.fit(sub, train_loader(), val_loader())
    assert run.callback_metrics["val_acc"] > 0.4
    assert sub.module.net[0].weight.dtype == (torch.float32 if precision == "bf16-mixed" else torch.bfloat16)


def test_chosen_parameters_move_and_the_others_stay():
    module = made()
    names = [name for name, _ in module.named_parameters()]
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    sub = SubspaceModule(module, 10, parameters="net.2.*", lr_scale=10)
    assert sub.n == 10 * 16 + 10
    trainer().fit(sub, train_loader())
    moved = {name for name in names if not torch.equal(before[name], dict(module.named_parameters())[name])}
    assert moved == {"net.2.weight", "net.2.bias"}


def test_the_others_can_be_trained_in_full():
    """As by their own optimizer: at its rate, not at that of w."""
    rates = {}

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for group in pl_module.groups([optimizer]):
                for p in group["params"]:
                    rates[id(p)] = group["lr"]

    sub = SubspaceModule(made(), 16, parameters="net.0.*", others="full", lr_scale=10)
    bias = sub.module.net[2].bias
    before = bias.detach().clone()
    trainer(Watch()).fit(sub, train_loader())
    assert not torch.equal(before, bias)
    assert rates[id(bias)] == pytest.approx(3e-3)
    assert rates[id(sub.w)] == pytest.approx(3e-2)
    assert "module.net.2.bias" in sub.state_dict()


def test_parameters_smaller_than_dim():
    sub = SubspaceModule(made(), 512, lr_scale=10)  # of biases of 10 and 16
    trainer().fit(sub, train_loader())
    assert sub.w.count_nonzero() == 512


def test_a_copy_is_a_module_of_its_own():
    sub = SubspaceModule(made(), 16, lr_scale=10)
    twin = copy.deepcopy(sub)
    run = trainer()
    run.fit(twin, train_loader(), val_loader())
    assert sub.w.norm() == 0
    assert twin.w.norm() > 0
    assert "val_acc" in run.callback_metrics


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_both_namespaces(namespace):
    lightning = pytest.importorskip(namespace)

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

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    run = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    sub = SubspaceModule(Plain(), 16)
    assert isinstance(sub, lightning.LightningModule)
    run.fit(sub, train_loader(), val_loader())
    assert {"train_loss", "val_loss"} <= run.callback_metrics.keys()
    assert sub.w.norm() > 0


class ByHand(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dim": 0}, ValueError, "dim=0"),
        ({"dim": 10**6}, ValueError, r"dim=1000000; dim=n trains all"),
        ({"parameters": "head.*"}, ValueError, "no trainable parameter matches 'head.*'"),
        ({"sketch": "srht"}, ValueError, "unknown kind of sketch 'srht'"),
        ({"others": "half"}, ValueError, "others='half'"),
        ({"lr_scale": 0}, ValueError, "lr_scale > 0"),
        ({"max_dim": 8}, ValueError, "max_dim=8"),
        ({"module": ByHand}, MisconfigurationException, "optimizes by hand"),
        ({"module": lambda: nn.Linear(2, 2)}, TypeError, "wraps a LightningModule, got Linear"),
        ({"module": lambda: SubspaceModule(Classifier(), 4)}, TypeError, "got SubspaceModule; .*materialize"),
        ({"module": lambda: SubspaceModule(Classifier(), 4).module}, ValueError, "in a SubspaceModule .*deepcopy"),
        ({"module": pl.LightningModule}, ValueError, "LightningModule has no trainable parameters.*setup is too late"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(untyped, options, error, said):
    module = options.get("module", Classifier)()
    with pytest.raises(error, match=said):
        SubspaceModule(module, **{"dim": 16, **{k: v for k, v in options.items() if k != "module"}})


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_skipped():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    sub = SubspaceModule(made(Skips), 16, lr_scale=10)
    trainer(max_epochs=1, max_steps=-1).fit(sub, train_loader())
    assert sub.w.norm() > 0


def test_names_of_the_wrapper_may_be_names_in_the_module():
    class Same(Classifier):
        def __init__(self):
            super().__init__()
            self.w, self.weights, self.blocks, self.n = nn.Linear(64, 10), [1], 3, 7

        def forward(self, images):
            assert (self.n, self.blocks, self.weights) == (7, 3, [1])
            return self.net(images) + self.w(images)

    for options in ({}, {"max_dim": 32}):
        sub = SubspaceModule(Same(), 16, lr_scale=10, **options)
        trainer().fit(sub, train_loader())
        assert sub.coordinates().norm() > 0
        assert isinstance(sub.materialize().w, nn.Linear)


def test_configure_model_is_called_again_and_the_start_stays():
    """Lightning calls it at every fit and validation; by then the weights are not those at the start."""
    sub = SubspaceModule(made(Late), 16, lr_scale=10)
    trainer().fit(sub, train_loader())
    start = [tensor.clone() for tensor in sub.theta0().values()]
    trainer().validate(sub, val_loader(), verbose=False)
    trainer(max_steps=2).fit(sub, train_loader())
    assert all(torch.equal(one, same) for one, same in zip(start, sub.theta0().values(), strict=True))
    moved = torch.cat([(p - t).flatten() for p, t in zip(sub.weights.parameters(), start, strict=True)])
    assert torch.allclose(moved.detach(), sub.directions.rmatvec(sub.w.detach()), atol=1e-5)


def test_a_log_of_the_modules_own():
    class Prefixed(Classifier):
        def log(self, name, *args, **kwargs):
            super().log(f"net/{name}", *args, **kwargs)

    run = trainer()
    run.fit(SubspaceModule(made(Prefixed), 16, lr_scale=10), train_loader(), val_loader())
    assert {"net/train_loss", "net/val_acc"} <= run.callback_metrics.keys()
    assert not {"train_loss", "val_acc"} & run.callback_metrics.keys()


class Rated(Classifier):
    """Its rate is an attribute, not a hyper-parameter."""

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
    sub = SubspaceModule(made(kind), 16, lr_scale=10)
    run = trainer(max_steps=2, default_root_dir=tmp_path)
    data = {} if kind is Rated else {"train_dataloaders": train_loader()}
    found = Tuner(run).lr_find(sub, **data, attr_name=name, num_training=40, min_lr=1e-4, max_lr=1e-2)
    held = sub.module.rate if kind is Rated else sub.module.hparams.lr
    assert held == found.suggestion() != 3e-3
    run.fit(sub, **data)
    assert run.optimizers[0].param_groups[0]["lr"] == held


def test_the_batch_size_finder_sets_that_of_the_module(tmp_path):
    sub = SubspaceModule(made(Rated), 16, lr_scale=10)
    run = trainer(max_steps=2, default_root_dir=tmp_path)
    assert Tuner(run).scale_batch_size(sub, max_trials=3, steps_per_trial=1) == sub.module.batch_size == 8


def test_hyper_parameters_are_seen_together_and_set_where_they_are():
    class Seeded(Classifier):
        def __init__(self, seed: int = 7, width: int = 16, lr: float = 3e-3):
            super().__init__(width, lr)
            self.save_hyperparameters()

    sub = SubspaceModule(made(Seeded), 16, seed=1, lr_scale=10)
    assert (sub.hparams.seed, sub.hparams["dim"], sub.hparams.lr) == (1, 16, 3e-3)
    sub.hparams["lr"], sub.hparams.seed, sub.hparams.note = 0.1, 2, "here"
    assert (sub.module.hparams.lr, sub.module.hparams.seed) == (0.1, 7)
    assert (sub.hparams.seed, sub.hparams.note) == (2, "here")
    assert not {"dim", "note"} & sub.module.hparams.keys()
    sub.hparams.update({"lr": 0.2}, seed=3)
    assert (sub.module.hparams.lr, sub.module.hparams.seed, sub.hparams.seed) == (0.2, 7, 3)


def test_attributes_are_set_where_they_are():
    sub = SubspaceModule(made(Rated), 16)
    sub.rate, sub.lr_scale, sub.mine = 0.1, 3.0, 5
    assert (sub.module.rate, sub.lr_scale, sub.mine) == (0.1, 3.0, 5)
    assert not {"lr_scale", "mine"} & vars(sub.module).keys()


def test_layers_that_come_after_the_wrapping_are_refused():
    class TooLate(Classifier):
        def setup(self, stage):
            self.head = nn.Linear(10, 10)

    with pytest.raises(MisconfigurationException, match=r"head.weight, head.bias became trainable.*configure_model"):
        trainer().fit(SubspaceModule(made(TooLate), 16), train_loader())
    sub = SubspaceModule(made(TooLate), 16, others="full", lr_scale=10)
    trainer().fit(sub, train_loader())


def test_data_may_have_hyper_parameters_of_the_same_name(tmp_path):
    """Loggers refuse a name that module and data both have: the wrapper's own are logged with a prefix."""

    class Data(pl.LightningDataModule):
        def __init__(self, seed: int = 42, dim: int = 64):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return train_loader()

    logger = pl.loggers.CSVLogger(tmp_path)
    trainer(logger=logger).fit(SubspaceModule(made(), 16, lr_scale=10), datamodule=Data())
    written = (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert "subspace/dim: 16" in written
    assert "seed: 42" in written


def test_numbers_of_numpy_are_integers_in_a_checkpoint(tmp_path, untyped):
    sub = SubspaceModule(made(), np.int64(16), seed=np.int64(1), lr_scale=10)
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
