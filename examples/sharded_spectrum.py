"""Watch the Hessian of a sharded model while it trains, with FSDP2 on two processes (half a minute on two CPU cores).

    torchrun --nproc-per-node 2 examples/sharded_spectrum.py

A small GPT learns to predict the next letter of Python's own documentation. Its weights, gradients and Adam's moments
are split over the processes, and so are the vectors of the Hessian: the same script, with a larger `WIDTH` and
`LAYERS`, measures models that fit on no single GPU. Products are differences of gradients, so that bfloat16 compute,
fused attention and activation checkpointing stay on; the printed error bars include what that costs.
"""

import pydoc_data.topics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_sketch import SpectrumMonitor

WIDTH, LAYERS, LENGTH = 32, 1, 32


class GPT(LightningModule):
    def __init__(self):
        super().__init__()
        self.letters = nn.Embedding(128, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 128)

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]  # made by the strategy
        for part in (*self.body.layers, self.letters, self.places, self.body, self.head):
            fully_shard(part, mesh=mesh)

    def training_step(self, batch):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        hidden = self.letters(inputs) + self.places(torch.arange(inputs.shape[1], device=batch.device))
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=batch.device)
        logits = self.head(self.body(hidden, mask, is_causal=True))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main():
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")[: 1024 * (LENGTH + 1)]
    documents: Any = torch.tensor(list(text)).view(-1, LENGTH + 1)
    monitor = SpectrumMonitor(num_batches=1, num_matvecs=32, top_k=3, bottom_k=1)
    trainer = Trainer(
        accelerator="cpu",  # leave it out where there are GPUs
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=2,
        callbacks=[monitor],
        default_root_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/sharded_spectrum",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(GPT(), DataLoader(documents, batch_size=32, shuffle=True))
    for measured in monitor.history if trainer.is_global_zero else ():
        print(f"epoch {measured.epoch}, loss {measured.loss:.2f}")
        pairs = zip(measured.eigenvalues[:3].tolist(), measured.residuals[:3].tolist(), strict=True)
        print("   largest ", ", ".join(f"{value:.3f} ± {error:.1g}" for value, error in pairs))
        print(f"   smallest {measured.lambda_min:.3f} ± {float(measured.residuals[-1]):.1g}")


if __name__ == "__main__":
    main()
