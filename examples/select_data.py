"""Select the training examples that help a task, as LESS does (15 seconds on one core).

The pool has 1437 images of handwritten digits, one in four turned by 90 degrees; the task is to read turned digits, and
100 of them say so. A network trains on the whole pool, and its checkpoints are kept. At each of them, the cosine of an
image's gradient with that of the task, both divided by Adam's diagonal, says how much a step on the image helps the
task; the scores of the checkpoints are added, each times its learning rate. Each digit is a task of its own, or else
the selection would be all of the few digits that are hardest.

Is the selection good? A new network trains on the selected tenth of the pool, others on a random tenth and on all of
it, for as many steps. With images this simple the nearest ones in pixels, of the same digit, are as good a selection.

Source: Xia et al. (2024), "LESS: selecting influential data for targeted instruction tuning", arXiv:2402.04333. There
Adam's diagonal divides the gradient of the pool's example alone, here its square root divides both.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset
from lightning_sketch.attribution import SketchedGradients, together

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/select_data")
POOL, DIGITS, EPOCHS, STEPS, SEEDS = 1437, 10, 4, 400, 3
QUIET: dict = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_progress_bar": False}


class Reader(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DIGITS))

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def selected(pool, task, out, count):
    """Return the indices of the `count` examples of a data set that help a task most, given a batch of the task."""
    writer = GradientSketchWriter(out / "store", dim=1024, preconditioner="optimizer", overwrite=True)
    checkpoints = ModelCheckpoint(out, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = Trainer(max_epochs=EPOCHS, callbacks=[writer, checkpoints], **QUIET)
    model = Reader()
    trainer.fit(model, DataLoader(pool, batch_size=32, shuffle=True))

    scores = torch.zeros(DIGITS, len(pool))
    for epoch in range(EPOCHS):
        loader = DataLoader(IndexedDataset(pool), batch_size=256)
        trainer.validate(model, loader, ckpt_path=out / f"epoch={epoch}.ckpt", verbose=False)  # writes a row per image
        store = GradientStore.open(writer.dirpath).where(stage="validate")
        queries = store.sketch_gradients(model, [task])  # at the weights of this checkpoint, as the rows
        digits = SketchedGradients.cat([together(queries.where(task[1] == digit)) for digit in range(DIGITS)])
        rows, columns = store.scored_rows(digits), store.metadata()
        scores[:, columns["example_id"][rows]] += columns["lr"][rows] * store.scores(digits, method="cosine")
    return scores.topk(count // DIGITS).indices.unique()


def accuracy(examples, test):
    """Train a new network on examples, and return the part of the test images that it reads."""
    model, (images, labels) = Reader(), test
    trainer = Trainer(max_epochs=-1, max_steps=STEPS, enable_checkpointing=False, **QUIET)
    trainer.fit(model, DataLoader(examples, batch_size=32, shuffle=True))
    return float((model.net(images).argmax(1) == labels).double().mean())


def main():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels)
    print(f"{'seed':<6}{'turned, of the selected':<26}{'accuracy: selected tenth':<27}{'random tenth':<15}whole pool")
    for seed in range(SEEDS):
        seed_everything(seed, verbose=False)
        order = torch.randperm(len(images))
        is_turned = (torch.rand(len(images)) < 0.25) | (torch.arange(len(images)) >= POOL)
        shown = torch.where(is_turned[:, None, None], images[order].rot90(1, (1, 2)), images[order])
        pool = TensorDataset(shown[:POOL], labels[order][:POOL])
        task = shown[POOL:][:100], labels[order][POOL:][:100]
        test = shown[POOL:][100:], labels[order][POOL:][100:]

        best = selected(pool, task, OUT / f"{seed}", POOL // 10)
        chance = torch.randperm(POOL)[: len(best)]
        found = [accuracy(Subset(pool, ids.tolist()), test) for ids in (best, chance, torch.arange(POOL))]
        turned = is_turned[best].double().mean()
        print(f"{seed:<6}{turned:<26.0%}{found[0]:<27.1%}{found[1]:<15.1%}{found[2]:.1%}", flush=True)


if __name__ == "__main__":
    main()
