"""Program that runs one fit on DEVICES processes over the same data; each rank prints its history as JSON.

python ddp.py FOLDER DEVICES [RANK THAT FAILS]
"""

import json
import sys

import torch
from models import Digits, dataset, trainer
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader, DistributedSampler

from lightning_sketch import SpectrumMonitor


class Model(Digits):
    fails_on = None

    def __init__(self):
        super().__init__(dropout=0.0)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.fails_on == self.global_rank and self.global_step == 4 and not self.training:
            raise RuntimeError("this rank cannot")
        return super().training_step(batch, batch_idx)


class Data(DataLoader):
    """The first 128 examples, of which rank r of R takes r, r + R, ...: each batch is the same over all ranks."""

    def __init__(self, devices: int):
        rows = dataset(128)
        sampler = DistributedSampler(rows, devices, rank=Data.rank, shuffle=False) if devices > 1 else None
        super().__init__(rows, batch_size=32 // devices, sampler=sampler)


def main(folder: str, devices: int, fails_on: int | None):
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    monitors = [
        SpectrumMonitor(at_start=True, per_layer=["net.0.*"]),
        SpectrumMonitor("ggn", at_start=True),
        SpectrumMonitor("fisher", at_start=True, num_batches=1),
    ]
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(folder, *monitors, devices=devices, strategy=strategy, max_epochs=1, use_distributed_sampler=False)
    Data.rank = run.global_rank
    model = Model()
    model.fails_on = fails_on
    run.fit(model, Data(devices))
    found = {
        monitor.name: {
            "values": monitor.history[0].top(5).tolist(),
            "rest": [monitor.history[0].loss, float(monitor.history[0].gradient_in_top(5))],
            "trace": [monitor.history[0].trace, monitor.history[0].trace_sem],
            "layers": [layer.lambda_max for layer in monitor.history[0].layers.values()],
            "steps": [m.step for m in monitor.history],
            "verdict": [m.verdict for m in monitor.history],
        }
        for monitor in monitors
    }
    print("\nFOUND " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
