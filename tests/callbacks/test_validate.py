"""`trainer.validate`, which runs in inference mode, measures the spectrum of a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from models import Digits, dataset, loader, trainer
from pytorch_lightning import seed_everything
from pytorch_lightning.loggers import CSVLogger
from torchmetrics import MeanMetric

from lightning_sketch import SpectrumMonitor
from lightning_sketch.curvature import Hessian, spectrum


class Model(Digits):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()  # its state is made in inference mode; a measurement must not change it

    def validation_step(self, batch, batch_idx):
        self.mean(F.cross_entropy(self.net(batch[0]), batch[1]))
        self.log("val_loss", self.mean)

    def training_step(self, batch, batch_idx):
        self.mean(torch.tensor(1e6))
        return super().training_step(batch, batch_idx)


def cross_entropy(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_checkpoint_has_the_spectrum_that_it_has_without_a_trainer(tmp_path, inference_mode):
    seed_everything(3, verbose=False)
    model, logger = Model(), CSVLogger(tmp_path)
    watch = SpectrumMonitor(stages=["validate"], num_batches=2, num_matvecs=48, top_k=3, bottom_k=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = trainer(tmp_path, watch, logger=logger, inference_mode=inference_mode)
    (result,) = run.validate(model, loader(shuffle=False), verbose=False)
    images, labels = dataset()[:64]
    batches = [(images[:32], labels[:32]), (images[32:], labels[32:])]
    plain = spectrum(Hessian(cross_entropy, model, batches), num_matvecs=48, top_k=3, bottom_k=1)
    assert watch.history[0].eigenvalues == pytest.approx(plain.eigenvalues, rel=1e-4, abs=1e-4)
    assert run.callback_metrics["hessian/lambda_max"] == pytest.approx(plain.lambda_max, rel=1e-4)
    assert (tmp_path / "lightning_logs/version_0/hessian_spectra/epoch=0-step=0.safetensors").exists()
    # the user's own metrics, weights and buffers are unchanged
    expected = F.cross_entropy(model.eval().net(dataset()[:][0]), dataset()[:][1]).detach()
    assert result["val_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_validation_within_a_fit_is_not_measured(tmp_path):
    watch = SpectrumMonitor(num_batches=1, num_matvecs=16)
    run = trainer(tmp_path, watch)
    run.fit(Model(), loader(), loader(shuffle=False))
    assert [m.step for m in watch.history] == [8, 16]


def test_an_unsupported_training_step_is_refused_there_too(tmp_path):
    class NoLoss(Model):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(ValueError, match="returned no loss for this batch"):
        trainer(tmp_path, SpectrumMonitor(stages=["validate"])).validate(NoLoss(), loader(shuffle=False), verbose=False)
