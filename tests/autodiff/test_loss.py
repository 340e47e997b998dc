"""The loss is the one training minimizes, computed without logging and without the arguments of a later batch."""

import functools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_sketch.autodiff.losses import training_step_loss
from lightning_sketch.curvature import Hessian

X = torch.ones(4, 3)


class Model(pl.LightningModule):
    """Its step is replaced by each test."""

    def __init__(self, step=None, **modules):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        for name, module in modules.items():
            self.add_module(name, module)
        if step is not None:
            self.training_step = step.__get__(self)

    def loss(self, batch):
        return self.layer(batch).square().mean()


def logging(self, batch, batch_idx):
    loss = self.loss(batch)
    self.log("loss", loss, prog_bar=True)
    self.log_dict({"again": loss})
    for part in self.children():
        if isinstance(part, pl.LightningModule):
            part.log("inner", loss)
            part.log_dict({"inner": loss})
    return loss


def test_the_loss_is_that_of_the_step():
    model = Model(lambda self, batch, batch_idx: self.loss(batch))
    assert torch.equal(training_step_loss(model, X), model.loss(X))


def test_logging_is_silenced_in_nested_modules_too():
    """Without a trainer, `log` warns; here warnings are errors."""
    model = Model(logging, inner=Model())
    with pytest.warns(UserWarning, match="self.trainer"):
        model.log("loss", 1.0)
    training_step_loss(model, X)


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "error"])
def test_logging_is_back_after(fails):
    model, calls = Model(logging, inner=Model()), []
    model.log = lambda *args, **kwargs: calls.append(args)  # the user's own
    own = model.log
    if fails:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            training_step_loss(model, torch.ones(4, 5))
    else:
        training_step_loss(model, X)
    assert model.log is own
    assert model.log_dict.__func__ is pl.LightningModule.log_dict
    assert model.inner.log.__func__ is pl.LightningModule.log
    assert not calls


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss, "extra": 1}, lambda loss: loss], ids=["dict", "tensor"])
def test_a_step_may_return_a_tensor_or_a_dict(wrap):
    model = Model(lambda self, batch, batch_idx: wrap(self.loss(batch)))
    assert torch.equal(training_step_loss(model, X), model.loss(X))


@pytest.mark.parametrize("output", [None, {}, {"loss": None}])
def test_a_step_without_loss_is_refused(output):
    with pytest.raises(ValueError, match=r"training_step of Model returned no loss for this batch; return a scalar"):
        training_step_loss(Model(lambda self, batch, batch_idx: output), X)


def test_manual_optimization_is_refused_before_the_step_runs():
    model = Model(lambda self, batch, batch_idx: pytest.fail("the step ran"))
    model.automatic_optimization = False
    with pytest.raises(ValueError, match=r"Model uses manual optimization.* pass loss_fn=lambda module, batch"):
        training_step_loss(model, X)


def test_a_step_that_fetches_its_own_batches_is_refused():
    with pytest.raises(ValueError, match=r"training_step\(dataloader_iter\) fetches its own batches; pass loss_fn"):
        training_step_loss(Model(lambda self, dataloader_iter: None), X)


def decorated(step):
    @functools.wraps(step)
    def wrapper(*args, **kwargs):
        return step(*args, **kwargs)

    return wrapper


SIGNATURES = {
    "batch": (lambda self, batch: self.seen(batch), ()),
    "batch, batch_idx": (lambda self, batch, batch_idx: self.seen(batch, batch_idx), (0,)),
    "positional only": (lambda self, batch, batch_idx, /: self.seen(batch, batch_idx), (0,)),
    "other names": (lambda self, b, i: self.seen(b, i), (0,)),
    "batch_idx has a default": (lambda self, batch, batch_idx=7: self.seen(batch, batch_idx), (0,)),
    "dataloader_idx": (
        lambda self, batch, batch_idx, dataloader_idx=0: self.seen(batch, batch_idx, dataloader_idx),
        (0, 0),
    ),
    "own default": (lambda self, batch, batch_idx, prefix="train": self.seen(batch, batch_idx, prefix), (0, "train")),
    "keyword only": (lambda self, batch, *, prefix="train": self.seen(batch, prefix), ("train",)),
    "**kwargs": (lambda self, batch, **kwargs: self.seen(batch, *kwargs), ()),
    "batch_idx, **kwargs": (lambda self, batch, batch_idx, **kwargs: self.seen(batch, batch_idx, *kwargs), (0,)),
    "*args": (lambda self, *args: self.seen(*args), (0,)),
    "batch, *args": (lambda self, batch, *args: self.seen(batch, *args), (0,)),
    "*args, **kwargs": (lambda self, *args, **kwargs: self.seen(*args, *kwargs), (0,)),
    "decorated": (decorated(lambda self, batch, batch_idx: self.seen(batch, batch_idx)), (0,)),
}


@pytest.mark.parametrize(("step", "expected"), SIGNATURES.values(), ids=SIGNATURES)
def test_a_step_gets_the_arguments_that_the_trainer_gives(step, expected):
    """A step gets the batch, and 0 as `batch_idx` if it takes that; other defaults stay."""

    class Recording(Model):
        def seen(self, batch, *rest):
            assert batch is X
            self.rest = rest
            return self.loss(batch)

    Recording.training_step = step
    model = Recording()
    training_step_loss(model, X)
    assert model.rest == expected


def test_it_is_a_loss_function_for_curvature():
    model = Model(logging, inner=Model())
    h = Hessian(training_step_loss, model, [X], parameters="layer.*")
    torch.testing.assert_close(h.matvec(torch.ones(4)), torch.full((4,), 8.0))  # 2 x̂ x̂ᵀ with x̂ = (1, 1, 1, 1)


def test_a_compiled_module_has_the_same_step():
    class Logging(Model):
        training_step = logging

    model = Logging()
    assert torch.equal(training_step_loss(torch.compile(model), X), model.loss(X))
