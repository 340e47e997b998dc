"""A doubling of dim changes no weight, and the optimizer continues as if dim had always been so large."""

import pytest
import pytorch_lightning as pl
import torch
from nets import Classifier, train_loader, trainer
from small_searches import Scripted, made, searched
from torch import nn

from lightning_sketch.subspace import SubspaceModule
from lightning_sketch.subspace._doubling import carry_over


def test_a_doubling_leaves_the_weights_and_rescales_w():
    sub = SubspaceModule(Classifier(), 8, max_dim=64, scale=10)
    trainer(max_steps=4).fit(sub, train_loader())
    before = torch.cat([p.flatten() for p in sub.weights.parameters()]), sub.coordinates().detach()
    sub.double_dim()
    sub.ready()
    assert torch.allclose(torch.cat([p.flatten() for p in sub.weights.parameters()]), before[0], atol=1e-6)
    assert torch.allclose(sub.coordinates()[:8], before[1] * 2**0.5)
    assert torch.equal(sub.coordinates()[8:], torch.zeros(8))
    assert [len(block) for block in sub.blocks] == [8, 8, 16, 32]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    ],
)
def test_the_state_is_that_of_gradients_that_were_always_so_small(kind, options):
    """An optimizer that saw √½ of each gradient has the same state as one that is carried over."""
    torch.manual_seed(0)
    gradients = torch.randn(5, 6)
    w, same = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
    fresh = nn.Parameter(torch.zeros(6))
    optimizer, other = kind([w, fresh], lr=0.1, **options), kind([same], lr=0.1, **options)
    for gradient in gradients:
        w.grad, same.grad, fresh.grad = gradient.clone(), gradient * 0.5**0.5, torch.zeros(6)
        optimizer.step()
        other.step()
    carry_over(optimizer, [w], [fresh], 0.5**0.5)
    for name, value in other.state[same].items():
        assert torch.allclose(torch.as_tensor(optimizer.state[w][name]), torch.as_tensor(value), rtol=1e-5), name
    assert fresh not in optimizer.state


def test_the_state_of_the_optimizer_shrinks_with_the_gradient():
    """D g shrinks by √½ as the directions double, and so does Adam's mean; its mean of squares shrinks by ½."""
    seen = {}

    class Watch(pl.Callback):
        def note(self, trainer, pl_module, when):
            state = trainer.optimizers[0].state.get(pl_module.blocks[0])
            if state and trainer.global_step == 8:
                seen[when] = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.note(trainer, pl_module, "before")

        def on_validation_end(self, trainer, pl_module):
            self.note(trainer, pl_module, "after")

    searched([0.1, 0.1], Watch(), steps=9)
    assert torch.allclose(seen["after"]["exp_avg"], seen["before"]["exp_avg"] * 0.5**0.5)
    assert torch.allclose(seen["after"]["exp_avg_sq"], seen["before"]["exp_avg_sq"] / 2)


def test_a_state_of_unknown_kind_is_deleted():
    w = nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.Adadelta([w])
    w.grad = torch.ones(6)
    optimizer.step()
    carry_over(optimizer, [w], [], 0.5**0.5)
    assert w not in optimizer.state


def test_a_state_that_is_not_of_one_block_alone_is_deleted():
    """LBFGS stores the state of all parameters under the first one."""
    w, other = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([w, other])
    optimizer.step(lambda: (w.square().sum() + other.square().sum()).sqrt())
    assert optimizer.state[w]
    carry_over(optimizer, [w], [other], 0.5**0.5)
    assert w not in optimizer.state


def test_new_coordinates_count_their_own_steps():
    """The first step of Adam along a new direction is lr; with the old step count it would be several times that."""
    finder, sub, run = searched([0.1, 0.1, 0.1, 0.1], steps=13)
    assert [entry["dim"] for entry in finder.history] == [8, 8, 16]
    counts = [int(run.optimizers[0].state[block]["step"]) for block in sub.blocks]
    assert counts[:3] == [13, 5, 1]


def test_once_all_directions_are_in_use_an_optimizer_of_any_kind_is_left_alone():
    """Adadelta, whose state a doubling deletes, has counted every step."""

    class Model(Scripted):
        def configure_optimizers(self):
            return torch.optim.Adadelta(self.parameters(), lr=1.0)

    sub = SubspaceModule(made(Model), 16, max_dim=16, scale=10)
    _, _, run = searched([], steps=16, sub=sub)
    assert int(run.optimizers[0].state[sub.blocks[0]]["step"]) == 16
