"""How sharp a loss is, who taught an answer, how few numbers suffice: a network learns digits (a minute).

Prints what it finds and writes runs/quickstart/spectrum.png; all numbers are in CSV and in an offline W&B run.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset, SpectrumMonitor, SubspaceModule

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
QUIET: dict = dict.fromkeys(["enable_checkpointing", "enable_model_summary", "enable_progress_bar"], False)


class SmallConvNet(LightningModule):
    def __init__(self):
        super().__init__()
        first = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        self.net = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(96, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


seed_everything(0, verbose=False)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
digits = TensorDataset((images - images.mean()) / images.std(), torch.tensor(labels))
data, unseen = random_split(digits, [1437, 360], torch.Generator().manual_seed(0))
train, val = DataLoader(IndexedDataset(data), batch_size=64, shuffle=True), DataLoader(unseen, batch_size=360)

monitor, writer = SpectrumMonitor(at_start=True), GradientSketchWriter(OUT / "rows", dim=1024, overwrite=True)
loggers = [CSVLogger(OUT, name="csv"), WandbLogger(project="lightning-sketch", save_dir=OUT, offline=True)]
trainer = Trainer(max_epochs=10, accelerator="cpu", logger=loggers, callbacks=[monitor, writer], **QUIET)
model = SmallConvNet()
trainer.fit(model, train, val)
accuracy = float(trainer.callback_metrics["val_acc"])
print("How sharp? Eigenvalues of the Hessian (* not converged):\nepoch    loss   three largest              smallest")
for epoch, m in enumerate(monitor.history):
    top = " ".join(f"{v:7.3f}{' ' if ok else '*'}" for v, ok in zip(m.top(3), m.converged, strict=False))
    print(f"{epoch:>5} {m.loss:7.4f}   {top} {m.lambda_min:10.3f}{'' if m.converged[-1] else '*'}")
monitor.plot().savefig(OUT / "spectrum.png", dpi=150)
print(f"picture: {OUT / 'spectrum.png'}")

trainer.validate(model, train, verbose=False)  # a row of each training image
store = GradientStore.open(writer.dirpath).where(stage="validate")
store.fit_curvature(model, train)
helped = store.top_k(store.sketch_gradients(model, [unseen[:1]]), 5, method="influence", normalize=True)
taught = ", ".join(f"{int(data[id][1])} (image {id})" for id in helped.example_ids[0].tolist())
print(f"\nWho taught that the first new image is a {int(unseen[0][1])}? {taught}")

seed_everything(0, verbose=False)
sub = SubspaceModule(SmallConvNet(), dim=256)
small = Trainer(max_epochs=10, accelerator="cpu", logger=False, **QUIET)
small.fit(sub, train, val)
found = float(small.callback_metrics["val_acc"])
print(f"\nHow few numbers? {sub.dim} of {sub.n:,} read {found:.1%} of new images; all of them {accuracy:.1%}")
