"""Which training digits taught a network its answers: a page of pictures to click through (15 seconds)."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset

OUT = Path("runs/attribution")
images, labels = torch.tensor(load_digits().images / 16, dtype=torch.float32), torch.tensor(load_digits().target)
train, test = TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step  # for trainer.validate, which makes the rows

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %% Train, then store a sketched gradient of each training image.
seed_everything(0, verbose=False)
model, loader = Net(), DataLoader(IndexedDataset(train), batch_size=64, shuffle=True)
writer = GradientSketchWriter(OUT / "rows", dim=1024, overwrite=True)
trainer = Trainer(max_epochs=20, accelerator="cpu", callbacks=[writer], logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
trainer.fit(model, loader)
trainer.validate(model, loader, verbose=False)

# %% Ask about the test images whose loss is largest.
store = GradientStore.open(writer.dirpath).where(stage="validate")
store.fit_curvature(model, loader)
asked = nn.functional.cross_entropy(model(test[:][0]), test[:][1], reduction="none").topk(12).indices.tolist()
queries = store.sketch_gradients(model, [test[asked]])
page = store.report(OUT / "page.html", queries, train=train, queries_of=[test[i] for i in asked], method="influence")

# %% The same as a picture: a test image in each row, and the five training images that helped its label most.
helped = store.top_k(queries, 5, method="influence", normalize=True).example_ids[:4].tolist()
figure, grid = plt.subplots(4, 6, figsize=(6.4, 4.8), layout="constrained")
for row, query, ids in zip(grid, asked, helped, strict=False):
    for axes, (image, label) in zip(row, [test[query], *(train[i] for i in ids)], strict=True):
        axes.imshow(image, cmap="gray_r")
        axes.set(xticks=[], yticks=[], title=f"{'test: ' * (axes is row[0])}{label}")
figure.savefig(OUT / "attribution.png", dpi=150)
print(f"page: {page}\npicture: {OUT / 'attribution.png'}")
