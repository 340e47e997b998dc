"""The search within one run: the rule, the mean of w that is validated, the Trainer's schedule, what is refused."""

import copy
import math
from dataclasses import replace

import pytest
import pytorch_lightning
import pytorch_lightning as pl
import torch
from nets import Classifier, train_loader, trainer, val_loader
from pytorch_lightning.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import Scripted, made, nested, searched

from lightning_sketch.subspace import IntrinsicDimensionFinder, SubspaceModule


def dims(finder):
    return [entry["dim"] for entry in finder.history]


def test_the_rule():
    """The first value has no predecessor; an improvement below delta doubles dim; the target ends the search."""
    values = [0.1, 0.2, 0.22, 0.3, 0.3, 0.5, 0.54, 0.91]
    finder, sub, run = searched(values, steps=40)
    assert dims(finder) == [8, 8, 8, 16, 16, 32, 32, 50]
    assert [entry["step"] for entry in finder.history] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert [entry["value"] for entry in finder.history] == pytest.approx(values)
    assert finder.suggestion() == 50
    assert run.global_step == 32
    assert sub.directions.dim == 50


def test_just_delta_better_is_better():
    finder, _, _ = searched([0.25, 0.5, 0.75, 0.9], delta=0.25, target=2.0, steps=16)
    assert dims(finder) == [8, 8, 8, 8]
    assert finder.suggestion() is None


def test_no_improvement_is_asked_for_where_delta_is_zero():
    finder, _, _ = searched([0.25, 0.25, 0.125, 0.0], delta=0)
    assert [entry["dim"] for entry in finder.history] == [8, 8, 8, 16]


def test_the_target_itself_is_enough():
    finder, _, run = searched([0.25, 0.5, 0.5], target=0.5)
    assert (finder.suggestion(), run.global_step) == (8, 8)


def test_what_reaches_the_target_is_not_doubled_however_little_better_it_is():
    finder, sub, _ = searched([0.88, 0.91])
    assert sub.directions.dim == finder.suggestion() == 8


def test_smaller_can_be_better():
    finder, _, _ = searched([2.0, 1.5, 1.48, 0.4], mode="min", target=0.5)
    assert dims(finder) == [8, 8, 8, 16]
    assert finder.suggestion() == 16


def test_not_reached_is_no_answer():
    finder, sub, run = searched([0.1], steps=40, max_steps=22)
    assert finder.suggestion() is None
    assert run.global_step == 22
    assert dims(finder) == [8, 8, 16, 32, 50, 50]  # Lightning validates once more where it stops
    assert sub.directions.dim == 50


def test_no_number_ends_it():
    finder, _, run = searched([0.1, float("nan"), 0.3])
    assert finder.suggestion() is None
    assert run.global_step == 8


def test_the_mean_of_the_last_half_is_validated_and_training_continues_from_w():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((trainer.global_step, pl_module.coordinates().detach().clone()))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                assert torch.equal(pl_module.coordinates(), seen[-1][1])

    _, sub, _ = searched([0.1, 0.2], Watch(), steps=8)
    ws = dict(seen)
    mean = (ws[3] + ws[4]) / 2
    theta0 = torch.cat([tensor.flatten() for tensor in sub.theta0().values()])
    assert torch.allclose(sub.module.seen[0], theta0 + sub.directions.rmatvec(mean), atol=1e-5)
    assert not torch.allclose(sub.module.seen[0], theta0 + sub.directions.rmatvec(ws[4]), atol=1e-5)


def test_every_step_of_a_search_is_at_the_current_w():
    """This holds for the step after a validation too, which is at the mean."""
    expected = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps = pl_module.directions.rmatvec(pl_module.coordinates().detach())
            expected.append(torch.cat([tensor.flatten() for tensor in pl_module.theta0().values()]) + steps)

    class Model(Scripted):
        def training_step(self, batch, batch_idx):
            found = torch.cat([p.detach().flatten() for p in self.net.parameters()])
            assert torch.allclose(found, expected[-1], atol=1e-6)
            return super().training_step(batch, batch_idx)

    searched([], Watch(), steps=12, sub=nested(Model), delta=0)
    assert len(expected) == 12


