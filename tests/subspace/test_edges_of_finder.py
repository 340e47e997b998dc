"""The finder where it begins, ends and resumes; what an optimizer remembers; directions to the last one."""

import math

import pytest
import pytorch_lightning as pl
import torch
from edges import Given, made, nested, searched
from nets import train_loader, trainer, val_loader
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_sketch.subspace import IntrinsicDimensionFinder, SubspaceModule
from lightning_sketch.subspace._doubling import carry_over
from lightning_sketch.subspace.directions import Directions


def test_a_state_that_is_not_of_one_block_alone_begins_anew():
    """LBFGS keeps what it knows of all parameters under the first."""
    w, other = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([w, other])
    optimizer.step(lambda: (w.square().sum() + other.square().sum()).sqrt())
    assert optimizer.state[w]
    carry_over(optimizer, [w], [other], 0.5**0.5)
    assert w not in optimizer.state


def test_a_target_is_finite_and_delta_may_be_zero():
    with pytest.raises(ValueError, match="finite target, got inf"):
        IntrinsicDimensionFinder("value", math.inf)
    assert IntrinsicDimensionFinder("value", 0.9, delta=0).delta == 0


def test_finders_of_two_metrics_have_two_keys():
    keys = {IntrinsicDimensionFinder(name, 0.9).state_key for name in ("val_acc", "val_loss")}
    assert len(keys) == 2


def test_the_target_itself_is_enough():
    finder, _, run = searched([0.25, 0.5, 0.5], target=0.5)
    assert (finder.suggestion(), run.global_step) == (8, 8)


def test_no_improvement_is_asked_for_where_delta_is_zero():
    finder, _, _ = searched([0.25, 0.25, 0.125, 0.0], delta=0)
    assert [line["dim"] for line in finder.history] == [8, 8, 8, 16]


def test_a_search_that_is_over_is_over_when_it_is_resumed(tmp_path):
    """By way of a checkpoint: the answer is kept."""
    finder, sub, run = searched([0.1, 0.95])
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = IntrinsicDimensionFinder("value", 0.9, every_n_train_steps=4)
    trainer(again, max_steps=8).fit(
        nested(type(sub.module)), train_loader(), val_loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert again.suggestion() == finder.suggestion() == 8
    assert again.history == finder.history


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_search_resumes_in_the_middle_of_a_window(tmp_path):
    """At step 16 of windows that end at 18: the w of that step is in the mean that is judged."""

    def run(callbacks=(), path=None):
        finder = IntrinsicDimensionFinder("val_loss", 0.0, "min", every_n_train_steps=6)
        sub = nested()
        options = {"max_epochs": 3, "max_steps": -1, "enable_checkpointing": bool(callbacks)}
        trainer(finder, *callbacks, **options).fit(sub, train_loader(), val_loader(), ckpt_path=path)
        return finder

    whole = run([ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)])
    assert run(path=tmp_path / "epoch=1-step=16.ckpt").history == whole.history
    assert [line["step"] for line in whole.history] == [6, 12, 18, 24]


def test_a_finder_has_no_part_in_what_is_no_fit():
    """Modules of any kind can be validated by its Trainer; nothing is judged, and w stays."""
    finder, sub, _ = searched([0.1, 0.1])
    before, history, w = finder.suggestion(), list(finder.history), sub.coordinates().detach().clone()
    trainer(finder).validate(sub, val_loader(), verbose=False)
    trainer(finder).validate(made(), val_loader(), verbose=False)
    assert (finder.suggestion(), finder.history) == (before, history)
    assert torch.equal(sub.coordinates(), w)


def test_a_fit_that_goes_on_goes_on_with_the_search():
    """The same Trainer with more steps; a new one would begin anew."""
    finder, sub, run = searched([0.1, 0.2, 0.3, 0.4], steps=8)
    run.fit_loop.epoch_loop.max_steps = 16
    run.fit(sub, train_loader(), val_loader())
    assert [line["step"] for line in finder.history] == [4, 8, 12, 16]


def test_a_search_ends_with_the_w_of_its_last_step():
    """Also where Lightning validates once more as it stops, after less than half a window."""
    last = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            last[:] = [pl_module.coordinates().detach().clone()]

    for max_steps in (9, 10, 11):
        sub = nested(Given)
        finder = IntrinsicDimensionFinder("value", 0.9, delta=0, every_n_train_steps=4, max_steps=max_steps)
        trainer(finder, Watch(), max_steps=40).fit(sub, train_loader(), val_loader())
        assert finder.history[-1]["step"] == max_steps
        assert torch.equal(sub.coordinates(), last[0])


def test_what_the_optimizer_remembers_shrinks_with_the_gradient():
    """D g shrinks by √½ as the directions double, and the mean of Adam with it; the mean of squares by ½."""
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


def test_once_all_directions_are_in_use_an_optimizer_of_any_kind_is_left_alone():
    """One that would begin anew at a doubling has taken every step."""

    class Model(Given):
        def configure_optimizers(self):
            return torch.optim.Adadelta(self.parameters(), lr=1.0)

    sub = SubspaceModule(made(Model), 16, max_dim=16, lr_scale=10)
    _, _, run = searched([], steps=16, sub=sub)
    assert int(run.optimizers[0].state[sub.blocks[0]]["step"]) == 16


def test_nested_directions_are_random_where_all_are_in_use_from_the_start():
    assert Directions.of("block_srht", 64, 64, 0, 64).as_matrix().count_nonzero() == 64 * 64


def test_the_order_is_of_the_seed():
    orders = {
        tuple(Directions.of("block_srht", 64, 8, seed, 32)._order(torch.device("cpu")).tolist()) for seed in (0, 1)
    }
    assert len(orders) == 2


@pytest.mark.parametrize(("n", "dim"), [(60, 40), (300, 160)])
def test_condition_is_close_by_default(n, dim):
    """Of few values of D Dᵀ the Krylov space is small: what rounding adds to it must not be taken for directions."""
    directions = Directions.of("block_srht", n, dim, 1)
    singular = torch.linalg.svdvals(directions.as_matrix(dtype=torch.float64))
    assert directions.condition() == pytest.approx(float(singular[0] / singular[-1]), rel=0.05)


@pytest.mark.parametrize("implicit", [False, True])
def test_weights_in_half_precision_are_rounded_once(implicit):
    """θ₀ + Dᵀ w in float32, for a w in bfloat16, however it is scaled."""
    sub = SubspaceModule(made(), 8, max_dim=50).to(torch.bfloat16)
    for block in sub.blocks:
        block.data.normal_()
    w = sub.coordinates().detach()
    steps = sub.weights.layout.unflatten(sub.directions.rmatvec(w.float()))
    expected = [(start + step).bfloat16() for start, step in zip(sub.theta0().values(), steps, strict=True)]
    sub.ready()
    found = sub.weights.moved(sub.directions, w) if implicit else sub.weights.parameters()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_theta0_goes_where_the_weights_go():
    sub = SubspaceModule(made(), 8).double()
    assert {tensor.dtype for tensor in sub.theta0().values()} == {torch.float64}
