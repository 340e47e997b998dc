"""Training goes on while the rows of a step are on their way from the device: nothing waits, and nothing is lost."""

import contextlib

import pytest
import torch
from launches import Waits
from models import Digits, dataset, fit
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_gradient_sketch_writer import rows_of
from torch.utils.data import DataLoader

from lightning_sketch import GradientSketchWriter, GradientStore, SpectrumMonitor
from lightning_sketch.attribution import IndexedDataset
from lightning_sketch.callbacks.gradient_sketch_writer import _arriving
from lightning_sketch.callbacks.gradient_sketch_writer import writer as writing

PER = pytest.mark.parametrize("per", ["step", "example"])


def data():
    return DataLoader(IndexedDataset(dataset(64)), batch_size=16)


def written(tmp_path, *callbacks, kind=GradientSketchWriter, per="step", model=Digits, **arguments):
    watch = kind(tmp_path / "store", dim=128, dtype="float32", per=per)
    fit(tmp_path, watch, *callbacks, model=model, data=data(), **arguments)
    return watch


@pytest.fixture
def slow_device(monkeypatch):
    """Let the copies of rows never be done before somebody waits for them."""
    monkeypatch.setattr(_arriving.ArrivingRows, "are_here", property(lambda self: False))


class Watched(GradientSketchWriter):
    """List what each step's hooks wait for: those that run between the forward pass and the optimizer's step."""

    def around(self, hook, *args):
        with self.mode() as mode:
            hook(*args)
        self.waits.append(getattr(mode, "names", []))

    mode, waits = Waits, None

    def on_train_start(self, *args):
        super().on_train_start(*args)
        self.waits = []

    def on_before_backward(self, *args):
        self.around(super().on_before_backward, *args)

    def on_after_backward(self, *args):
        self.around(super().on_after_backward, *args)

    def on_before_optimizer_step(self, *args):
        self.around(super().on_before_optimizer_step, *args)


@PER
def test_no_number_is_read_while_a_step_is_computed(tmp_path, monkeypatch, slow_device, per):
    """But in the first step of rows of examples, whose sum is compared with the gradient."""
    monkeypatch.setenv("LIGHTNING_SKETCH_KERNEL", "torch")  # one on a CPU reads memory through NumPy
    watch = written(tmp_path, kind=Watched, per=per)
    assert len(watch.waits) == 24
    assert not any(watch.waits[3:])
    assert len(rows_of(tmp_path)) == (8 if per == "step" else 128)


def test_a_step_that_is_not_measured_waits_for_nothing(tmp_path):
    """The first one is: the monitor multiplies its batch by the Hessian."""
    waits = []

    class Monitor(SpectrumMonitor):
        def on_train_batch_start(self, *args):
            with Waits() as mode:
                super().on_train_batch_start(*args)
            waits.append(mode.names)

        def on_train_batch_end(self, *args):
            with Waits() as mode:
                super().on_train_batch_end(*args)
            waits.append(mode.names)

    watch = Monitor(num_matvecs=8, top_k=1, bottom_k=1, num_batches=1, every_n_train_steps=8)
    fit(tmp_path, watch, data=data(), max_epochs=2)
    assert [step for step, names in enumerate(waits) if names] == [0, 15]
    assert len(watch.history) == 1


def test_waits_are_counted():
    x = torch.ones(3)
    with Waits() as counted:
        float(x.sum()), x.tolist(), bool((x > 0).all()), x + 1
    assert counted.names == ["__float__", "tolist", "__bool__"]


class Strict(Watched):
    """Let PyTorch refuse what waits for the device, from the second step on."""

    @contextlib.contextmanager
    def mode(self):
        torch.cuda.set_sync_debug_mode("error" if len(self.waits) > 3 else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_waits_for_a_device(tmp_path, device):
    """Which changes no row but by rounding, of TF32 on some."""
    for folder, on in (("plain", "cpu"), ("strict", device)):
        seed_everything(3, verbose=False)
        kind = GradientSketchWriter if on == "cpu" else Strict
        watch = kind(tmp_path / folder / "store", dim=128, dtype="float32")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(max_epochs=2, accelerator=on, devices=1, callbacks=[watch], **quiet).fit(Digits(dropout=0.0), data())
    plain, strict = rows_of(tmp_path / "plain"), rows_of(tmp_path / "strict")
    assert strict.step.tolist() == plain.step.tolist() == list(range(1, 9))
    assert torch.allclose(strict.loss, plain.loss, rtol=2e-2)
    errors = (strict.sketches - plain.sketches).norm(dim=1) / plain.sketches.norm(dim=1)
    assert errors[0] < 2e-2


@PER
@pytest.mark.parametrize("most", [2, 64])
def test_late_rows_are_those_of_a_fast_device(tmp_path, monkeypatch, slow_device, per, most):
    monkeypatch.setattr(writing, "_MOST_ARRIVING", most)
    written(tmp_path / "late", per=per)
    monkeypatch.undo()
    written(tmp_path / "early", per=per)
    late, early = rows_of(tmp_path / "late"), rows_of(tmp_path / "early")
    assert torch.equal(late.sketches, early.sketches)
    for name in ("step", "loss", "fingerprint", "lr", "example_id"):
        assert torch.equal(late.metadata()[name].nan_to_num(), early.metadata()[name].nan_to_num())


class CountRows(Callback):
    """Count the rows on the disk after each checkpoint."""

    def __init__(self, store):
        self.store, self.found = store, []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            self.found.append(len(GradientStore.open(self.store)))


@PER
def test_a_checkpoint_waits_for_the_rows_of_its_steps(tmp_path, slow_device, per):
    count = CountRows(tmp_path / "store")
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3)
    written(tmp_path, count, save, per=per, enable_checkpointing=True, max_epochs=1)
    assert count.found == [3 if per == "step" else 48]


class Crash(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            raise MisconfigurationException("as by a bug")


@PER
def test_the_rows_of_all_steps_done_survive_an_error(tmp_path, slow_device, per):
    with pytest.raises(MisconfigurationException, match="as by a bug"):
        written(tmp_path, Crash(), per=per)
    assert len(rows_of(tmp_path)) == (5 if per == "step" else 80)
