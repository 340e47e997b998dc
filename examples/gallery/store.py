"""Stored rows are tables for other tools: asked in SQL by DuckDB, and searched in a Lance dataset (10 seconds)."""

import shutil
from pathlib import Path

import duckdb
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import GradientSketchWriter, GradientStore, IndexedDataset
from lightning_sketch.attribution import top_k
from lightning_sketch.store import LanceRows

OUT = Path("runs/store")
images, digits = torch.tensor(load_digits().data / 16, dtype=torch.float32), torch.tensor(load_digits().target)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step  # for trainer.validate, which makes the rows

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


shutil.rmtree(OUT, ignore_errors=True)  # of an earlier run
seed_everything(0, verbose=False)
model, loader = Net(), DataLoader(IndexedDataset(TensorDataset(images, digits)), batch_size=64, shuffle=True)
writer = GradientSketchWriter(OUT / "rows", dim=256, dtype="float32", overwrite=True)
trainer = Trainer(max_epochs=5, accelerator="cpu", callbacks=[writer], logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
trainer.fit(model, loader)
trainer.validate(model, loader, verbose=False)
store = GradientStore.open(writer.dirpath).where(stage="validate")

# DuckDB reads the rows as a table: the length of a row is that of the gradient, up to the sketch.
store.export("parquet", OUT / "rows.parquet")
labels = duckdb.sql(f"SELECT unnest(range({len(digits)})) AS example_id, unnest({digits.tolist()}) AS digit")
by_digit = f"""
    SELECT digit, count(*) AS images, round(avg(loss), 3) AS loss,
           round(avg(sqrt(list_dot_product(sketch, sketch))), 2) AS gradient
    FROM '{OUT / "rows.parquet"}' JOIN labels USING (example_id) GROUP BY digit ORDER BY loss DESC"""
print(duckdb.sql(by_digit))

# A Lance dataset, which may be in an object store, gives the answers of the store.
store.export("lance", OUT / "rows.lance")
rows = LanceRows(OUT / "rows.lance")
loss = rows.metadata()["loss"]
asked = rows.where(loss >= loss.sort().values[-3]).read()  # the three that the network is worst at
print(top_k(asked, rows, k=5, method="cosine"))
