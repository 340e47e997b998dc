"""Program that trains with a writer and checkpoints, to be killed and resumed by tests.

python writing.py FOLDER DEVICES STEPS [validate] [ekfac] [optimizer] [die=K ...]

It resumes from the newest checkpoint in FOLDER/saved, if there is one. Checkpoints are made at the ends of epochs, of 8
steps, since samplers restart on resuming. It prints STEP k after each step. validate: only write rows of 125 examples.
ekfac, optimizer: with this preconditioner. die=K: the process of the last rank dies after step K, once.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from models import Digits, dataset, trainer
from pytorch_lightning import seed_everything
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_sketch import GradientSketchWriter
from lightning_sketch.attribution import IndexedDataset


class Model(Digits):
    """A network without dropout and batch statistics, so that two processes compute on half batches what one does."""

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


class Dies(Callback):
    def __init__(self, folder, step):
        self.mark, self.step = folder / f"died-{step}", step

    def on_train_batch_end(self, trainer, *args):
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os._exit(9)


def main(folder: Path, devices: int, steps: int, validate: bool, preconditioner: str | None, dies: list[int]):
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    saved = sorted((folder / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    save = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=8, save_top_k=-1)
    writer = GradientSketchWriter(folder / "store", dim=64, dtype="float32", preconditioner=preconditioner)
    run = trainer(
        folder,
        *([] if validate else [save, Slow()]),
        *(Dies(folder, step) for step in dies),
        writer,
        devices=devices,
        strategy=DDPStrategy(timeout=timedelta(minutes=2)) if devices > 1 else "auto",
        max_epochs=-1,
        max_steps=steps,
        enable_checkpointing=not validate,
    )
    rows = IndexedDataset(dataset(125 if validate else 128))
    data = DataLoader(rows, batch_size=16 // devices)
    model = Model()
    if validate:
        run.validate(model, data)
    else:
        run.fit(model, data, ckpt_path=saved[-1] if saved else None)


if __name__ == "__main__":
    die = [int(option.removeprefix("die=")) for option in sys.argv if option.startswith("die=")]
    named = next((name for name in ("ekfac", "optimizer") if name in sys.argv), None)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "validate" in sys.argv, named, die)