def test_a_search_ends_with_the_w_of_its_last_step():
    """This holds too if Lightning validates once more as it stops, after less than half a window."""
    last = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            last[:] = [pl_module.coordinates().detach().clone()]

    for max_steps in (9, 10, 11):
        sub = nested(Scripted)
        finder = IntrinsicDimensionFinder("value", 0.9, delta=0, every_n_train_steps=4, max_steps=max_steps)
        trainer(finder, Watch(), max_steps=40).fit(sub, train_loader(), val_loader())
        assert finder.history[-1]["step"] == max_steps
        assert torch.equal(sub.coordinates(), last[0])


def test_of_accumulated_batches_the_mean_is_over_steps():
    """With two batches a step and a validation every four steps: the w after the third and after the fourth step."""
    seen, ws = [], {}

    class Model(Scripted):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if batch_idx == 0 and not self.trainer.sanity_checking:
                seen.append(torch.cat([p.detach().flatten() for p in self.net.parameters()]))

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ws[trainer.global_step] = pl_module.coordinates().detach().clone()

    _, sub, _ = searched([], Watch(), steps=8, sub=nested(Model), accumulate_grad_batches=2)
    theta0 = torch.cat([tensor.flatten() for tensor in sub.theta0().values()])
    for theta, last in zip(seen, (4, 8), strict=True):
        expected = theta0 + replace(sub.directions, dim=8).rmatvec((ws[last - 1] + ws[last]) / 2)
        assert torch.allclose(theta, expected, atol=1e-6)


def test_accumulated_batches_are_one_step():
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("val_acc", 0.99, every_n_train_steps=3)
    sub = SubspaceModule(Classifier(), 8, max_dim=64, scale=10)
    trainer(finder, max_steps=9, accumulate_grad_batches=2).fit(sub, train_loader(), val_loader())
    assert [entry["step"] for entry in finder.history] == [3, 6, 9]


@pytest.mark.slow
def test_the_mean_that_reached_the_target_is_kept_and_saved(tmp_path):
    """The mean of w, not the last w: validated again, the module and the best checkpoint give the value found."""
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("val_acc", 0.6, every_n_train_steps=16)
    keep = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    sub = SubspaceModule(Classifier(), 8, max_dim=256, scale=10)
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

    sub = SubspaceModule(Fails(), 8, max_dim=16, scale=10)
    finder = IntrinsicDimensionFinder("val_acc", 0.9, every_n_train_steps=4)
    with pytest.raises(RuntimeError, match="no validation"):
        trainer(finder, Watch()).fit(sub, train_loader(), val_loader())
    assert len(seen) == 4
    assert torch.equal(sub.coordinates(), seen[-1])


def test_a_fit_that_fails_after_a_search_was_over_leaves_w_alone():
    class Model(Scripted):
        values = (0.95,)

        def training_step(self, batch, batch_idx):
            if self.trainer.max_steps == 5:
                raise RuntimeError("no step")
            return super().training_step(batch, batch_idx)

    finder, sub, _ = searched([], sub=nested(Model))
    sub.blocks[0].data.fill_(0.5)
    with pytest.raises(RuntimeError, match="no step"):
        trainer(finder, max_steps=5).fit(sub, train_loader(), val_loader())
    assert torch.equal(sub.coordinates(), torch.full((8,), 0.5))


def test_the_trainers_schedule_is_restored_and_a_second_fit_starts_a_new_search():
    finder, sub, run = searched([0.1, 0.95])
    assert (run.val_check_interval, run.check_val_every_n_epoch) == (1.0, 1)
    assert finder.suggestion() == 8
    sub.module.left = [0.1, 0.2, 0.2]
    trainer(finder, max_steps=8).fit(sub, train_loader(), val_loader(slice(1700, None)))
    assert finder.suggestion() is None
    assert len(finder.history) == 2


def test_a_fit_that_goes_on_goes_on_with_the_search():
    """The same Trainer gets more steps; a new Trainer would start a new search."""
    finder, sub, run = searched([0.1, 0.2, 0.3, 0.4], steps=8)
    run.fit_loop.epoch_loop.max_steps = 16
    run.fit(sub, train_loader(), val_loader())
    assert [entry["step"] for entry in finder.history] == [4, 8, 12, 16]


