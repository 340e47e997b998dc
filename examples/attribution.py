"""Which training images taught a network its answers, and which have a wrong label (a minute on one core).

Of 1437 training images of handwritten digits 10 % get a wrong label. The writer stores a row per training image at the
end of training, and questions are asked of the store:

1. Whose label is wrong? An image that the others do not explain helps mostly itself. Here the loss finds as many.
2. Who taught this answer? The loss cannot say, it is the same for each question. The most influential images are
   removed, and the network is trained again: how much do 100 test images lose, beside the removal of other images?

Writes runs/attribution/attribution.png: test images, with the training images that helped and hurt the answer.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch.attribution import IndexedDataset
from lightning_sketch.metrics import removal_curve
from lightning_sketch.plots import contact_sheet

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/attribution")
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 0
TRAINING, WRONG, ASKED, SHOWN, REMOVED, EPOCHS = 1437, 144, 100, 5, 20, 10


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


def losses(model, images, labels):
    with torch.no_grad():
        return F.cross_entropy(model(images), labels, reduction="none")


def trained_again(untrained, images, labels):
    """Do on some of the images what the Trainer does, in a loop that takes a twentieth of a second."""
    model, generator = copy.deepcopy(untrained), torch.Generator().manual_seed(SEED)
    optimizer = model.configure_optimizers()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            model.training_step((images[batch], labels[batch])).backward()
            optimizer.step()
    return model


def main():
    seed_everything(SEED, verbose=False)
    images, truth, wrong = digits()
    labels = truth[:TRAINING].clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (WRONG,))) % 10
    images, test_images, test_labels = images[:TRAINING], images[TRAINING:][:ASKED], truth[TRAINING:][:ASKED]
    train = IndexedDataset(TensorDataset(images, labels))

    # One callback in the Trainer that trains anyway; then one pass over the training images.
    writer = GradientSketchWriter(OUT / "store", dim=512, overwrite=True)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        callbacks=[writer],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Digits()
    untrained = copy.deepcopy(model)
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    trainer.validate(model, DataLoader(train, batch_size=256), verbose=False)
    store = GradientStore.open(writer.dirpath).where(stage="validate")
    store.fit_curvature(model, DataLoader(train, batch_size=256))

    # 1. The influence of each image on itself, and its loss:
    suspicion = store.self_influence(method="influence")
    influence, loss = torch.empty(TRAINING), losses(model, images, labels)
    influence[suspicion.example_ids] = suspicion.scores
    print(f"\nWrong labels among the most suspect ones (by chance {WRONG / TRAINING:.0%})")
    for name, values in (("by self-influence", influence), ("by loss", loss)):
        shares = [f"{wrong[values.topk(k).indices].double().mean():4.0%} of {k}" for k in (50, 100, WRONG)]
        print(f"    {name:<20}{'   '.join(shares)}")

    # 2. Remove for each test image the training images with the highest scores, and train again:
    queries = store.sketch_gradients(model, [(test_images, test_labels)])
    scores = store.scores(queries, method="influence")
    near = -torch.cdist(test_images.flatten(1), images.flatten(1))
    candidates = {
        "influence": scores,
        "relative influence": store.scores(queries, method="influence", normalize=True),
        "cosine": store.scores(queries, method="cosine"),
        "nearest in pixels": near,
        "nearest of same label": near.where(test_labels[:, None] == labels, near - near.abs().max()),
        "highest loss": loss.expand(ASKED, -1),
    }
    curve = removal_curve(
        lambda ids: losses(trained_again(untrained, images[ids], labels[ids]), test_images, test_labels),
        candidates,
        [REMOVED],
        random=10,
    )
    print(f"\nLoss of {ASKED} test images, {curve.losses.mean():.3f}, rises without {REMOVED} training images by")
    for name, rises in curve.rises.items():
        mean, error, share = rises.mean(), rises.std() / ASKED**0.5, (rises > 0).double().mean()
        print(f"    {name:<24}{mean:6.3f} ± {error:.3f}   it rises for {share:.0%}")
    expected = scores.topk(REMOVED).values.sum(1).mean() / TRAINING
    times = curve.rises["influence"].mean() / expected
    print(f"to first order by {expected:.3f}, the sum of influence scores over n: {times:.1f} times too small")

    # The images that helped and hurt five of the answers, by relative influence, so that outliers don't win each list:
    groups = {}
    for heading, largest in (("helped most: its label, and relative influence", True), ("hurt most", False)):
        best = store.top_k(queries, 5, method="influence", normalize=True, largest=largest)
        ids, lines = best.example_ids[:SHOWN], []
        for row, values in zip(ids.tolist(), best.scores.tolist(), strict=False):
            names = [f"{labels[i]} (is {truth[i]})" if wrong[i] else f"{labels[i]}" for i in row]
            lines.append([f"{name}\n{value:+.2f}" for name, value in zip(names, values, strict=True)])
        groups[heading] = images[ids].numpy(), lines, wrong[ids].tolist()
    figure = contact_sheet(
        test_images[:SHOWN].numpy(),
        [f"a {label}\n" for label in test_labels[:SHOWN].tolist()],
        groups,
        note="framed in red: the label was made wrong; in brackets the true digit",
    )
    figure.savefig(OUT / "attribution.png", dpi=110)
    print(f"\npicture: {OUT / 'attribution.png'}")


if __name__ == "__main__":
    main()
