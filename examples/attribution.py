"""Find wrong labels of handwritten digits, and the images that taught a network its answers (a minute on two cores).

Of 1437 training images 10 % get a wrong label. The writer stores a row per training image at the end of training; an
image that is hard to explain by all the others helps mostly itself, and its label is suspect. Prints how many of the k
most suspect labels are wrong, and writes runs/attribution/attribution.png: five test images, with the training images
that helped and that hurt the network's answer.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch.attribution import IndexedDataset
from lightning_sketch.plots import contact_sheet

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/attribution")
TRAINING, WRONG, SHOWN = 1437, 144, 5


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("loss", F.cross_entropy(self(images), labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def digits():
    """Load the images, their true labels, and which of the training labels will be wrong."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8)
    order = torch.randperm(len(images))
    wrong = torch.zeros(TRAINING, dtype=torch.bool)
    wrong[torch.randperm(TRAINING)[:WRONG]] = True
    return images[order], torch.tensor(labels)[order], wrong


def losses_and_probabilities(module, batch):
    images, labels = batch
    losses = F.cross_entropy(module(images), labels, reduction="none")
    return losses, (-losses).exp()


def auroc(values, wrong):
    """Return the area under the ROC curve, from ranks: torchmetrics takes values outside [0, 1] for logits."""
    return float(binary_auroc(values.argsort().argsort() / len(values), wrong))


def main():
    seed_everything(0, verbose=False)
    images, truth, wrong = digits()
    labels = truth[:TRAINING].clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (WRONG,))) % 10
    train = IndexedDataset(TensorDataset(images[:TRAINING], labels))

    # One callback in the Trainer that trains anyway; then one pass over the training images.
    writer = GradientSketchWriter(OUT / "store", dim=512, row_fn=losses_and_probabilities, overwrite=True)
    trainer = Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        callbacks=[writer],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    trainer.validate(model, DataLoader(train, batch_size=256), verbose=False)

    # From here on only the store is needed. The influence of each example on itself:
    store = GradientStore.open(writer.dirpath)
    rows = store.where(stage="validate")
    suspicion, ids = rows.self_influence(method="influence", curvature="margin")
    ranked = ids[suspicion.argsort(descending=True)]
    print(f"\n{len(store.where(stage='fit')):,} rows of steps and {len(rows):,} of training images in {writer.dirpath}")
    for k in (50, 100, WRONG):
        print(f"of the {k} most suspect labels {wrong[ranked[:k]].float().mean():.0%} are wrong (by chance 10 %)")
    loss = rows.metadata()["loss"]
    print(
        f"area under the ROC curve {auroc(suspicion, wrong[ids]):.3f}; of the loss alone {auroc(loss, wrong[ids]):.3f}"
    )

    # The examples that taught the network its answers to five test images:
    asked = slice(TRAINING, TRAINING + SHOWN)
    queries = rows.sketch_gradients(model, [(images[asked], truth[asked])])
    best = {
        largest: rows.top_k(queries, 5, largest=largest, method="influence", curvature="margin")
        for largest in (True, False)
    }
    figure = contact_sheet(
        images[asked].numpy(),
        helped=images[best[True].example_ids].numpy(),
        hurt=images[best[False].example_ids].numpy(),
        query_titles=[f"a {label}" for label in truth[asked].tolist()],
        helped_titles=[[f"“{labels[i]}”" for i in row] for row in best[True].example_ids.tolist()],
        hurt_titles=[[f"“{labels[i]}”" for i in row] for row in best[False].example_ids.tolist()],
    )
    figure.savefig(OUT / "attribution.png", dpi=150)
    print(f"\npicture: {OUT / 'attribution.png'}")


if __name__ == "__main__":
    main()