def test_a_finder_has_no_part_in_what_is_no_fit():
    """Its Trainer can validate any module; no value is added to the history, and w stays."""
    finder, sub, _ = searched([0.1, 0.1])
    before, history, w = finder.suggestion(), list(finder.history), sub.coordinates().detach().clone()
    trainer(finder).validate(sub, val_loader(), verbose=False)
    trainer(finder).validate(made(), val_loader(), verbose=False)
    assert (finder.suggestion(), finder.history) == (before, history)
    assert torch.equal(sub.coordinates(), w)


def test_a_finder_leaves_the_schedule_of_other_trainers_alone():
    finder, sub, _ = searched([0.1])
    other = trainer(finder, val_check_interval=3, check_val_every_n_epoch=None)
    other.validate(sub, val_loader(), verbose=False)
    assert (other.val_check_interval, other.check_val_every_n_epoch) == (3, None)


def test_a_search_ends_where_it_has_found_however_long_the_trainer_wants_to_train():
    finder = IntrinsicDimensionFinder("value", 0.9, every_n_train_steps=4)
    sub = nested(type("Model", (Scripted,), {"values": (0.1, 0.95)}))
    run = trainer(finder, max_steps=40, min_epochs=3, min_steps=20)
    run.fit(sub, train_loader(), val_loader(slice(1700, None)))
    assert (run.global_step, finder.suggestion(), len(finder.history)) == (8, 8, 2)
    assert (run.min_epochs, run.min_steps) == (3, 20)


def test_what_is_logged(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    pl.seed_everything(0, verbose=False)
    finder = IntrinsicDimensionFinder("val_acc", 0.99, every_n_train_steps=4)
    sub = SubspaceModule(Classifier(), 8, max_dim=64, scale=10)
    trainer(finder, max_steps=12, logger=logger).fit(sub, train_loader(), val_loader())
    written = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "subspace/dim" in written
    assert "val_acc" in written


def test_finders_of_two_metrics_have_two_keys():
    keys = {IntrinsicDimensionFinder(name, 0.9).state_key for name in ("val_acc", "val_loss")}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "up"}, "mode='up'"),
        ({"target": math.nan}, "finite target"),
        ({"target": math.inf}, "finite target, got inf"),
        ({"delta": -1.0}, "delta >= 0"),
        ({"every_n_train_steps": 0}, "every_n_train_steps >= 1"),
        ({"max_steps": 0}, "max_steps >= 1"),
    ],
)
def test_arguments_out_of_range(untyped, options, said):
    with pytest.raises(ValueError, match=said):
        IntrinsicDimensionFinder("val_acc", **{"target": 0.9, **options})


def test_what_cannot_be_searched_is_refused_before_training():
    finder = IntrinsicDimensionFinder("val_acc", 0.9)
    plain, whole = Classifier(), SubspaceModule(Classifier(), 8)
    for module in (plain, whole):
        with pytest.raises(MisconfigurationException, match="max_dim"):
            trainer(finder).fit(module, train_loader(), val_loader())
    searchable = SubspaceModule(Classifier(), 8, max_dim=16, scale=10)
    with pytest.raises(MisconfigurationException, match="val_dataloaders"):
        trainer(finder).fit(searchable, train_loader())
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches"):
        trainer(finder, GradientAccumulationScheduler({2: 2})).fit(
            copy.deepcopy(searchable), train_loader(), val_loader()
        )
    recent = getattr(pytorch_lightning.callbacks, "EMAWeightAveraging", None)  # Lightning 2.6
    for averages in filter(None, (recent and recent(), StochasticWeightAveraging(swa_lrs=0.01))):
        with pytest.raises(MisconfigurationException, match="leave out the callback that averages"):
            trainer(finder, averages).fit(copy.deepcopy(searchable), train_loader(), val_loader())
    second = IntrinsicDimensionFinder("val_loss", 0.1, mode="min")
    with pytest.raises(MisconfigurationException, match="two searches in one run"):
        trainer(finder, second).fit(copy.deepcopy(searchable), train_loader(), val_loader())
    other = IntrinsicDimensionFinder("accuracy", 0.9, every_n_train_steps=2)
    with pytest.raises(MisconfigurationException, match=r"'accuracy' was not logged.*'val_acc'"):
        trainer(other, fast_dev_run=True).fit(copy.deepcopy(searchable), train_loader(), val_loader())
    with pytest.raises(MisconfigurationException, match=r"'accuracy' was not logged.*'val_acc'"):
        trainer(other).fit(copy.deepcopy(searchable), train_loader(), val_loader())
