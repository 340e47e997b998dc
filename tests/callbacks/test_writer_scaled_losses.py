"""Rows under a GradScaler are gradients of the loss itself, whether Lightning or a fused optimizer unscales them."""

import pytest
import torch
from models import Digits, fit
from pytorch_lightning.plugins.precision import MixedPrecision

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch._lightning import gradient_scale

SCALE = 2.0**16

OPTIMIZERS = {
    "Adam": lambda parameters, fused: torch.optim.Adam(parameters, lr=3e-3, fused=fused),
    "SGD": lambda parameters, fused: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=fused),
}


def rows(folder, name, fused):
    """Return the rows of a fit in float16 whose losses are multiplied by 65,536."""

    class Model(Digits):
        def __init__(self):
            super().__init__(dropout=0.0)

        def configure_optimizers(self):
            return OPTIMIZERS[name](self.parameters(), fused)

    torch.manual_seed(0)
    writer = GradientSketchWriter(folder, dim=64, dtype="float32")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model = fit(folder.parent, writer, model=Model, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == SCALE  # no step was skipped
    return GradientStore.open(folder).read().sketches, model.trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_of_a_fused_optimizer_are_those_of_a_plain_one(tmp_path, name):
    """A fused optimizer unscales in its own step, after the row was computed.

    Weights differ by rounding: 2 % are allowed; without unscaling rows would be off by a factor of 65,536.
    """
    plain, _ = rows(tmp_path / "plain", name, fused=False)
    fused, _ = rows(tmp_path / "fused", name, fused=True)
    assert len(fused) == len(plain) == 16
    assert (fused - plain).norm() <= 0.02 * plain.norm()


def test_a_fused_optimizer_without_the_private_flag_is_an_error(tmp_path):
    """The flag is missing, as after a rename in PyTorch."""
    _, trainer = rows(tmp_path / "rows", "Adam", fused=True)
    (optimizer,) = trainer.optimizers
    assert gradient_scale(trainer, optimizer) == SCALE
    del optimizer._step_supports_amp_scaling
    with pytest.raises(RuntimeError, match="Adam has no _step_supports_amp_scaling"):
        gradient_scale(trainer, optimizer)


def test_param_groups_of_a_fused_checkpoint_make_no_optimizer_fused(tmp_path):
    """Lightning unscales for an optimizer that was made without `fused`, even if its loaded groups have it."""
    _, trainer = rows(tmp_path / "rows", "Adam", fused=False)
    (optimizer,) = trainer.optimizers
    optimizer.load_state_dict(torch.optim.Adam(optimizer.param_groups[0]["params"], fused=True).state_dict())
    assert optimizer.param_groups[0]["fused"]
    assert gradient_scale(trainer, optimizer) == 1.0
