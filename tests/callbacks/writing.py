"""Run as a program: train with a writer and checkpoints, to be killed from outside and resumed.

python writing.py FOLDER DEVICES STEPS [look]

Goes on from the newest checkpoint in FOLDER/saved, if there is one; these are taken at the ends of epochs, of 8 steps,
since a sampler begins anew on resuming. Prints STEP k after each step. look: only rows of 125 examples.
"""

import sys
import time
from pathlib import Path

import torch
from models import Digits, dataset, trainer
from pytorch_lightning import seed_everything
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_sketch import GradientSketchWriter
from lightning_sketch.attribution import IndexedDataset


class Model(Digits):
    """Without dropout and batch statistics: what one process computes on a batch, two do on its halves."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.net[1] = torch.nn.Identity()

    def validation_step(self, batch, batch_idx):
        pass


class Slow(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.is_global_zero:
            print(f"STEP {trainer.global_step}", flush=True)
        time.sleep(0.02)


def main(folder: Path, devices: int, steps: int, look: bool):
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    saved = sorted((folder / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    save = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=8, save_top_k=-1)
    writer = GradientSketchWriter(folder / "store", dim=64, dtype="float32")
    run = trainer(
        folder,
        *([] if look else [save, Slow()]),
        writer,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=-1,
        max_steps=steps,
        enable_checkpointing=not look,
    )
    rows = IndexedDataset(dataset(125 if look else 128))
    data = DataLoader(rows, batch_size=16 // devices)
    model = Model()
    if look:
        run.validate(model, data)
    else:
        run.fit(model, data, ckpt_path=saved[-1] if saved else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "look" in sys.argv)
