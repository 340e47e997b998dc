"""Fine-tuning starts where the loss is sharp and nearly convex; training from zero does not (20 seconds)."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import SpectrumMonitor

OUT = Path("runs/fine_tuning")
images, labels = torch.tensor(load_digits().data / 16, dtype=torch.float32), torch.tensor(load_digits().target)
old, new = (TensorDataset(images[chosen], labels[chosen] % 5) for chosen in (labels < 5, labels >= 5))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 5)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fit(model, digits, epochs):
    """Train, and return what the spectrum was at the start and after each epoch."""
    monitor = SpectrumMonitor(at_start=True, top_k=5, bottom_k=1)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[monitor], logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, DataLoader(digits, batch_size=64, shuffle=True))
    return monitor.history


seed_everything(0, verbose=False)
tuned = Net()
fit(tuned, old, 10)  # digits 0 to 4
tuned.head.reset_parameters()
runs = {"fine-tuned": fit(tuned, new, 10), "from zero": fit(Net(), new, 10)}  # digits 5 to 9

figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True, layout="constrained")
for name, history in runs.items():
    steps = [measured.step for measured in history]
    top.plot(steps, [measured.lambda_max for measured in history], "o-", ms=4, label=name)
    bottom.plot(steps, [measured.rneg for measured in history], "o-", ms=4)
    for when, measured in (("start", history[0]), ("end", history[-1])):
        print(f"{name}, {when:>5}: loss {measured.loss:.2f}, largest eigenvalue {measured.lambda_max:5.2f}, "
              f"most negative over largest {measured.rneg:.2f}")  # fmt: skip
top.set(ylabel="largest eigenvalue", title="learning the digits 5 to 9")
bottom.set(ylabel="|most negative|\nover largest", xlabel="step", ylim=(0, None))
top.legend(frameon=False)
OUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUT / "fine_tuning.png", dpi=150)
print(f"picture: {OUT / 'fine_tuning.png'}")
