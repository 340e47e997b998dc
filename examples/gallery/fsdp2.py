"""The spectrum of a sharded GPT, measured where its shards are: FSDP2 on two processes (20 seconds).

Run it by `torchrun --nproc-per-node 2 examples/gallery/fsdp2.py`.
"""

import pydoc_data.topics
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sketch import SpectrumMonitor

LENGTH = 32


class GPT(LightningModule):
    def __init__(self):
        super().__init__()
        self.gpt = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=4,
                                              bos_token_id=None, eos_token_id=None))  # fmt: skip

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]  # made by the strategy
        for part in (*self.gpt.transformer.h, self.gpt):
            fully_shard(part, mesh=mesh)

    def training_step(self, batch):
        return self.gpt(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main():
    seed_everything(0, verbose=False)
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")[: 1024 * LENGTH]
    letters: Any = torch.tensor(list(text)).view(-1, LENGTH)  # Python's own documentation
    monitor = SpectrumMonitor(num_batches=1, num_matvecs=32, top_k=3, bottom_k=1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy=strategy, callbacks=[monitor], logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    model = GPT()
    trainer.fit(model, DataLoader(letters, batch_size=32, shuffle=True))
    here = sum(shard.to_local().numel() for shard in model.parameters())  # type: ignore[attr-defined]  # a DTensor
    print(f"process {trainer.global_rank}: {here:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    for measured in monitor.history if trainer.is_global_zero else ():
        pairs = zip(measured.top(3).tolist(), measured.residuals.tolist(), strict=False)
        largest = ", ".join(f"{value:.2f} ± {error:.1g}" for value, error in pairs)
        print(f"epoch {measured.epoch}, loss {measured.loss:.2f}, eigenvalues {largest}")


if __name__ == "__main__":
    main()
