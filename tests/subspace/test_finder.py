"""The search within one run: the rule, the mean that is judged, and an optimizer that does not notice a doubling."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from nets import Classifier, train_loader, trainer, val_loader
from pytorch_lightning.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sketch.subspace import IntrinsicDimensionFinder, SubspaceModule
from lightning_sketch.subspace._doubling import carry_over


class Scripted(Classifier):
    """Validation gives values of a list, one after the other."""

    def __init__(self, values):
        super().__init__()
        self.values = iter(values)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.seen.append(torch.cat([p.detach().flatten() for p in self.net.parameters()]))
            self.log("value", next(self.values))


def searched(values, steps=40, mode="max", target=0.9, delta=0.05, callbacks=(), **options):
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("value", target, mode, delta, every_n_train_steps=4, **options)
    sub = SubspaceModule(Scripted(values), 8, max_dim=50, lr_scale=10)
    run = trainer(finder, *callbacks, max_steps=steps)
    run.fit(sub, train_loader(), val_loader(slice(1700, None)))
    return finder, sub, run


def dims(finder):
    return [line["dim"] for line in finder.history]


def test_the_rule():
    """The first value is compared with none; less than delta better doubles; the target ends it."""
    values = [0.1, 0.2, 0.22, 0.3, 0.3, 0.5, 0.54, 0.91]
    finder, sub, run = searched(values)
    assert dims(finder) == [8, 8, 8, 16, 16, 32, 32, 50]
    assert [line["step"] for line in finder.history] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert [line["value"] for line in finder.history] == pytest.approx(values)
    assert finder.suggestion() == 50
    assert run.global_step == 32
    assert sub.directions.dim == 50


def test_just_delta_better_is_better():
    finder, _, _ = searched([0.25, 0.5, 0.75, 0.9], delta=0.25, target=2.0, steps=16)
    assert dims(finder) == [8, 8, 8, 8]
    assert finder.suggestion() is None


def test_smaller_can_be_better():
    finder, _, _ = searched([2.0, 1.5, 1.48, 0.4], mode="min", target=0.5)
    assert dims(finder) == [8, 8, 8, 16]
    assert finder.suggestion() == 16


def test_not_reached_is_no_answer():
    finder, sub, run = searched([0.1] * 20, max_steps=22)
    assert finder.suggestion() is None
    assert run.global_step == 22
    assert dims(finder) == [8, 8, 16, 32, 50, 50]  # Lightning validates once more where it stops
    assert sub.directions.dim == 50


def test_no_number_ends_it():
    finder, _, run = searched([0.1, float("nan"), 0.3])
    assert finder.suggestion() is None
    assert run.global_step == 8


def test_the_mean_of_the_last_half_is_judged_and_training_goes_on_from_w():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((trainer.global_step, pl_module.coordinates().detach().clone()))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                assert torch.equal(pl_module.coordinates(), seen[-1][1])

    _, sub, _ = searched([0.1, 0.2], steps=8, callbacks=[Watch()])
    ws = dict(seen)
    mean = (ws[3] + ws[4]) / 2
    theta0 = torch.cat([tensor.flatten() for tensor in sub.theta0().values()])
    assert torch.allclose(sub.module.seen[0], theta0 + sub.directions.rmatvec(mean), atol=1e-5)
    assert not torch.allclose(sub.module.seen[0], theta0 + sub.directions.rmatvec(ws[4]), atol=1e-5)


def test_a_doubling_leaves_the_weights_and_rescales_w():
    sub = SubspaceModule(Classifier(), 8, max_dim=64, lr_scale=10)
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


def test_a_state_of_unknown_kind_begins_anew():
    w = nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.Adadelta([w])
    w.grad = torch.ones(6)
    optimizer.step()
    carry_over(optimizer, [w], [], 0.5**0.5)
    assert w not in optimizer.state


def test_new_coordinates_count_their_own_steps():
    """The first step of Adam along a new direction is lr; by an old count it were several times that, later."""
    finder, sub, run = searched([0.1, 0.1, 0.1, 0.1], steps=13)
    assert dims(finder) == [8, 8, 16]
    counts = [int(run.optimizers[0].state[block]["step"]) for block in sub.blocks]
    assert counts[:3] == [13, 5, 1]


def test_the_trainers_rhythm_is_put_back_and_a_second_fit_starts_anew():
    finder, sub, run = searched([0.1, 0.95])
    assert (run.val_check_interval, run.check_val_every_n_epoch) == (1.0, 1)
    assert finder.suggestion() == 8
    sub.module.values = iter([0.1, 0.2, 0.2])
    trainer(finder, max_steps=8).fit(sub, train_loader(), val_loader(slice(1700, None)))
    assert finder.suggestion() is None
    assert len(finder.history) == 2


def test_accumulated_batches_are_one_step():
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("val_acc", 0.99, every_n_train_steps=3)
    sub = SubspaceModule(Classifier(), 8, max_dim=64, lr_scale=10)
    trainer(finder, max_steps=9, accumulate_grad_batches=2).fit(sub, train_loader(), val_loader())
    assert [line["step"] for line in finder.history] == [3, 6, 9]


def test_what_is_logged(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("val_acc", 0.99, every_n_train_steps=4)
    sub = SubspaceModule(Classifier(), 8, max_dim=64, lr_scale=10)
    trainer(finder, max_steps=12, logger=logger).fit(sub, train_loader(), val_loader())
    written = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "subspace/dim" in written
    assert "val_acc" in written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "up"}, "mode='up'"),
        ({"target": float("nan")}, "finite target"),
        ({"delta": -1.0}, "delta >= 0"),
        ({"every_n_train_steps": 0}, "every_n_train_steps >= 1"),
        ({"max_steps": 0}, "max_steps >= 1"),
    ],
)
def test_arguments_out_of_range(options, said):
    with pytest.raises(ValueError, match=said):
        IntrinsicDimensionFinder("val_acc", **{"target": 0.9, **options})


def test_what_cannot_be_searched_is_refused_before_training():
    finder = IntrinsicDimensionFinder("val_acc", 0.9)
    plain, whole = Classifier(), SubspaceModule(Classifier(), 8)
    for module in (plain, whole):
        with pytest.raises(MisconfigurationException, match="max_dim"):
            trainer(finder).fit(module, train_loader(), val_loader())
    nested = SubspaceModule(Classifier(), 8, max_dim=16, lr_scale=10)
    with pytest.raises(MisconfigurationException, match="val_dataloaders"):
        trainer(finder).fit(nested, train_loader())
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches"):
        trainer(finder, GradientAccumulationScheduler({2: 2})).fit(copy.deepcopy(nested), train_loader(), val_loader())
    with pytest.raises(MisconfigurationException, match="leave out the callback that averages"):
        trainer(finder, EMAWeightAveraging()).fit(copy.deepcopy(nested), train_loader(), val_loader())
    second = IntrinsicDimensionFinder("val_loss", 0.1, "min")
    with pytest.raises(MisconfigurationException, match="two searches in one run"):
        trainer(finder, second).fit(copy.deepcopy(nested), train_loader(), val_loader())
    other = IntrinsicDimensionFinder("accuracy", 0.9, every_n_train_steps=2)
    with pytest.raises(MisconfigurationException, match=r"'accuracy' was not logged.*'val_acc'"):
        trainer(other, fast_dev_run=True).fit(copy.deepcopy(nested), train_loader(), val_loader())
    with pytest.raises(MisconfigurationException, match=r"'accuracy' was not logged.*'val_acc'"):
        trainer(other).fit(copy.deepcopy(nested), train_loader(), val_loader())


def test_what_reached_the_target_is_what_is_left_and_saved(tmp_path):
    """The mean of w, not the last w: validated again, the module and the best checkpoint give the value found."""
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("val_acc", 0.6, every_n_train_steps=16)
    keep = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    sub = SubspaceModule(Classifier(), 8, max_dim=256, lr_scale=10)
    run = trainer(finder, keep, max_steps=800, enable_checkpointing=True)
    run.fit(sub, train_loader(slice(0, 1437)), val_loader())
    assert finder.found is not None
    left = trainer().validate(sub, val_loader(), verbose=False)[0]["val_acc"]
    assert left == pytest.approx(finder.history[-1]["value"])
    best = run.validate(sub, val_loader(), ckpt_path="best", verbose=False)[0]["val_acc"]
    assert best == pytest.approx(float(keep.best_model_score)) == pytest.approx(left)


def test_a_validation_that_fails_leaves_w_as_it_was():
    class Fails(Classifier):
        def validation_step(self, batch, batch_idx):
            if self.trainer.global_step:
                raise RuntimeError("no validation")

    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.coordinates().detach().clone())

    sub = SubspaceModule(Fails(), 8, max_dim=16, lr_scale=10)
    finder = IntrinsicDimensionFinder("val_acc", 0.9, every_n_train_steps=4)
    with pytest.raises(RuntimeError, match="no validation"):
        trainer(finder, Watch()).fit(sub, train_loader(), val_loader())
    assert len(seen) == 4
    assert torch.equal(sub.coordinates(), seen[-1])


def test_a_search_ends_where_it_has_found_however_long_the_trainer_wants_to_train():
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("value", 0.9, every_n_train_steps=4)
    sub = SubspaceModule(Scripted([0.1, 0.95]), 8, max_dim=50, lr_scale=10)
    run = trainer(finder, max_steps=40, min_epochs=3, min_steps=20)
    run.fit(sub, train_loader(), val_loader(slice(1700, None)))
    assert (run.global_step, finder.suggestion(), len(finder.history)) == (8, 8, 2)
    assert (run.min_epochs, run.min_steps) == (3, 20)
