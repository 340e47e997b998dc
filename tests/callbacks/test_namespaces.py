"""The same callback works in `lightning.pytorch`, whose classes differ from those of `pytorch_lightning`."""

import pytest
import torch
import torch.nn.functional as F
from models import loader

from lightning_sketch import SpectrumMonitor

lp = pytest.importorskip("lightning.pytorch")


class Small(lp.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def training_step(self, batch):
        loss = F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_fit_in_the_other_namespace(tmp_path):
    watch = SpectrumMonitor(num_batches=1, num_matvecs=16)
    assert isinstance(watch, lp.Callback)
    trainer = lp.Trainer(max_epochs=2, callbacks=[watch], default_root_dir=tmp_path, accelerator="cpu", logger=False)
    trainer.fit(Small(), loader())
    assert [m.step for m in watch.history] == [8, 16]
    assert trainer.callback_metrics["hessian/lambda_max"] > 0
    (state,) = (v for k, v in trainer._checkpoint_connector.dump_checkpoint()["callbacks"].items() if "Spectrum" in k)
    assert len(state["history"]) == 2
