"""A measurement is taken in the stages that were asked for, and no run loses the history of training without a word."""

import pytest
import torch
from models import Digits, dataset, fit, loader, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_sketch import SpectrumMonitor

# Lightning warns that the resuming Trainers lack the ModelCheckpoint that made the checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


def monitor(**arguments):
    return SpectrumMonitor(**{"num_matvecs": 6, "dim": 48, "num_batches": 1, "top_k": 2, "bottom_k": 1, **arguments})


class Evaluated(Digits):
    def validation_step(self, batch, batch_idx):
        self.log("val_sum", batch[0].sum())

    def test_step(self, batch, batch_idx):
        self.log("test_sum", batch[0].sum())


def others():
    """Return data that training has not seen first."""
    return DataLoader(dataset(96), batch_size=48, shuffle=False)


def test_a_validation_that_was_not_asked_for_measures_nothing_and_says_once_how_to_ask(tmp_path, caplog):
    watch = monitor()
    model = fit(tmp_path, watch, model=Evaluated)
    before = list(watch.history)
    with caplog.at_level("INFO"):
        for _ in range(2):
            model.trainer.validate(model, others(), verbose=False)
            model.trainer.test(model, others(), verbose=False)
    assert watch.history == before
    assert caplog.text.count("SpectrumMonitor(stages=['fit', 'validate']) measures there too") == 1
    assert "hessian/lambda_max" not in model.trainer.callback_metrics


def test_evaluations_are_appended_with_their_stage_and_left_out_of_the_curve(tmp_path):
    watch = monitor(stages=["fit", "validate", "test"])
    model = fit(tmp_path, watch, model=Evaluated)
    curve = watch.plot().axes[0].lines[0].get_xdata().tolist()
    model.trainer.validate(model, others(), verbose=False)
    model.trainer.test(model, others(), verbose=False)
    assert [(m.stage, m.step) for m in watch.history] == [("fit", 8), ("fit", 16), ("validate", 16), ("test", 16)]
    assert watch.history[2].eigenvalues == pytest.approx(watch.history[3].eigenvalues)  # the same data and weights
    assert watch.history[2].loss != watch.history[1].loss
    assert watch.plot().axes[0].lines[0].get_xdata().tolist() == curve == [8, 16]
    assert "validate, epoch 2, step 16" in repr(watch.history[2])


@pytest.mark.slow
def test_an_evaluation_leaves_the_batches_of_training_as_they_are(tmp_path):
    watch = monitor(stages=["fit", "validate"])
    model = fit(tmp_path, watch, model=Evaluated, data=loader(shuffle=False))
    model.trainer.validate(model, others(), verbose=False)
    assert watch.measure(model).loss == pytest.approx(watch.history[1].loss, rel=1e-6)
    model.trainer.fit_loop.max_epochs = 3
    model.trainer.fit(model, loader(shuffle=False))  # no warning that its batches differ: see pyproject's filters
    assert [(m.stage, m.step) for m in watch.history] == [("fit", 8), ("fit", 16), ("validate", 16), ("fit", 24)]
    assert torch.isfinite(torch.tensor(watch.history[3].overlap_with_last)) or not watch.history[3].converged[:2].all()


def test_only_evaluations(tmp_path):
    """The monitor leaves training alone; what was evaluated is drawn and can be measured again."""
    watch = monitor(stages=["validate"])
    model = fit(tmp_path, watch, model=Evaluated)
    assert not watch.history
    assert "hessian/lambda_max" not in model.trainer.callback_metrics
    model.trainer.validate(model, others(), verbose=False)
    (measured,) = watch.history
    assert model.trainer.callback_metrics["hessian/loss"] == pytest.approx(measured.loss)
    assert watch.plot().axes[0].lines[0].get_xdata().tolist() == [measured.step]
    assert watch.measure(model).loss == pytest.approx(measured.loss, rel=1e-6)


@pytest.mark.slow
def test_an_evaluated_checkpoint_does_not_bring_back_its_shorter_history(tmp_path):
    """Lightning restores the state of callbacks when a checkpoint is validated, too."""
    watch, kept = monitor(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model = fit(tmp_path, watch, kept, model=Evaluated, enable_checkpointing=True, max_epochs=3)
    model.trainer.validate(model, others(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert [m.step for m in watch.history] == [8, 16, 24]


def test_a_new_training_says_that_it_begins_a_new_history(tmp_path):
    watch = monitor()
    fit(tmp_path, watch)
    with pytest.warns(UserWarning, match="its history replaces the 2 measurements of the last one; copy monitor.hist"):
        fit(tmp_path, watch, max_epochs=1)
    assert [m.step for m in watch.history] == [8]


@pytest.mark.slow
def test_a_second_fit_of_one_trainer_continues_the_history_and_speaks_of_no_checkpoint(tmp_path):
    watch = monitor()
    run = trainer(tmp_path, watch, max_epochs=1)
    model = Digits()
    run.fit(model, loader(shuffle=False))
    run.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="the first batches differ from those of the last fit") as said:
        run.fit(model, loader(shuffle=False, batch_size=64))
    assert not [w for w in said if "checkpoint" in str(w.message) and "hessian" in str(w.message)]
    assert [m.step for m in watch.history] == [8, 12]


def test_a_history_of_the_first_version_is_of_training(tmp_path):
    """Checkpoints that were written before measurements had a stage."""
    watch = monitor()
    fit(tmp_path, watch)
    state = watch.state_dict()
    for measured in state["history"]:
        del measured["stage"]
    restored = monitor()
    restored.load_state_dict(state)
    assert [m.stage for m in restored.history] == ["fit", "fit"]


def test_the_repr_is_one_line(tmp_path):
    watch = monitor(every_n_train_steps=4, parameters="net.5.*")
    assert repr(watch) == "SpectrumMonitor('hessian', every_n_train_steps=4, num_batches=1): 0 measurements"
    fit(tmp_path, watch, max_epochs=1)
    assert len(repr(watch).splitlines()) == 1
    assert "2 measurements" in repr(watch)
