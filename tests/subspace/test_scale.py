"""D is multiplied by a scale; with lr_scale, it has the effect of another learning rate of w; checkpoints have it."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import trainer
from projected import Net, batches
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch.subspace import SubspaceModule


def fitted(configure, steps=8, **options):
    class Model(Net):
        def configure_optimizers(self):
            return configure(self.parameters())

    pl.seed_everything(7, verbose=False)
    sub = SubspaceModule(Model(), 7, **options)
    trainer(max_steps=steps).fit(sub, batches())
    return sub


def weights(sub):
    return torch.cat([p.detach().flatten() for p in sub.weights.parameters()])


FAMILIES = [
    (optim.Adam, {}, 1e-6),  # Adam adds 1e-8 to the root of its mean of squares, which grow with the scale
    (optim.AdamW, {"weight_decay": 0.0}, 1e-6),
    (optim.NAdam, {}, 1e-6),
    (optim.Adamax, {}, 1e-6),
    (optim.Adam, {"amsgrad": True}, 1e-6),
    (optim.SGD, {}, 1e-12),
    (optim.SGD, {"momentum": 0.9, "nesterov": True}, 1e-12),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.5}, 1e-12),
]


@pytest.mark.parametrize(("kind", "options", "rtol"), FAMILIES)
@pytest.mark.parametrize("factor", [0.3, 10])
def test_lr_scale_has_the_effect_of_another_rate(kind, options, rtol, factor):
    """θ is that of w trained at the multiplied rate, along directions that are not scaled."""
    sub = fitted(lambda params: kind(params, lr=2e-3, **options), lr_scale=factor)
    same = fitted(lambda params: None, optimizer_fn=lambda params: kind(params, lr=2e-3 * factor, **options))
    start = torch.cat([tensor.flatten() for tensor in sub.theta0().values()])
    moved = (weights(same) - start).norm()
    assert (weights(sub) - weights(same)).norm() <= rtol * moved
    assert moved > 1e-3
    assert sub.trainer.optimizers[0].param_groups[0]["lr"] == 2e-3
    before = sub.w.detach().clone()
    trainer(max_steps=1).fit(sub, batches())  # the scale of a second fit is the same
    assert not torch.equal(sub.w, before)
    assert (sub.w - before).norm() < before.norm()


@pytest.mark.parametrize("kind", [optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.RAdam])
def test_lr_scale_is_refused_for_other_optimizers(kind):
    """RAdam is of Adam's family, but takes its first five steps as SGD does."""
    with pytest.raises(MisconfigurationException, match=f"not for {kind.__name__}; pass scale=..., .* optimizer_fn"):
        fitted(lambda params: kind(params, lr=1e-3), lr_scale=3)
    assert fitted(lambda params: kind(params, lr=1e-3), lr_scale=1).w.any()
    assert fitted(lambda params: kind(params, lr=1e-3), scale=3).w.any()


def test_clipping_is_in_units_of_gradients_of_the_weights():
    """With the threshold that full training needs: w moves by at most the threshold times the scale."""
    norms = []
    for scale in (1.0, 100.0):
        pl.seed_everything(7, verbose=False)
        sub = SubspaceModule(Net(), 7, scale=scale, optimizer_fn=lambda params: optim.SGD(params, lr=1.0))
        trainer(max_steps=1, gradient_clip_val=1e-3).fit(sub, batches())
        norms.append(float(sub.w.detach().norm()) / scale)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_a_checkpoint_contains_the_scale(tmp_path):
    sub = fitted(lambda params: optim.Adam(params, lr=2e-3), scale=3)
    sub.trainer.save_checkpoint(tmp_path / "a.ckpt")
    pl.seed_everything(7, verbose=False)
    found = SubspaceModule.load_from_checkpoint(tmp_path / "a.ckpt", module=Net())
    assert found.directions.scale == 3
    assert torch.equal(weights(found), weights(sub))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_a_checkpoint_goes_into_a_module_of_another_scale(scale, tmp_path):
    """The weights are the same, w is in units of the new scale, and so is the optimizer's state."""
    sub = fitted(lambda params: optim.Adam(params, lr=2e-3), scale=3)
    sub.trainer.save_checkpoint(tmp_path / "a.ckpt")
    seen = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.update({name: v.clone() for name, v in trainer.optimizers[0].state[pl_module.w].items()})
            seen["theta"], seen["w"] = weights(pl_module), pl_module.w.detach().clone()

    pl.seed_everything(7, verbose=False)
    other = SubspaceModule(Net(), 7, scale=scale, optimizer_fn=lambda params: optim.Adam(params, lr=2e-3))
    trainer(Watch(), max_steps=9, limit_train_batches=1).fit(other, batches(), ckpt_path=tmp_path / "a.ckpt")
    state = sub.trainer.optimizers[0].state[sub.w]
    assert torch.allclose(seen["theta"], weights(sub), atol=1e-12)
    assert torch.allclose(seen["w"] * scale, sub.w.detach() * 3)
    assert torch.allclose(seen["exp_avg"] / scale, state["exp_avg"] / 3)
    assert torch.allclose(seen["exp_avg_sq"] / scale**2, state["exp_avg_sq"] / 3**2)
    assert seen["step"] == state["step"] == 8


class OfFirstVersion(pl.LightningModule):
    """The module that wrote the checkpoints in the folder first_version, after the first of two epochs.

    They contain its weights at the end of each epoch, as `ends`.
    """

    def __init__(self, kind="adam"):
        super().__init__()
        self.save_hyperparameters()
        self.body, self.last = nn.Linear(5, 6), nn.Linear(6, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.arange(1.0, p.numel() + 1).sin().view_as(p) / 2)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.last(torch.tanh(self.body(batch[0]))), batch[1])

    def configure_optimizers(self):
        if self.hparams.kind == "adam":
            return optim.Adam(self.parameters(), lr=3e-3)
        return optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_checkpoint_of_the_first_version_gives_the_same_weights_and_goes_on_as_there(kind):
    """In version 0.1, lr_scale=10 multiplied the rate of w. One of the two modules can be doubled."""
    path = Path(__file__).with_name("first_version") / f"{kind}.ckpt"
    written = torch.load(path, weights_only=True)
    given = {name: written["hyper_parameters"][name] for name in ("lr_scale", "seed", "max_dim")}
    assert given["lr_scale"] == 10
    found, sub = (SubspaceModule(OfFirstVersion(kind), 7, **given) for _ in range(2))
    found.load_state_dict(written["state_dict"])
    assert torch.allclose(weights(found), written["ends"][0], atol=1e-6)
    x = torch.arange(240.0).sin().view(48, 5)
    data = DataLoader(TensorDataset(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].cos()], 1)), batch_size=6)
    trainer(max_epochs=2, max_steps=-1).fit(sub, data, ckpt_path=path)
    assert torch.allclose(weights(sub), written["ends"][1], atol=1e-5)
    assert not torch.allclose(weights(found), written["ends"][1], atol=1e-2)
